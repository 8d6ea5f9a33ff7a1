"""DoRA: weight-decomposed low-rank adaptation (Liu et al. 2024)."""

import jax
import jax.numpy as jnp

from pisa_jax.adapters.decomposition import Decomposition, low_rank_output
from pisa_jax.adapters.lora import lora, scaling


def dora(alpha: float, *, rank_stabilized: bool = False) -> Decomposition:
    """Return dW = (|W| + m) V / |V| - W with V = W + (alpha / r) B A; |.| is the norm of each output channel.

    The norm |V| is a constant for the gradient (section 4.3). The factor m is the change of the paper's magnitude, so
    that the start is the base model exactly, in every dtype of W. It has no weight decay. An output whose weights are 0
    keeps them until its magnitude changes.

    Args:
        rank_stabilized: alpha / sqrt(r) instead of alpha / r.

    Reference: Liu et al. 2024, equation 5.
    """
    low_rank = lora(alpha, rank_stabilized=rank_stabilized)

    def init(key, kernel, rank):
        return {**low_rank.init(key, kernel, rank), "m": jnp.zeros(kernel.shape[-1])}

    def gain(factors, norm, adapted_norm):
        """Return (|W| + m) / |V|, the factor of each output channel."""
        safe = jnp.where(adapted_norm > 0, adapted_norm, 1)
        return jnp.where(adapted_norm > 0, (norm + factors["m"]) / safe, 1)

    def delta(factors, kernel):
        kernel = kernel.astype(jnp.float32)
        adapted = kernel + low_rank.delta(factors, kernel)
        return gain(factors, _norm(kernel), jax.lax.stop_gradient(_norm(adapted))) * adapted - kernel

    def apply(factors, call):
        kernel = call.kernel.astype(jnp.float32)
        adapted = kernel + low_rank.delta(jax.lax.stop_gradient(factors), kernel)
        factor = gain(factors, _norm(kernel), _norm(adapted))
        scale = scaling(alpha, factors, rank_stabilized)
        dy = (factor - 1) * call.y0 + factor * low_rank_output(call, factors["a"], factors["b"], scale)
        return dy.astype(call.y0.dtype)

    return Decomposition(init, delta, apply, needs_kernel="delta", no_decay=("m",), dropout=True)


def _norm(kernel: jax.Array) -> jax.Array:
    """Return the norm of the weights of each output channel."""
    return jnp.sqrt(jnp.sum(kernel**2, axis=range(kernel.ndim - 1)))
