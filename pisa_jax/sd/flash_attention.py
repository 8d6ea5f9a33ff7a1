"""Attention on TPUs: JAX's Pallas kernel, which keeps the scores in the memory of the core, forward and backward."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import flash_attention as kernel
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

# Lengths are divided into the largest of these blocks of positions. The smallest is a row of the TPU's registers.
BLOCKS = (512, 256, 128)
# Wider heads, such as the VAE's single one of 512 channels, use shorter blocks, so that a step fits into 16 MiB.
WIDE_HEAD, WIDE_BLOCK = 128, 256


def is_supported(queries: int, keys: int, channels: int) -> bool:
    """Return True if the kernel computes attention of these lengths and channels per head."""
    return queries % BLOCKS[-1] == keys % BLOCKS[-1] == 0 and (channels <= WIDE_HEAD or channels % WIDE_HEAD == 0)


def flash_attention(
    query: Float[Array, "b n h d"],
    key: Float[Array, "b m h d"],
    value: Float[Array, "b m h d"],
    lengths: Int[Array, " b"] | None = None,
) -> Float[Array, "b n h d"]:
    """Compute softmax(q k^T / sqrt(d)) v in blocks, of each sample over its first `lengths` keys or over all.

    Every device of the current mesh computes its part of the batch.

    Reference: Dao et al., "FlashAttention", 2022, algorithm 1.
    """
    mesh = jax.sharding.get_abstract_mesh()
    arrays = (query, key, value) if lengths is None else (query, key, value, lengths)
    if mesh.empty or mesh.size == 1:
        return _on_device(*arrays)
    # XLA cannot partition a kernel. A batch that cannot be divided is computed by every device.
    spec = P(mesh.axis_names) if len(query) % mesh.size == 0 else P()
    return jax.shard_map(_on_device, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)(*arrays)


def _on_device(query, key, value, lengths=None):
    segments = None if lengths is None else _segments(lengths, query.shape[1], key.shape[1])
    heads_first = (array.swapaxes(1, 2) for array in (query, key, value))
    sizes = _block_sizes(query.shape[1], key.shape[1], query.shape[-1])
    out = kernel.flash_attention(
        *heads_first, segment_ids=segments, sm_scale=query.shape[-1] ** -0.5, block_sizes=sizes
    )
    return out.swapaxes(1, 2)


def _segments(lengths, queries, keys) -> kernel.SegmentIds:
    """Put all queries and the first `lengths` keys into segment 1: a query attends to the keys of its segment."""
    return kernel.SegmentIds(
        jnp.ones((len(lengths), queries), jnp.int32), (jnp.arange(keys) < lengths[:, None]).astype(jnp.int32)
    )


@functools.cache
def _block_sizes(queries: int, keys: int, channels: int) -> kernel.BlockSizes:
    longest = WIDE_BLOCK if channels > WIDE_HEAD else BLOCKS[0]
    q, k = (next(block for block in BLOCKS if block <= longest and length % block == 0) for length in (queries, keys))
    forward = {"block_q": q, "block_k_major": k, "block_k": k, "block_b": 1}
    keys_values = {"block_q_major_dkv": q, "block_k_major_dkv": k, "block_k_dkv": k, "block_q_dkv": q}
    return kernel.BlockSizes(**forward, **keys_values, block_k_major_dq=k, block_k_dq=k, block_q_dq=q)
