"""Dense and Conv layers of `flax.linen` as functions of input and kernel."""

import itertools
import math
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pisa_jax.adapters.decomposition import LinearMap
from pisa_jax.runtime.compilation import target_platform


def linear_map(module: nn.Dense | nn.Conv) -> LinearMap:
    """Return the layer, without its bias, as a function of its input and kernel; it computes in the layer's dtype.

    Strides, padding, dilation and groups are those of the layer.

    Raises:
        ValueError: a convolution that is not two-dimensional, or with circular, reflecting or causal padding or a mask.
    """
    if isinstance(module, nn.Dense):
        return lambda x, kernel: jnp.matmul(*_promoted(module, x, kernel))
    axes = len(module.kernel_size) if isinstance(module.kernel_size, Sequence) else 1
    padding = nn.linear.canonicalize_padding(module.padding, axes)
    known = not isinstance(padding, str) or padding in ("SAME", "SAME_LOWER", "VALID")
    if not known or module.mask is not None or axes != 2:
        raise ValueError(
            f"layer {'/'.join(module.path)}: adapters support two-dimensional convolutions with padding SAME, VALID or "
            f"by numbers and without mask, not kernel_size {module.kernel_size}, padding {module.padding!r}; exclude "
            "it from targets"
        )
    strides, dilations = _pair(module.strides), (_pair(module.input_dilation), _pair(module.kernel_dilation))
    plain = strides == (1, 1) and dilations == ((1, 1), (1, 1)) and not has_groups(module)
    by_taps = plain and target_platform() == "cpu"

    def conv(x, kernel):
        batch = x.shape[:-3]
        x, kernel = _promoted(module, x.reshape(-1, *x.shape[-3:]), kernel)
        few = math.prod(kernel.shape[:2]) * kernel.shape[-1] <= kernel.shape[2]
        if by_taps and few and not isinstance(padding, str):
            y = conv_to_few_outputs(x, kernel, padding)
        else:
            y = jax.lax.conv_general_dilated(
                x,
                kernel,
                strides,
                padding,
                lhs_dilation=dilations[0],
                rhs_dilation=dilations[1],
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
                feature_group_count=module.feature_group_count,
            )
        return y.reshape(*batch, *y.shape[1:])

    return conv


def conv_to_few_outputs(
    x: Float[Array, "b h w c"], kernel: Float[Array, "kh kw c r"], padding: Sequence[tuple[int, int]]
) -> Float[Array, "b h2 w2 r"]:
    """Compute a convolution with stride 1 as one product for all taps, and the sum of its shifted parts.

    With kh kw r <= c, the parts are no larger than x. On a CPU, the gradient in the kernel takes a tenth of the time
    that XLA's convolution with a window of the size of the image takes.
    """
    rows, columns, inputs, outputs = kernel.shape
    flat = kernel.transpose(2, 0, 1, 3).reshape(inputs, -1)
    products = jnp.matmul(x, flat, preferred_element_type=jnp.float32)
    parts = products.reshape(*x.shape[:3], rows, columns, outputs)

    def shifted(row, column):
        (top, bottom), (left, right) = padding
        edges = ((top - row, bottom - (rows - 1 - row), 0), (left - column, right - (columns - 1 - column), 0))
        return jax.lax.pad(parts[:, :, :, row, column], jnp.float32(0), ((0, 0, 0), *edges, (0, 0, 0)))

    return sum(itertools.starmap(shifted, itertools.product(range(rows), range(columns)))).astype(x.dtype)


def has_groups(module: nn.Dense | nn.Conv) -> bool:
    """Return True for a convolution whose outputs see only a group of the inputs."""
    return isinstance(module, nn.Conv) and module.feature_group_count > 1


def _pair(value: int | Sequence[int] | None) -> tuple[int, ...]:
    return tuple(value) if isinstance(value, Sequence) else (value or 1,) * 2


def _promoted(module: nn.Dense | nn.Conv, x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = (array for array in module.promote_dtype(x, kernel, dtype=module.dtype) if array is not None)
    return x, kernel
