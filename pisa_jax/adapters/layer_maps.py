"""Dense and Conv layers of `flax.linen` as functions of input and kernel."""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from pisa_jax.adapters.decomposition import LinearMap


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

    def conv(x, kernel):
        batch = x.shape[:-3]
        x, kernel = _promoted(module, x.reshape(-1, *x.shape[-3:]), kernel)
        y = jax.lax.conv_general_dilated(
            x,
            kernel,
            _pair(module.strides),
            padding,
            lhs_dilation=_pair(module.input_dilation),
            rhs_dilation=_pair(module.kernel_dilation),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=module.feature_group_count,
        )
        return y.reshape(*batch, *y.shape[1:])

    return conv


def has_groups(module: nn.Dense | nn.Conv) -> bool:
    """Return True for a convolution whose outputs see only a group of the inputs."""
    return isinstance(module, nn.Conv) and module.feature_group_count > 1


def _pair(value: int | Sequence[int] | None) -> tuple[int, ...]:
    return tuple(value) if isinstance(value, Sequence) else (value or 1,) * 2


def _promoted(module: nn.Dense | nn.Conv, x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = (array for array in module.promote_dtype(x, kernel, dtype=module.dtype) if array is not None)
    return x, kernel
