"""A decomposition of one's own: a factor for each output channel, dW = W diag(s).

    python train.py debug --out gains --stages.1.spec.decomposition output_gain:output_gain
    python infer.py -i PHOTO --model gains/model --adapters gains/adapters.safetensors --min-size 64 \
        --decomposition output_gain:output_gain

Both commands run in the folder of this file, or with this folder in PYTHONPATH.

Reference: Liu et al. 2022 ((IA)^3, arXiv 2205.05638), for the output of every layer.
"""

import jax.numpy as jnp

from pisa_jax.adapters.decomposition import Decomposition


def output_gain(alpha: float, *, start: float = 0.0) -> Decomposition:
    """Return dW = W diag(s), with s = `start` at initialization; `alpha` and the rank have no effect."""
    del alpha

    def init(key, kernel, rank):
        del key, rank
        return {"s": jnp.full(kernel.shape[-1], start)}

    def delta(factors, kernel):
        return kernel * factors["s"]

    def apply(factors, call):
        return call.y0 * factors["s"].astype(call.y0.dtype)

    return Decomposition(init, delta, apply, needs_kernel="delta")
