"""HiRA: Hadamard high-rank adaptation (Huang et al. 2025)."""

import jax.numpy as jnp

from pisa_jax.adapters.decomposition import Decomposition
from pisa_jax.adapters.lora import lora


def hira(alpha: float) -> Decomposition:
    """Return dW = W * (alpha / r) B A, an elementwise product whose rank is not limited by r.

    Reference: Huang et al. 2025 (HiRA, ICLR).
    """
    low_rank = lora(alpha)

    def delta(factors, kernel):
        return kernel.astype(jnp.float32) * low_rank.delta(factors, kernel)

    return Decomposition(low_rank.init, delta, needs_kernel="delta", dropout=True)
