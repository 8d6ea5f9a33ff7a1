"""Gradients of `sem` orthogonal to the outputs that `pix` changes, as in FreqOrtho-SR (Hoang et al., ECCV 2026).

    python train.py debug --out orthogonal --stages.1.optimizer orthogonal_gradients:orthogonal_gradients
    python infer.py -i PHOTO --model orthogonal/model --adapters orthogonal/adapters.safetensors --min-size 64 \
        --scales 1,0.5

The first command runs in the folder of this file, or with this folder in PYTHONPATH. The adapters are plain LoRA.

What is taken from FreqOrtho-SR (code of 2026-06): in every layer, U are the left singular vectors of B A of `pix` that
hold 95 % of its energy, and the gradient of B of `sem` becomes (I - U U^T) grad. A is not projected: it does not change
the space of the outputs. The gradient is projected, not the update: Adam divides each element by its own second moment,
so what is learned is orthogonal to `pix` only in part. `optax.chain(default, project(...))` would project the update.
What is not taken: the mixture of experts of its pixel stage (lora_experts.py has a mixture). Where `pix` is 0, nothing
is projected; there the original projects one arbitrary direction.
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import optax

ENERGY = 0.95


def orthogonal_gradients(
    default: optax.GradientTransformation, below: Mapping[str, Any]
) -> optax.GradientTransformation:
    """Project gradients, then clip and update them as `default` does; `below` are the frozen adapters by name."""
    return optax.chain(project(below["pix"]), default)


def project(tree: Mapping[str, Any]) -> optax.GradientTransformation:
    """Return the map of gradients g of B (r, out) to g - g U U^T, for the layers of a LoRA `tree`.

    The state holds U, so that it is computed once and saved in checkpoints.

    Raises:
        ValueError: the factors are not those of LoRA.
    """
    if any(set(factors) != {"a", "b"} for factors in tree.values()):
        raise ValueError("gradients can be made orthogonal to LoRA only; set the decomposition of pix to lora")

    def init(params):
        return {path: output_basis(**tree[path]) for path in params if path in tree}

    def update(grads, bases, params=None):
        del params
        projected = {path: grads[path] | {"b": remove(grads[path]["b"], u)} for path, u in bases.items()}
        return grads | projected, bases

    return optax.GradientTransformation(init, update)


def output_basis(a: Any, b: Any) -> Any:
    """Return U (out, r): the left singular vectors of B A that hold ENERGY of it, and zeros for the others."""
    _, triangle = jnp.linalg.qr(a.reshape(-1, a.shape[-1]))  # A = Q R: A B and R B have the same singular vectors
    _, values, u = jnp.linalg.svd(triangle @ b.reshape(b.shape[-2:]), full_matrices=False)
    energy = jnp.cumsum(values**2)
    return u.T * (energy - values**2 < ENERGY * energy[-1])


def remove(gradient: Any, u: Any) -> Any:
    """Return g - g U U^T for g (..., r, out)."""
    return gradient - (gradient @ u) @ u.T
