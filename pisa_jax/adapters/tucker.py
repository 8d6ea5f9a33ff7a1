"""LoRA with Tucker-factorized convolutions (LyCORIS: `use_tucker`)."""

import math

import jax
import jax.numpy as jnp

from pisa_jax.adapters.decomposition import Decomposition, low_rank_output
from pisa_jax.adapters.lora import lora, scaling


def tucker(alpha: float) -> Decomposition:
    """Return dW[h, w] = (alpha / r) A T[h, w] B: 1 x 1 from in to r, k x k from r to r, 1 x 1 from r to out.

    Layers without a window (Dense, 1 x 1) are LoRA. At initialization A is that of LoRA, T is uniform with the bound
    1 / sqrt(k k r), and B = 0.

    Reference: Yeh et al. 2024 (LyCORIS, arXiv 2309.14859); Hyeon-Woo et al. 2022, proposition 3, for the core T.
    """
    plain = lora(alpha)

    def init(key, kernel, rank):
        *window, c_in, c_out = kernel.shape
        if math.prod(window) == 1:
            return plain.init(key, kernel, rank)
        bound = 1 / math.sqrt(math.prod(window) * rank)
        keys = jax.random.split(key)
        return {
            "a": jax.random.normal(keys[0], (1, 1, c_in, rank)) / rank,
            "t": jax.random.uniform(keys[1], (*window, rank, rank), minval=-bound, maxval=bound),
            "b": jnp.zeros((1, 1, rank, c_out)),
        }

    def delta(factors, kernel):
        if "t" not in factors:
            return plain.delta(factors, kernel)
        return scaling(alpha, factors) * (factors["a"] @ factors["t"] @ factors["b"])

    def apply(factors, call):
        scale = scaling(alpha, factors)
        if "t" not in factors:
            return low_rank_output(call, factors["a"], factors["b"], scale)
        inner = call.x @ factors["a"][0, 0].astype(call.x.dtype)
        return low_rank_output(call._replace(x=inner), factors["t"], factors["b"], scale)

    return Decomposition(init, delta, apply, dropout=True)
