"""The interface of a decomposition: a NamedTuple of pure functions."""

from collections.abc import Callable
from typing import NamedTuple

from jaxtyping import Array

from pisa_jax.adapters.adapter_tree import Factors

LinearMap = Callable[[Array, Array], Array]
"""`linear(x, kernel)`: the output of a Dense or Conv layer for another kernel, without the bias."""


class Decomposition(NamedTuple):
    """A parametrization of weight differences dW. Hyperparameters such as alpha live in the closures."""

    # init(key, kernel_shape, rank) -> factors with dW = 0.
    init: Callable[[Array, tuple[int, ...], int], Factors]
    # delta(factors) -> dW, in the shape of the kernel.
    delta: Callable[[Factors], Array]
    # apply(factors, x, linear) -> linear(x, dW) without computing dW; None if there is no cheaper way.
    apply: Callable[[Factors, Array, LinearMap], Array] | None = None
