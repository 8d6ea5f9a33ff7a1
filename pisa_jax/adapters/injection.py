"""Adapters in a model: select layers, create a new adapter, merge adapters into weights, or apply them on the fly."""

import functools
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Key

from pisa_jax.adapters.adapter_tree import AdapterTree, Factors
from pisa_jax.adapters.decomposition import Decomposition, LayerCall
from pisa_jax.adapters.fit import check_adapters, check_mergeable, check_names, check_ranks, expected_factors
from pisa_jax.adapters.layer_maps import has_groups, linear_map
from pisa_jax.adapters.registry import DECOMPOSITIONS, get_decomposition
from pisa_jax.config import AdapterSpec
from pisa_jax.runtime import distributed
from pisa_jax.runtime.trees import flatten, select, unflatten


def kernels_of(params: Mapping[str, Any]) -> dict[str, Any]:
    """Return module path -> kernel of all Dense and Conv layers; leaves are arrays or `jax.ShapeDtypeStruct`."""
    return {path.removesuffix("/kernel"): leaf for path, leaf in flatten(params).items() if path.endswith("/kernel")}


def target_shapes(params: Mapping[str, Any], targets: str = "") -> dict[str, tuple[int, ...]]:
    """Return module path -> kernel shape of the Dense and Conv layers whose path matches the pattern `targets`."""
    kernels = kernels_of(params)
    return {path: tuple(kernels[path].shape) for path in select(kernels, targets)}


def check_spec(params: Mapping[str, Any], spec: AdapterSpec) -> None:
    """Check that `spec` can adapt all layers of `params` that it targets; leaves are arrays or shapes.

    Raises:
        ValueError: unknown decomposition or option, layers that it cannot adapt, patterns that match no layer, or
            dropout of a decomposition that has none.
    """
    if spec.dropout and not get_decomposition(spec).dropout:
        known = ", ".join(name for name, factory in DECOMPOSITIONS.items() if factory(1.0).dropout)
        raise ValueError(
            f"the decomposition {spec.decomposition!r} has no dropout, and dropout is {spec.dropout:g}; set it to 0 "
            f"(decompositions with dropout: {known})"
        )
    try:
        shapes = target_shapes(params, spec.targets)
    except ValueError as error:
        raise ValueError(f"targets: {error}") from error
    check_ranks(spec, list(shapes))
    expected_factors(spec, shapes)


def init_adapter(key: Array, params: Mapping[str, Any], spec: AdapterSpec) -> AdapterTree:
    """Create an adapter with dW = 0 for the layers of `params` that `spec` targets.

    Each layer folds a hash of its path into `key`: layers of equal shape get different factors, and the factors of a
    layer do not depend on which other layers are adapted. The leaves of `params` may be `jax.ShapeDtypeStruct` unless
    the decomposition starts from the weights.

    Raises:
        ValueError: as `check_spec` does.
    """
    check_spec(params, spec)
    functions, kernels = get_decomposition(spec), kernels_of(params)
    tree = {}
    for path in select(kernels, spec.targets):
        layer_key, kernel = jax.random.fold_in(key, zlib.crc32(path.encode())), kernels[path]
        from_weights = functions.needs_kernel == "init"
        init = _jitted_init(functions, _mesh_of(kernel)) if from_weights else functions.init
        tree[path] = init(layer_key, kernel, spec.rank_of(path))
    return tree


@functools.cache
def _jitted_init(functions: Decomposition, mesh: Mesh | None) -> Callable[[Array, Array, int], Factors]:
    """Return the jitted `init` for kernels that may be sharded over `mesh`; every device gets all factors."""
    sharding = distributed.replicated(mesh) if mesh else None
    return jax.jit(functions.init, static_argnums=2, out_shardings=sharding)


def _mesh_of(kernel: Any) -> Mesh | None:
    mesh = getattr(getattr(kernel, "sharding", None), "mesh", None)
    return mesh if isinstance(mesh, Mesh) else None


def merge(
    params: Mapping[str, Any],
    adapters: Mapping[str, AdapterTree],
    specs: Mapping[str, AdapterSpec],
    scales: Mapping[str, Any],
    donate: bool = False,
) -> dict[str, Any]:
    """Return `params` with W + sum_i scales[i] dW_i(W) in every adapted kernel.

    Every adapter receives the given kernel. An adapter that was trained on top of others is merged by a second call.
    The sum is computed in float32 and cast to the dtype of the kernel. With `donate`, the buffers of the given kernels
    are donated, so that no two copies of them exist at the same time.

    Raises:
        ValueError: the adapters do not fit `params` or have no merged weight, or `scales` does not name exactly the
            adapters.
    """
    check_names(list(adapters), scales)
    check_mergeable({name: specs[name] for name in adapters})
    flat = flatten(params)
    check_adapters(adapters, specs, target_shapes(params))
    for path in dict.fromkeys(path for tree in adapters.values() for path in tree):
        names = [name for name, tree in adapters.items() if path in tree]
        add = _adder(tuple(get_decomposition(specs[name]) for name in names), donate)
        factors = [adapters[name][path] for name in names]
        flat[f"{path}/kernel"] = add(flat[f"{path}/kernel"], factors, [scales[name] for name in names])
    return unflatten(flat)


@functools.cache
def _adder(functions: tuple[Decomposition, ...], donate: bool) -> Callable[[Array, list[Factors], list[Any]], Array]:
    """Return the jitted function (W, factors, scales) -> W + sum_i scale_i dW_i(W); it compiles once per shape."""

    def add(kernel, factors, scales):
        given = total = kernel.astype(jnp.float32)
        for each, values, scale in zip(functions, factors, scales, strict=True):
            total = total + scale * each.delta(values, given).astype(jnp.float32)
        return total.astype(kernel.dtype)

    return jax.jit(add, donate_argnums=0 if donate else ())


def interceptor(
    adapters: Mapping[str, AdapterTree],
    specs: Mapping[str, AdapterSpec],
    scales: Mapping[str, Float[Array, ""] | Float[Array, " b"]],
    dropout_keys: Key[Array, " b"] | None = None,
) -> Callable:
    """Return an interceptor for `nn.intercept_methods` that adds sum_i scales[i] dW_i(W) x to every adapted layer.

    The weights are not changed. A scale is one number for the batch or one per sample: with (0, 1), only the second
    half of a batch of two is adapted. Scales may be traced. In training, `dropout_keys` has a key for each sample: the
    layer adds dW dropout(x), and a sample is treated alike in every part or shard of a batch.

    Raises:
        ValueError: `scales` does not name exactly the adapters; inside the model, a layer that cannot be adapted.
    """
    check_names(list(adapters), scales)
    functions = {name: get_decomposition(specs[name]) for name in adapters}

    def intercept(next_fun, args, kwargs, context):
        y = next_fun(*args, **kwargs)
        module, path = context.module, "/".join(context.module.path)
        names = [name for name, tree in adapters.items() if path in tree]
        if not names or context.method_name != "__call__" or not isinstance(module, nn.Dense | nn.Conv):
            return y
        call = _layer_call(module, args[0], y)
        for name in names:
            scale = jnp.asarray(scales[name], y.dtype)
            scale = scale.reshape(-1, *[1] * (y.ndim - 1)) if scale.ndim else scale
            rate, seen = specs[name].dropout, call
            if rate and dropout_keys is not None:
                seen = _with_dropout(call, _fold_in(dropout_keys, f"{name}/{path}"), rate)
            y = y + scale * _difference(functions[name], adapters[name][path], seen, has_groups(module))
        return y

    return intercept


def _layer_call(module: nn.Dense | nn.Conv, x: Array, y: Array) -> LayerCall:
    params = module.variables["params"]
    y0 = y - params["bias"].astype(y.dtype) if module.use_bias else y
    return LayerCall(x, y0, params["kernel"], linear_map(module))


def _with_dropout(call: LayerCall, keys: Key[Array, " b"], rate: float) -> LayerCall:
    """Drop elements of the input with probability `rate` and divide the others by 1 - rate (Srivastava et al. 2014)."""
    if len(call.x) % len(keys):  # an input that all samples share
        keys = keys[:1]
    shape = (len(call.x) // len(keys), *call.x.shape[1:])
    kept = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - rate, shape))(keys).reshape(call.x.shape)
    x = jnp.where(kept, call.x / (1 - rate), 0)
    return call._replace(x=x, y0=call.linear(x, call.kernel))  # XLA removes what the decomposition does not use


def _fold_in(keys: Key[Array, " b"], name: str) -> Key[Array, " b"]:
    return jax.vmap(lambda key: jax.random.fold_in(key, zlib.crc32(name.encode())))(keys)


def _difference(functions: Decomposition, factors: Factors, call: LayerCall, grouped: bool) -> Array:
    """Compute dW x, by the decomposition's own path where it has one; those have no groups."""
    if functions.apply and not grouped:
        return functions.apply(factors, call)

    # dW is as large as the weights: the backward pass computes it again instead of keeping it.
    @jax.checkpoint
    def through_delta(factors, kernel, x):
        return call.linear(x, functions.delta(factors, kernel.astype(jnp.float32)))

    return through_delta(factors, call.kernel, call.x)
