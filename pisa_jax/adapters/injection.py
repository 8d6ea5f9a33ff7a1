"""Adapters in a model: select layers, create a new adapter, merge adapters into weights, or apply them on the fly."""

import functools
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pisa_jax.adapters.adapter_tree import AdapterTree, Factors
from pisa_jax.adapters.decomposition import Decomposition, LinearMap
from pisa_jax.adapters.registry import get_decomposition
from pisa_jax.config import AdapterSpec
from pisa_jax.runtime.trees import flatten, select, unflatten


def target_shapes(params: Mapping[str, Any], targets: str) -> dict[str, tuple[int, ...]]:
    """Return module path -> kernel shape of the Dense and Conv layers whose path matches the pattern `targets`.

    The leaves of `params` are arrays or `jax.ShapeDtypeStruct`.
    """
    kernels = {path.removesuffix("/kernel"): leaf.shape for path, leaf in flatten(params).items() if "/kernel" in path}
    return {path: tuple(kernels[path]) for path in select(kernels, targets)}


def init_adapter(key: Array, params: Mapping[str, Any], spec: AdapterSpec) -> AdapterTree:
    """Create an adapter with dW = 0 for the layers of `params` that `spec` targets.

    Each layer folds a hash of its path into `key`: layers of equal shape get different factors, and the factors of a
    layer do not depend on which other layers are adapted.
    """
    functions = get_decomposition(spec)
    return {
        path: functions.init(jax.random.fold_in(key, zlib.crc32(path.encode())), shape, spec.rank)
        for path, shape in target_shapes(params, spec.targets).items()
    }


def merge(
    params: Mapping[str, Any],
    adapters: Mapping[str, AdapterTree],
    specs: Mapping[str, AdapterSpec],
    scales: Mapping[str, Any],
    donate: bool = False,
) -> dict[str, Any]:
    """Return `params` with W + sum_i scales[i] dW_i in every adapted kernel.

    The sum is computed in float32 and cast to the dtype of the kernel. With `donate`, the buffers of the given kernels
    are donated, so that no two copies of them exist at the same time.
    """
    flat = flatten(params)
    for name, tree in adapters.items():
        for path, factors in tree.items():
            flat[f"{path}/kernel"] = _adder(specs[name], donate)(flat[f"{path}/kernel"], factors, scales[name])
    return unflatten(flat)


@functools.cache
def _adder(spec: AdapterSpec, donate: bool) -> Callable[[Array, Factors, Any], Array]:
    """Return the jitted function (W, factors, scale) -> W + scale dW; it compiles once per shape of kernel."""
    functions = get_decomposition(spec)

    def add(kernel, factors, scale):
        delta = scale * functions.delta(factors).astype(jnp.float32)
        return (kernel.astype(jnp.float32) + delta).astype(kernel.dtype)

    return jax.jit(add, donate_argnums=0 if donate else ())


def interceptor(
    adapters: Mapping[str, AdapterTree],
    specs: Mapping[str, AdapterSpec],
    scales: Mapping[str, Float[Array, ""] | Float[Array, " b"]],
) -> Callable:
    """Return an interceptor for `nn.intercept_methods` that adds sum_i scales[i] dW_i x to every adapted layer.

    The weights are not changed. A scale is one number for the batch or one per sample: with (0, 1), only the second
    half of a batch of two is adapted. Scales may be traced.
    """
    functions = {name: get_decomposition(specs[name]) for name in adapters}

    def intercept(next_fun, args, kwargs, context):
        y = next_fun(*args, **kwargs)
        module = context.module
        if context.method_name != "__call__" or not isinstance(module, nn.Dense | nn.Conv):
            return y
        path = "/".join(module.path)
        for name, tree in adapters.items():
            if path in tree:
                scale = jnp.asarray(scales[name], y.dtype)
                scale = scale.reshape(-1, *[1] * (y.ndim - 1)) if scale.ndim else scale
                y = y + scale * _difference(functions[name], tree[path], args[0], _linear_map(module))
        return y

    return intercept


def _difference(functions: Decomposition, factors: Factors, x: Array, linear: LinearMap) -> Array:
    if functions.apply:
        return functions.apply(factors, x, linear)
    return linear(x, functions.delta(factors))


def _linear_map(module: nn.Dense | nn.Conv) -> LinearMap:
    """Return the layer, without its bias, as a function of its input and kernel; it computes in the layer's dtype."""

    def dense(x, kernel):
        return x.astype(module.dtype) @ kernel.astype(module.dtype)

    def conv(x, kernel):
        strides = module.strides if isinstance(module.strides, tuple) else (module.strides or 1,) * (x.ndim - 2)
        return jax.lax.conv_general_dilated(
            x.astype(module.dtype),
            kernel.astype(module.dtype),
            strides,
            module.padding,  # type: ignore[arg-type]  # flax also allows one number, which diffusers does not use
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )

    return dense if isinstance(module, nn.Dense) else conv
