"""LoHa: low-rank Hadamard product (Hyeon-Woo et al. 2022)."""

import math

import jax
import jax.numpy as jnp

from pisa_jax.adapters.decomposition import Decomposition


def loha(alpha: float) -> Decomposition:
    """Return the decomposition dW = (alpha / r) (A1 B1) * (A2 B2), an elementwise product of rank up to r^2.

    The window of a convolution counts as input channels. B2 = 0 at initialization.

    Reference: Hyeon-Woo et al. 2022, proposition 1.
    """

    def init(key, kernel, rank):
        *window, c_in, c_out = kernel.shape
        keys = jax.random.split(key, 3)
        fan_in = math.prod(window) * c_in
        return {
            "a1": jax.random.normal(keys[0], (*window, c_in, rank)) / rank,
            "b1": jax.random.normal(keys[1], (rank, c_out)),
            "a2": jax.random.normal(keys[2], (*window, c_in, rank)) / math.sqrt(fan_in),
            "b2": jnp.zeros((rank, c_out)),
        }

    def delta(factors, kernel):
        del kernel
        rank = factors["a1"].shape[-1]
        return (alpha / rank) * (factors["a1"] @ factors["b1"]) * (factors["a2"] @ factors["b2"])

    return Decomposition(init, delta)
