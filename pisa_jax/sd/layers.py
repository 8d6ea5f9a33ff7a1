"""Array operations whose plain formulation is slow or inexact: GroupNorm, attention, convolution, upsampling.

Arrays are NHWC, or (batch, position, head, channel) for attention. Results equal those of the plain formulation up to
rounding.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pisa_jax.runtime.compilation import target_platform
from pisa_jax.sd import flash_attention

# Queries per step on a CPU. A map over heads and chunks of 256 queries keeps the scores in the cache: 87 GFLOP/s on 2
# cores, against 21-29 for one batched product. With fewer positions than that, one product is faster.
QUERY_CHUNK = 256
# Scores of one head that an accelerator without a kernel stores: those of 64 x 64 latents.
MOST_SCORES = 4096**2


def group_norm(
    x: Float[Array, "b *space c"],
    scale: Float[Array, " c"],
    bias: Float[Array, " c"],
    groups: int,
    epsilon: float,
    mean_of: Callable[[Float[Array, "b *space c"]], Float[Array, "b c"]] | None = None,
) -> Float[Array, "b *space c"]:
    """Apply GroupNorm: y = (x - mean_g) / sqrt(var_g + epsilon) * scale + bias.

    Statistics are computed in float32 per channel and combined per group; y is one multiplication and one addition. The
    variance is computed around the mean in a second pass, because E[x^2] - E[x]^2 loses all digits for a large mean.
    `mean_of` computes the mean of each channel; the default is over all positions.

    Reference: Wu and He 2018, equations 1 and 2.
    """
    space = tuple(range(1, x.ndim - 1))
    wide = x.astype(jnp.float32)

    def over_group(per_channel):
        grouped = per_channel.reshape(per_channel.shape[0], groups, -1).mean(axis=-1, keepdims=True)
        spread = jnp.broadcast_to(grouped, (*grouped.shape[:2], x.shape[-1] // groups))
        return spread.reshape(per_channel.shape[0], *[1] * len(space), x.shape[-1])

    def spatial_mean(array):
        return mean_of(array) if mean_of else array.mean(axis=space)

    mean = over_group(spatial_mean(wide))
    variance = over_group(spatial_mean(jnp.square(wide - mean)))
    gain = jax.lax.rsqrt(variance + epsilon) * scale.astype(jnp.float32)
    return (wide * gain + (bias.astype(jnp.float32) - mean * gain)).astype(x.dtype)


def attention(
    query: Float[Array, "b n h d"],
    key: Float[Array, "b m h d"],
    value: Float[Array, "b m h d"],
    lengths: Int[Array, " b"] | None = None,
) -> Float[Array, "b n h d"]:
    """Compute softmax(q k^T / sqrt(d)) v, of each sample over its first `lengths` keys or over all.

    With more than QUERY_CHUNK queries and keys, the score matrix is not stored where that can be avoided: TPUs use a
    kernel (`flash_attention`), GPUs cuDNN where `cudnn_attention_compiles`, and CPUs compute it in chunks, as the
    others do without a kernel if a head has more than MOST_SCORES.

    Reference: Vaswani et al. 2017, equation 1.
    """
    if min(query.shape[1], key.shape[1]) <= QUERY_CHUNK:
        return jax.nn.dot_product_attention(query, key, value, key_value_seq_lengths=lengths)
    platform, scores = target_platform(), query.shape[1] * key.shape[1]
    if platform == "tpu" and flash_attention.is_supported(query.shape[1], key.shape[1], query.shape[-1]):
        return flash_attention.flash_attention(query, key, value, lengths)
    even = query.shape[1] % 2 == key.shape[1] % 2 == 0  # cuDNN has no gradient for odd lengths
    kernel = "cudnn" if even and cudnn_attention_compiles(query.dtype, query.shape[-1]) else None
    if kernel is None and (platform == "cpu" or scores > MOST_SCORES):
        return _chunked_attention(query, key, value, lengths)
    return jax.nn.dot_product_attention(query, key, value, key_value_seq_lengths=lengths, implementation=kernel)


@functools.cache
def cudnn_attention_compiles(dtype: Any, channels: int) -> bool:
    """Return True if cuDNN compiles attention and its gradient: not for float32, large heads, or GPUs before Ampere."""
    if target_platform() != "gpu":
        return False
    heads = jax.ShapeDtypeStruct((1, 64, 1, channels), dtype)

    def loss(*heads):
        return jax.nn.dot_product_attention(*heads, implementation="cudnn").sum()

    try:
        jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(heads, heads, heads).compile()
    except Exception:  # RuntimeError, NotImplementedError or XlaRuntimeError, depending on what is missing
        return False
    return True


def _key_limits(length: Int[Array, ""], count: int) -> Float[Array, " m"]:
    """Return upper bounds of the scores of `count` keys: infinity for the first `length`, -infinity for the others.

    The barrier keeps XLA from fusing the comparison into the computation of every score, which is slower.
    """
    return jax.lax.optimization_barrier(jnp.where(jnp.arange(count) < length, jnp.inf, -jnp.inf))


def _chunked_attention(query, key, value, lengths=None):
    positions, heads, channels = query.shape[1:]
    chunks = -(-positions // QUERY_CHUNK)

    @jax.checkpoint  # the gradient recomputes the scores of a chunk instead of keeping those of all chunks
    def of_chunk(queries, keys, values, limit):
        scores = jnp.matmul(queries, keys.T, preferred_element_type=jnp.float32) * channels**-0.5
        if limit is not None:
            scores = jnp.minimum(scores, limit)
        weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(-1, keepdims=True)))
        # Divided after the product: a division of every score takes longer.
        out = jnp.matmul(weights.astype(values.dtype), values, preferred_element_type=jnp.float32)
        return (out / weights.sum(-1, keepdims=True)).astype(values.dtype)

    def of_head(limit, arrays):
        queries, keys, values = arrays
        return jax.lax.map(lambda chunk: of_chunk(chunk, keys, values, limit), queries)

    def of_sample(query, key, value, length):
        padded = jnp.pad(query, ((0, chunks * QUERY_CHUNK - positions), (0, 0), (0, 0)))
        queries = padded.reshape(chunks, QUERY_CHUNK, heads, channels).transpose(2, 0, 1, 3)
        limit = None if length is None else _key_limits(length, len(key))
        out = jax.lax.map(functools.partial(of_head, limit), (queries, key.swapaxes(0, 1), value.swapaxes(0, 1)))
        return out.reshape(heads, -1, channels)[:, :positions].swapaxes(0, 1)

    return jax.vmap(of_sample)(query, key, value, lengths)  # not lax.map: the batch may be sharded over devices


# Keys per step of `attention_over_first_keys`: the 4 MB of scores fit a CPU's cache and are enough work for a GPU.
KEY_CHUNK = 4096


def attention_over_first_keys(
    query: Float[Array, "n h d"], key: Float[Array, "m h d"], value: Float[Array, "m h d"], count: Int[Array, ""]
) -> Float[Array, "n h d"]:
    """Compute softmax(q k^T / sqrt(d)) v over the first `count` of m keys, in chunks with a running maximum.

    `count` is traced: the run time depends on it, the compiled code does not.

    Reference: Milakov and Gimelshein 2018, algorithm 3.
    """
    positions, heads, channels = query.shape
    step = min(KEY_CHUNK, key.shape[0])
    key, value = (jnp.pad(array, ((0, -len(array) % step), (0, 0), (0, 0))) for array in (key, value))

    def of_chunk(queries):
        def add_chunk(index, carry):
            top, total, out = carry
            keys, values = (jax.lax.dynamic_slice_in_dim(array, index * step, step) for array in (key, value))
            scores = jnp.einsum("nhd,mhd->hnm", queries, keys, preferred_element_type=jnp.float32) * channels**-0.5
            scores = jnp.where(index * step + jnp.arange(step) < count, scores, -jnp.inf)
            new_top = jnp.maximum(top, scores.max(-1))
            weights, decay = jnp.exp(scores - new_top[..., None]), jnp.exp(top - new_top)
            added = jnp.einsum("hnm,mhd->hnd", weights.astype(values.dtype), values)
            return new_top, total * decay + weights.sum(-1), out * decay[..., None] + added

        shape = (heads, QUERY_CHUNK)
        start = jnp.full(shape, -jnp.inf), jnp.zeros(shape), jnp.zeros((*shape, channels))
        _, total, out = jax.lax.fori_loop(0, -(-count // step), add_chunk, start)
        return (out / total[..., None]).swapaxes(0, 1).astype(value.dtype)

    chunks = jnp.pad(query, ((0, -positions % QUERY_CHUNK), (0, 0), (0, 0))).reshape(-1, QUERY_CHUNK, heads, channels)
    return jax.lax.map(of_chunk, chunks).reshape(-1, heads, channels)[:positions]


# `_input_gradient` is faster on a CPU if the kernel has at least this many outputs for each position.
OUTPUTS_PER_POSITION = 4


def conv(
    x: Float[Array, "b h w c"],
    kernel: Float[Array, "kh kw c o"],
    strides: Sequence[int],
    padding: Any,
    **options: Any,
) -> Float[Array, "b h2 w2 o"]:
    """Compute `jax.lax.conv_general_dilated`, whose arguments it takes, with a faster gradient of small arrays on CPUs.

    For the gradient in its input, XLA transposes the kernel, although the weights are frozen. For the innermost blocks
    of a UNet this takes longer than the convolution.
    """
    positions, plain = x.shape[0] * x.shape[1] * x.shape[2], _is_plain(strides, padding, options)
    if target_platform() == "cpu" and plain and OUTPUTS_PER_POSITION * positions <= kernel.shape[-1]:
        return _conv_of_few_positions(x, kernel, tuple(map(tuple, padding)))
    return jax.lax.conv_general_dilated(x, kernel, strides, padding, **options)


def _is_plain(strides, padding, options):
    dilated = any(set(options.get(name) or (1,)) != {1} for name in ("lhs_dilation", "rhs_dilation"))
    return set(strides) == {1} and not isinstance(padding, str) and not dilated and options["feature_group_count"] == 1


def _plain_conv(x, kernel, padding):
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _conv_of_few_positions(x, kernel, padding):
    return _plain_conv(x, kernel, padding)


def _conv_forward(x, kernel, padding):
    return _plain_conv(x, kernel, padding), (x, kernel)


def _conv_backward(padding, kept, output_gradient):
    x, kernel = kept
    _, kernel_gradient = jax.vjp(lambda kernel: _plain_conv(x, kernel, padding), kernel)
    return _input_gradient(output_gradient, kernel, padding, x), *kernel_gradient(output_gradient)


def _input_gradient(output_gradient, kernel, padding, x):
    """Compute sum_uv shift_uv(g K_uv^T): one product for all taps, then the sum of its shifted parts."""
    batch, height, width, outputs = output_gradient.shape
    products = jax.lax.dot_general(
        output_gradient.reshape(-1, outputs),
        kernel.reshape(-1, outputs),
        (((1,), (1,)), ((), ())),
        preferred_element_type=jnp.float32,
    ).reshape(batch, height, width, *kernel.shape[:3])

    def shifted(row, column):
        top, left = row - padding[0][0], column - padding[1][0]
        edges = ((top, x.shape[1] - height - top, 0), (left, x.shape[2] - width - left, 0))
        return jax.lax.pad(products[:, :, :, row, column], jnp.float32(0), ((0, 0, 0), *edges, (0, 0, 0)))

    taps = itertools.product(range(kernel.shape[0]), range(kernel.shape[1]))
    return sum(itertools.starmap(shifted, taps)).astype(x.dtype)


_conv_of_few_positions.defvjp(_conv_forward, _conv_backward)


def upsample_nearest(x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
    """Upsample by 2 with nearest-neighbor interpolation."""
    return jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)


def upsample_conv(
    x: Float[Array, "b h w c"], kernel: Float[Array, "3 3 c o"], bias: Float[Array, " o"]
) -> Float[Array, "b h2 w2 o"]:
    """Compute conv3x3(upsample_nearest(x)) as four 2x2 convolutions on x, one per output phase: 4/9 of the products.

    An even output row depends on the input rows (i - 1, i, i), an odd one on (i, i, i + 1), so two of the three taps
    can be added beforehand. The same holds for columns.
    """
    rows = (((1, 0), (kernel[0], kernel[1] + kernel[2])), ((0, 1), (kernel[0] + kernel[1], kernel[2])))
    phases = []
    for row_pad, row_taps in rows:
        taps = jnp.stack(row_taps)
        columns = (
            ((1, 0), (taps[:, 0], taps[:, 1] + taps[:, 2])),
            ((0, 1), (taps[:, 0] + taps[:, 1], taps[:, 2])),
        )
        for column_pad, column_taps in columns:
            small = jnp.stack(column_taps, axis=1)
            phases.append(
                jax.lax.conv_general_dilated(
                    x, small, (1, 1), (row_pad, column_pad), dimension_numbers=("NHWC", "HWIO", "NHWC")
                )
            )
    batch, height, width, out = phases[0].shape
    even_odd = jnp.stack(phases, axis=3).reshape(batch, height, width, 2, 2, out)
    return even_odd.transpose(0, 1, 3, 2, 4, 5).reshape(batch, 2 * height, 2 * width, out) + bias
