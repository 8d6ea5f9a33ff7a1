"""A digest that identifies the weights of a model, in whatever precision they are stored."""

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from pisa_jax.runtime.trees import flatten


def weights_digest(params: Mapping[str, Any]) -> str:
    """Return 16 hexadecimal digits for a tree of weights: the SHA-256 of its paths, shapes and the signs of samples.

    Rounding to float16 or bfloat16 keeps every sign, so the copies of a model in different precisions have one digest.
    Training moves values near 0 across it: a relative change of 1e-4 changes hundreds of signs in Stable Diffusion 2.1.
    Of every weight with several axes, one output (or row of a table) is read, so that files that are mapped into
    memory are not read completely.
    """
    digest = hashlib.sha256()
    for path, leaf in sorted(flatten(params).items()):
        signs = np.signbit(np.asarray(_sample(path, leaf), np.float32))
        digest.update(f"{path} {tuple(leaf.shape)}".encode() + np.packbits(signs).tobytes())
    return digest.hexdigest()[:16]


def _sample(path: str, leaf: Any) -> Any:
    """Return a part of a weight that is contiguous in the files of PyTorch, in which outputs are the first axis."""
    if leaf.ndim < 2:
        return leaf
    return leaf[..., leaf.shape[-1] // 2] if path.endswith("kernel") else leaf[len(leaf) // 2]
