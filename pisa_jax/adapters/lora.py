"""LoRA: low-rank adaptation (Hu et al. 2022), initialized as in PiSA-SR."""

import math

import jax
import jax.numpy as jnp

from pisa_jax.adapters.decomposition import Decomposition, low_rank_output


def lora(alpha: float, *, rank_stabilized: bool = False) -> Decomposition:
    """Return the decomposition dW = (alpha / r) B A.

    For a convolution, A is a k x k kernel (in -> r) and B a 1 x 1 kernel (r -> out). At initialization
    A ~ N(0, 1 / r^2), as in PiSA-SR, and B = 0.

    Args:
        rank_stabilized: rsLoRA, dW = (alpha / sqrt(r)) B A (Kalajdzievski 2023).

    Reference: Hu et al. 2022, equation 3.
    """

    def init(key, kernel, rank):
        *window, c_in, c_out = kernel.shape
        return {
            "a": jax.random.normal(key, (*window, c_in, rank)) / rank,
            "b": jnp.zeros((*[1] * len(window), rank, c_out)),
        }

    def delta(factors, kernel):
        del kernel
        b = factors["b"]
        return scaling(alpha, factors, rank_stabilized) * (factors["a"] @ b.reshape(b.shape[-2:]))

    def apply(factors, call):
        return low_rank_output(call, factors["a"], factors["b"], scaling(alpha, factors, rank_stabilized))

    return Decomposition(init, delta, apply, dropout=True)


def scaling(alpha: float, factors: dict, rank_stabilized: bool = False) -> float:
    """Return alpha / r, or alpha / sqrt(r), for the rank r of the factor a."""
    rank = factors["a"].shape[-1]
    return alpha / (math.sqrt(rank) if rank_stabilized else rank)
