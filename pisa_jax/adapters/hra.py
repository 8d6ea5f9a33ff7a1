"""HRA: Householder reflections of the inputs (Yuan et al. 2024)."""

import jax
import jax.numpy as jnp

from pisa_jax.adapters.decomposition import Decomposition, from_matrix, low_rank_output, to_matrix


def hra(alpha: float, *, orthogonality: float = 0.0) -> Decomposition:
    """Return dW = H_r ... H_1 W - W with the reflections H_j = I - 2 u_j u_j^T / |u_j|^2 of the flattened inputs.

    For normalized columns U = (u_1, ..., u_r), H_r ... H_1 = I - U T U^T, where T^-1 is I / 2 + the strictly lower
    triangle of U^T U: dW has rank r. The u are equal in pairs at initialization, so that the reflections cancel; the
    rank is even. `alpha` has no effect.

    Args:
        orthogonality: weight of the penalty |I - U^T U|^2.

    Reference: Yuan et al. 2024 (arXiv 2405.17484); Schreiber and Van Loan 1989 for the product of reflections.
    """
    del alpha

    def init(key, kernel, rank):
        if rank % 2:
            raise ValueError(f"rank {rank} is odd; reflections start in pairs")
        *window, c_in, _ = kernel.shape
        half = jax.random.normal(key, (*window, c_in, rank // 2))
        return {"u": jnp.repeat(half, 2, axis=-1)}

    def normalized(factors):
        u = factors["u"]
        return u / jnp.sqrt(jnp.sum(u**2, axis=range(u.ndim - 1)))

    def output_matrix(u, kernel):
        """Return -T U^T W, of shape (r, out)."""
        columns, rank = to_matrix(u), u.shape[-1]
        inverse = jnp.eye(rank) / 2 + jnp.tril(columns.T @ columns, -1)
        return -jnp.linalg.solve(inverse, columns.T @ to_matrix(kernel).astype(jnp.float32))

    def delta(factors, kernel):
        u = normalized(factors)
        return from_matrix(to_matrix(u) @ output_matrix(u, kernel), kernel.shape)

    def apply(factors, call):
        u = normalized(factors)
        return low_rank_output(call, u, output_matrix(u, call.kernel))

    def penalty(factors):
        columns = to_matrix(normalized(factors))
        return orthogonality * jnp.sum((jnp.eye(columns.shape[-1]) - columns.T @ columns) ** 2)

    return Decomposition(init, delta, apply, needs_kernel="delta", penalty=penalty if orthogonality else None)
