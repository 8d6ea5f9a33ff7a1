"""The interface of a decomposition: a NamedTuple of pure functions, and the few helpers that decompositions share."""

from collections.abc import Callable
from typing import Literal, NamedTuple, TypeVar

import jax
import numpy as np
from jaxtyping import Array, Float

from pisa_jax.adapters.adapter_tree import Factors

LinearMap = Callable[[Array, Array], Array]
"""`linear(x, kernel)`: the output of a Dense or Conv layer for another kernel, without the bias."""
LayerKind = Literal["dense", "conv"]
AnyArray = TypeVar("AnyArray", jax.Array, np.ndarray)


class LayerCall(NamedTuple):
    """One call of an adapted layer."""

    # Input of the layer.
    x: Array
    # Output of the layer without its bias: linear(x, kernel).
    y0: Array
    # The kernel W that the layer was called with.
    kernel: Array
    linear: LinearMap


class Decomposition(NamedTuple):
    """A parametrization of weight differences dW = W' - W. Hyperparameters such as alpha live in the closures.

    A scale multiplies dW, whatever the method: 0 is the base model, 1 the method, and every layer is affine in it.
    Names, shapes and number of factors follow from `init` under `jax.eval_shape`.
    """

    # init(key, kernel, rank) -> factors with dW = 0. The kernel may be a `jax.ShapeDtypeStruct` unless `needs_kernel`
    # is "init". Raises ValueError for shapes that the method cannot adapt.
    init: Callable[[Array, Array | jax.ShapeDtypeStruct, int], Factors]
    # delta(factors, kernel) -> dW in float32, in the shape of the kernel. `no_delta`: there is no dW, because what is
    # added depends on the input, as in a mixture with a router. Such adapters need `apply` and are never merged.
    delta: Callable[[Factors, Array], Array]
    # apply(factors, call) -> linear(x, dW) without computing dW; None if there is no cheaper way.
    apply: Callable[[Factors, LayerCall], Array] | None = None
    # The functions that depend on the values of the kernel: none of them, `init`, or `delta` and `apply`.
    needs_kernel: Literal["never", "init", "delta"] = "never"
    # Kinds of layers that it can adapt.
    kinds: tuple[LayerKind, ...] = ("dense", "conv")
    # Names of factors that are saved and never trained.
    constants: tuple[str, ...] = ()
    # Names of factors without weight decay.
    no_decay: tuple[str, ...] = ()
    # penalty(factors) -> a scalar that is added to the training loss.
    penalty: Callable[[Factors], Float[Array, ""]] | None = None
    # Training may drop elements of the input of dW (`AdapterSpec.dropout`), as in the paper of the method.
    dropout: bool = False


def no_delta(factors: Factors, kernel: Array) -> Array:
    """Raise ValueError: the `delta` of decompositions without a weight difference."""
    raise ValueError("this decomposition has no weight difference: what it adds depends on the input of a layer")


def kind_of(kernel_shape: tuple[int, ...]) -> LayerKind:
    """Return the kind of the layer with a kernel of this shape."""
    return "dense" if len(kernel_shape) == 2 else "conv"


def low_rank_output(call: LayerCall, a: Array, b: Array, scale: float = 1.0) -> Array:
    """Return linear(x, scale A B) through r channels, for A (*window, in, r) and B (r, out) or (1, 1, r, out)."""
    inner = call.linear(call.x, a)  # in the layer's dtype, which may differ from that of x
    return inner @ (scale * b.reshape(b.shape[-2:])).astype(inner.dtype)


def to_matrix(kernel: AnyArray) -> AnyArray:
    """Flatten the window and the inputs of a kernel in PyTorch's order (c_in, kh, kw), to the shape (n, c_out)."""
    if kernel.ndim == 2:
        return kernel
    return kernel.transpose(2, 0, 1, 3).reshape(-1, kernel.shape[-1])


def from_matrix(matrix: AnyArray, kernel_shape: tuple[int, ...]) -> AnyArray:
    """Inverse of `to_matrix` for a kernel of the given shape."""
    if len(kernel_shape) == 2:
        return matrix
    height, width, c_in, c_out = kernel_shape
    return matrix.reshape(c_in, height, width, c_out).transpose(1, 2, 0, 3)
