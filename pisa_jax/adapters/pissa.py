"""PiSSA and OLoRA: LoRA that starts from factors of the weights, which are subtracted."""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array

from pisa_jax.adapters.decomposition import Decomposition, from_matrix, low_rank_output, to_matrix


def pissa(alpha: float) -> Decomposition:
    """Return dW = (alpha / r) (B A - B0 A0), where (alpha / r) B0 A0 are the r largest singular components of W.

    Reference: Meng et al. 2024 (PiSSA, arXiv 2404.02948).
    """

    def largest_components(matrix, rank):
        u, s, vt = jnp.linalg.svd(matrix, full_matrices=False)
        root = jnp.sqrt(s[:rank] * (rank / alpha))
        return u[:, :rank] * root, root[:, None] * vt[:rank]

    return _lora_from(largest_components, alpha)


def olora(alpha: float) -> Decomposition:
    """Return dW = (alpha / r) (B A - B0 A0), where A0 and B0 are r columns and rows of the QR decomposition of W.

    PyTorch's W (out, in) = Q R gives B0 = Q[:, :r] and A0 = R[:r].

    Reference: Büyükakyüz 2024 (OLoRA, arXiv 2406.01775).
    """

    def orthonormal_basis(matrix, rank):
        q, r = jnp.linalg.qr(matrix.T)
        return r[:rank].T, q[:, :rank].T

    return _lora_from(orthonormal_basis, alpha)


def _lora_from(start: Callable[[Array, int], tuple[Array, Array]], alpha: float) -> Decomposition:
    """Return LoRA that starts at start(W as a matrix (n, out), r) -> A0 (n, r), B0 (r, out), kept as a0 and b0."""

    def init(key, kernel, rank):
        del key
        *window, c_in, c_out = kernel.shape
        matrix = to_matrix(kernel).astype(jnp.float32)
        if rank > min(matrix.shape):
            raise ValueError(f"rank {rank} is more than the {min(matrix.shape)} components of the weights")
        a, b = start(matrix, rank)
        a = from_matrix(a, (*window, c_in, rank))
        b = b.reshape(*[1] * len(window), rank, c_out)
        return {"a": a, "b": b, "a0": a, "b0": b}

    def stacked(factors):
        """Return A and B of rank 2 r whose product is B A - B0 A0."""
        a = jnp.concatenate([factors["a"], factors["a0"]], axis=-1)
        b = jnp.concatenate([factors["b"], -factors["b0"]], axis=-2)
        return a, b.reshape(b.shape[-2:]) * (2 * alpha / a.shape[-1])

    def delta(factors, kernel):
        del kernel
        a, b = stacked(factors)
        return a @ b

    def apply(factors, call):
        return low_rank_output(call, *stacked(factors))

    return Decomposition(init, delta, apply, needs_kernel="init", constants=("a0", "b0"))
