"""Full weight differences: the upper bound of what a decomposition of the same layers can do."""

import jax.numpy as jnp

from pisa_jax.adapters.decomposition import Decomposition


def full(alpha: float) -> Decomposition:
    """Return dW itself as the only factor; `alpha` and the rank have no effect."""
    del alpha

    def init(key, kernel, rank):
        del key, rank
        return {"w": jnp.zeros(kernel.shape)}

    def delta(factors, kernel):
        del kernel
        return factors["w"]

    def apply(factors, call):
        return call.linear(call.x, factors["w"])

    return Decomposition(init, delta, apply)
