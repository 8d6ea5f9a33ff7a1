"""LoRA: low-rank adaptation (Hu et al. 2022), initialized as in PiSA-SR."""

import jax
import jax.numpy as jnp

from pisa_jax.adapters.decomposition import Decomposition


def lora(alpha: float) -> Decomposition:
    """Return the decomposition dW = (alpha / r) B A.

    For a convolution, A is a k x k kernel (in -> r) and B a 1 x 1 kernel (r -> out). At initialization
    A ~ N(0, 1 / r^2), as in PiSA-SR, and B = 0.

    Reference: Hu et al. 2022, equation 3.
    """

    def init(key, kernel_shape, rank):
        *window, c_in, c_out = kernel_shape
        return {
            "a": jax.random.normal(key, (*window, c_in, rank)) / rank,
            "b": jnp.zeros((*[1] * len(window), rank, c_out)),
        }

    def delta(factors):
        a, b = factors["a"], factors["b"]
        return (alpha / a.shape[-1]) * (a @ b.reshape(b.shape[-2:]))

    def apply(factors, x, linear):
        a, b = factors["a"], factors["b"]
        inner = linear(x, a)  # in the layer's dtype, which may differ from that of x
        return inner @ ((alpha / a.shape[-1]) * b.reshape(b.shape[-2:])).astype(inner.dtype)

    return Decomposition(init, delta, apply)
