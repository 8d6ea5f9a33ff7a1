"""LoKr: Kronecker products (Yeh et al. 2024, LyCORIS)."""

import math

import jax
import jax.numpy as jnp

from pisa_jax.adapters.decomposition import Decomposition


def lokr(alpha: float, *, factor: int = -1) -> Decomposition:
    """Return dW = (alpha / r) W1 (x) W2, where in = c d, out = a b, W1 is (c, a) and W2 is (window, d, b).

    dW[h, w, (c, d), (a, b)] = W1[c, a] W2[h, w, d, b]. W2 is the product of a2 and b2, of rank r, or one matrix w2 if r
    is at least half of its longer side; the factor alpha / r is then 1, as in LyCORIS. b2 or w2 is 0 at initialization.

    Args:
        factor: the sizes a and c; a channel count that it does not divide is split near it. -1: as square as possible.

    Reference: Yeh et al. 2024 (arXiv 2309.14859), and LyCORIS for the sizes.
    """

    def init(key, kernel, rank):
        *window, c_in, c_out = kernel.shape
        (c, d), (a, b) = factorize(c_in, factor), factorize(c_out, factor)
        keys = jax.random.split(key)
        factors = {"w1": _uniform(keys[0], (c, a), c)}
        if rank >= max(b, d) / 2:
            return {**factors, "w2": jnp.zeros((*window, d, b))}
        return {**factors, "a2": _uniform(keys[1], (*window, d, rank), rank), "b2": jnp.zeros((rank, b))}

    def second(factors):
        if "w2" in factors:
            return factors["w2"]
        return (alpha / factors["b2"].shape[0]) * (factors["a2"] @ factors["b2"])

    def delta(factors, kernel):
        product = jnp.einsum("ca,...db->...cdab", factors["w1"], second(factors))
        return product.reshape(kernel.shape)

    def apply(factors, call):
        w1, w2, x = factors["w1"], second(factors), call.x
        (c, a), (d, b) = w1.shape, w2.shape[-2:]
        # The axis c joins the batch, so that the layer sees images with d channels.
        parts = jnp.moveaxis(x.reshape(*x.shape[:-1], c, d), -2, 0)
        y = call.linear(parts.reshape(-1, *parts.shape[2:]), w2)
        y = y.reshape(c, x.shape[0], *y.shape[1:])
        mixed = jnp.einsum("c...b,ca->...ab", y, w1.astype(y.dtype))
        return mixed.reshape(*mixed.shape[:-2], a * b)

    return Decomposition(init, delta, apply)


def factorize(size: int, factor: int = -1) -> tuple[int, int]:
    """Split `size` into m n with m <= n, as LyCORIS does: m is `factor` if it divides `size`, else at most `factor`.

    >>> factorize(320), factorize(320, 8), factorize(320, 7)
    ((16, 20), (8, 40), (5, 64))
    """
    if factor > 0 and size % factor == 0:
        return min(factor, size // factor), max(factor, size // factor)
    limit = min(math.isqrt(size), factor if factor > 0 else size)
    m = max(divisor for divisor in range(1, limit + 1) if size % divisor == 0)
    return m, size // m


def _uniform(key: jax.Array, shape: tuple[int, ...], fan_in: int) -> jax.Array:
    bound = 1 / math.sqrt(fan_in)
    return jax.random.uniform(key, shape, minval=-bound, maxval=bound)
