"""OFT: orthogonal fine-tuning of the output channels (Qiu et al. 2023), as LyCORIS, kohya and ComfyUI apply it."""

import jax
import jax.numpy as jnp

from pisa_jax.adapters.decomposition import Decomposition


def oft(alpha: float) -> Decomposition:
    """Return dW = W (R - I): R rotates blocks of output channels.

    R = (I + Q) (I - Q)^-1 with Q = X - X^T, for each block (Cayley transform). The rank is the largest size of a block:
    its size is the largest divisor of the number of outputs up to the rank. `alpha` has no effect. X = 0 at
    initialization.

    Reference: Qiu et al. 2023 (arXiv 2306.07280).
    """
    del alpha

    def init(key, kernel, rank):
        del key
        c_out = kernel.shape[-1]
        size = max(size for size in range(1, rank + 1) if c_out % size == 0)
        if size == 1:
            raise ValueError(f"{c_out} outputs have no blocks of 2 to {rank} channels; the rank is the largest size")
        return {"x": jnp.zeros((c_out // size, size, size))}

    def rotated(factors, outputs):
        """Return outputs (R - I), for outputs of shape (..., out)."""
        q = factors["x"] - factors["x"].swapaxes(1, 2)
        change = 2 * q @ inverse(jnp.eye(q.shape[-1]) - q)  # R - I, exactly 0 where Q is 0
        blocks = outputs.reshape(*outputs.shape[:-1], *q.shape[:2])
        return jnp.einsum("...kn,knm->...km", blocks, change.astype(outputs.dtype)).reshape(outputs.shape)

    def delta(factors, kernel):
        return rotated(factors, kernel.astype(jnp.float32))

    def apply(factors, call):
        return rotated(factors, call.y0)

    return Decomposition(init, delta, apply, needs_kernel="delta")


@jax.custom_jvp
def inverse(matrices: jax.Array) -> jax.Array:
    """Invert matrices (..., n, n) whose symmetric part is positive definite, as I - Q is; needs no pivots.

    Not `jnp.linalg.inv`: on CPUs, jaxlib 0.10 calls LAPACK from the threads that LAPACK's batches wait for, and a
    program with many independent inversions, such as a training step, stops forever on two cores.
    """
    size = matrices.shape[-1]
    identity = jnp.broadcast_to(jnp.eye(size, dtype=matrices.dtype), matrices.shape)

    def eliminate(k, both):
        row = both[..., k, :] / both[..., k, k, None]
        column = both[..., :, k].at[..., k].add(-1)  # so that the row of the pivot becomes `row`
        return both - column[..., :, None] * row[..., None, :]

    both = jax.lax.fori_loop(0, size, eliminate, jnp.concatenate([matrices, identity], axis=-1))
    return both[..., size:]


@inverse.defjvp
def _derivative(primals, tangents):
    result = inverse(*primals)
    return result, -result @ tangents[0] @ result
