"""LoRA as functional parameter trees: what is adapted, how factors become weights, and two ways to use them.

    adapters = {"pix": {"down_blocks_0/resnets_0/conv1": {"a": (3, 3, 320, 4), "b": (1, 1, 4, 320)}, ...}, "sem": {...}}

A decomposition is a NamedTuple of pure functions; a new one is a function returning it and a line in `DECOMPOSITIONS`.
"""

import functools
import math
import zlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pisa_jax.config import AdapterSpec
from pisa_jax.runtime.trees import flatten, select, suggest, unflatten

Factors = dict[str, Any]
Tree = dict[str, Factors]
Linear = Callable[[Array, Array], Array]
"""`linear(x, kernel)`: what a layer does to its input, with another kernel (a Dense or a Conv without bias)."""


class Decomposition(NamedTuple):
    """A family of weight differences dW, linear in the scale they are used with."""

    # init(key, kernel_shape, rank) -> factors with dW = 0.
    init: Callable[[Array, tuple[int, ...], int], Factors]
    # delta(factors) -> dW, shaped as the kernel.
    delta: Callable[[Factors], Array]
    # apply(factors, x, linear) -> linear(x, dW), without ever building dW; None where there is no shorter way.
    apply: Callable[[Factors, Array, Linear], Array] | None = None


def lora(alpha: float) -> Decomposition:
    """dW = (alpha / r) B A; a convolution has a k x k A (in -> r) and a 1 x 1 B (r -> out) (Hu et al. 2022, eq. 3).

    A ~ N(0, 1 / r^2) and B = 0 at the start, as PiSA-SR trains it.
    """

    def init(key, kernel_shape, rank):
        *window, c_in, c_out = kernel_shape
        return {
            "a": jax.random.normal(key, (*window, c_in, rank)) / rank,
            "b": jnp.zeros((*[1] * len(window), rank, c_out)),
        }

    def delta(factors):
        a, b = factors["a"], factors["b"]
        return (alpha / a.shape[-1]) * (a @ b.reshape(b.shape[-2:]))

    def apply(factors, x, linear):
        a, b = factors["a"], factors["b"]
        inner = linear(x, a)  # in the layer's dtype, which need not be that of x
        return inner @ ((alpha / a.shape[-1]) * b.reshape(b.shape[-2:])).astype(inner.dtype)

    return Decomposition(init, delta, apply)


def loha(alpha: float) -> Decomposition:
    """dW = (alpha / r) (A1 B1) * (A2 B2), an elementwise product of rank up to r^2 (Hyeon-Woo et al. 2022, prop. 1).

    The window of a convolution counts as input channels. B2 = 0 at the start.
    """

    def init(key, kernel_shape, rank):
        *window, c_in, c_out = kernel_shape
        keys = jax.random.split(key, 3)
        fan_in = math.prod(window) * c_in
        return {
            "a1": jax.random.normal(keys[0], (*window, c_in, rank)) / rank,
            "b1": jax.random.normal(keys[1], (rank, c_out)),
            "a2": jax.random.normal(keys[2], (*window, c_in, rank)) / math.sqrt(fan_in),
            "b2": jnp.zeros((rank, c_out)),
        }

    def delta(factors):
        rank = factors["a1"].shape[-1]
        return (alpha / rank) * (factors["a1"] @ factors["b1"]) * (factors["a2"] @ factors["b2"])

    return Decomposition(init, delta)


DECOMPOSITIONS: dict[str, Callable[[float], Decomposition]] = {"lora": lora, "loha": loha}


def decomposition(spec: AdapterSpec) -> Decomposition:
    """The functions that `spec` names, with its alpha in their closure."""
    if spec.decomposition not in DECOMPOSITIONS:
        hint = suggest(spec.decomposition, DECOMPOSITIONS)
        raise ValueError(f"unknown decomposition {spec.decomposition!r}, known: {', '.join(DECOMPOSITIONS)}{hint}")
    return DECOMPOSITIONS[spec.decomposition](spec.alpha)


def target_shapes(params: Mapping[str, Any], targets: str) -> dict[str, tuple[int, ...]]:
    """Module path -> kernel shape of the Dense and Conv layers of `params` (arrays or shapes) `targets` selects."""
    kernels = {path.removesuffix("/kernel"): leaf.shape for path, leaf in flatten(params).items() if "/kernel" in path}
    return {path: tuple(kernels[path]) for path in select(kernels, targets)}


def init(key: Array, params: Mapping[str, Any], spec: AdapterSpec) -> Tree:
    """A new adapter, dW = 0. Every layer draws from its own key, made from its path: same-shaped layers differ."""
    functions = decomposition(spec)
    return {
        path: functions.init(jax.random.fold_in(key, zlib.crc32(path.encode())), shape, spec.rank)
        for path, shape in target_shapes(params, spec.targets).items()
    }


def merge(
    params: Mapping[str, Any],
    adapters: Mapping[str, Tree],
    specs: Mapping[str, AdapterSpec],
    scales: Mapping[str, Any],
    donate: bool = False,
) -> dict[str, Any]:
    """`params` with W + sum_i scales[i] dW_i in every adapted kernel, added in float32, in the kernel's dtype.

    With `donate`, the kernels given are used up: there are never two copies of them.
    """
    flat = flatten(params)
    for name, tree in adapters.items():
        for path, factors in tree.items():
            flat[f"{path}/kernel"] = _adder(specs[name], donate)(flat[f"{path}/kernel"], factors, scales[name])
    return unflatten(flat)


@functools.cache
def _adder(spec: AdapterSpec, donate: bool) -> Callable[[Array, Factors, Any], Array]:
    """W, factors, scale -> W + scale dW; compiled once per shape of kernel, of which a UNet has few."""
    functions = decomposition(spec)

    def add(kernel, factors, scale):
        delta = scale * functions.delta(factors).astype(jnp.float32)
        return (kernel.astype(jnp.float32) + delta).astype(kernel.dtype)

    return jax.jit(add, donate_argnums=0 if donate else ())


def interceptor(
    adapters: Mapping[str, Tree],
    specs: Mapping[str, AdapterSpec],
    scales: Mapping[str, Float[Array, ""] | Float[Array, "b"]],
) -> Callable:
    """For `nn.intercept_methods`: every adapted Dense and Conv returns W x + sum_i scales[i] dW_i x, W untouched.

    A scale is one traced number, or one per sample of the batch: with (0, 1) the second half alone is adapted.
    """
    functions = {name: decomposition(specs[name]) for name in adapters}

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
                y = y + scale * _difference(functions[name], tree[path], args[0], _linear(module))
        return y

    return intercept


def _difference(functions: Decomposition, factors: Factors, x: Array, linear: Linear) -> Array:
    if functions.apply:
        return functions.apply(factors, x, linear)
    return linear(x, functions.delta(factors))


def _linear(module: nn.Dense | nn.Conv) -> Linear:
    """What `module` does to its input, bias aside, as a function of the kernel; computed in the module's dtype."""

    def dense(x, kernel):
        return x.astype(module.dtype) @ kernel.astype(module.dtype)

    def conv(x, kernel):
        strides = module.strides if isinstance(module.strides, tuple) else (module.strides or 1,) * (x.ndim - 2)
        return jax.lax.conv_general_dilated(
            x.astype(module.dtype),
            kernel.astype(module.dtype),
            strides,
            module.padding,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )

    return dense if isinstance(module, nn.Dense) else conv
