"""Factors and kernels: which factors an adapter has for each layer of a base model, and whether given ones fit."""

import functools
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from pisa_jax.adapters.adapter_tree import Adapters, AdapterTree
from pisa_jax.adapters.checks import check_keys, shorten
from pisa_jax.adapters.decomposition import Decomposition, kind_of, no_delta
from pisa_jax.adapters.registry import get_decomposition
from pisa_jax.config import AdapterSpec
from pisa_jax.runtime.trees import select, suggest

Shapes = dict[str, jax.ShapeDtypeStruct]


def expected_factors(spec: AdapterSpec, kernels: Mapping[str, Sequence[int]]) -> dict[str, Shapes]:
    """Return the shapes and dtypes of the factors of `spec` for kernels of the given shapes, by module path.

    Raises:
        ValueError: layers that the decomposition cannot adapt, or a pattern of `rank_by_target` without a layer.
    """
    functions, expected, refused = get_decomposition(spec), {}, []
    for path, shape in kernels.items():
        kind = kind_of(tuple(shape))
        try:
            if kind not in functions.kinds:
                raise ValueError(f"{kind} layers are not supported, only {', '.join(functions.kinds)}")
            expected[path] = _factor_shapes(functions, tuple(shape), spec.rank_of(path))
        except ValueError as error:
            refused.append(f"{path} {tuple(shape)}: {error}")
    if refused:
        raise ValueError(
            f"the decomposition {spec.decomposition!r} cannot adapt {len(refused)} of {len(kernels)} layers; change "
            f"targets, rank or options: {shorten(refused, '; ')}"
        )
    return expected


def check_ranks(spec: AdapterSpec, paths: Sequence[str]) -> None:
    """Raise ValueError if a pattern of `rank_by_target` matches none of the paths."""
    for pattern, _ in spec.rank_by_target:
        try:
            select(paths, pattern)
        except ValueError as error:
            raise ValueError(f"rank_by_target: {error}") from None


def check_adapters(
    trees: Mapping[str, AdapterTree], specs: Mapping[str, AdapterSpec], kernels: Mapping[str, Sequence[int]]
) -> None:
    """Check that every adapter has exactly the factors, in the right shapes, of its decomposition for its layers.

    Raises:
        ValueError: layers that the base model does not have, missing or unexpected factors, or other shapes.
    """
    unknown = [(name, path) for name, tree in trees.items() for path in tree if path not in kernels]
    if unknown:
        name, path = unknown[0]
        raise ValueError(
            f"the base model has no layers {shorten(f'{name}: {path}' for name, path in unknown)}"
            f"{suggest(path, kernels)} (it has {len(kernels)} layers; are the adapters for another model?)"
        )
    wrong = []
    for name, tree in trees.items():
        expected = expected_factors(specs[name], {path: kernels[path] for path in tree})
        check_keys(
            f"adapter {name!r} ({specs[name].decomposition}), factors",
            [f"{path}/{factor}" for path, shapes in expected.items() for factor in shapes],
            [f"{path}/{factor}" for path, factors in tree.items() for factor in factors],
        )
        wrong += [
            f"{name}: {path}/{factor} {tuple(value.shape)}, expected {expected[path][factor].shape}"
            for path, factors in tree.items()
            for factor, value in factors.items()
            if tuple(value.shape) != expected[path][factor].shape
        ]
    if wrong:
        raise ValueError(f"{len(wrong)} factors do not fit the base model: {shorten(wrong, '; ')}")


def check_order(adapters: Adapters) -> None:
    """Check that each adapter comes after those that it was trained on top of.

    Raises:
        ValueError: one of them is missing or comes later; for decompositions that depend on the weights, also if others
            come before it, or if an adapter cannot be merged for it.
    """
    names = list(adapters.specs)
    for index, name in enumerate(names):
        before = names[:index]
        needed = adapters.trained_on.get(name, ("pix",) if name == "sem" else ())
        in_order = f"the adapters are {', '.join(names)}, in this order"
        if missing := [other for other in needed if other not in before]:
            raise ValueError(f"adapter {name!r} was trained on top of {', '.join(missing)}; {in_order}")
        by_weights = get_decomposition(adapters.specs[name]).needs_kernel == "delta"
        if by_weights and index:
            check_mergeable(adapters.specs)
        if by_weights and name in adapters.trained_on and set(needed) != set(before):
            raise ValueError(
                f"adapter {name!r} ({adapters.specs[name].decomposition}) depends on the weights that it was trained "
                f"with, those with {', '.join(needed) or 'no adapter'}; {in_order}"
            )


def is_mergeable(spec: AdapterSpec) -> bool:
    """Return False for a decomposition without a merged weight."""
    return get_decomposition(spec).delta is not no_delta


def check_mergeable(specs: Mapping[str, AdapterSpec]) -> None:
    """Raise ValueError with the adapters that have no merged weight, if there are any."""
    wrong = [f"{name!r} ({spec.decomposition})" for name, spec in specs.items() if not is_mergeable(spec)]
    if wrong:
        raise ValueError(f"adapter {shorten(wrong)} has no merged weight: what it adds depends on the input of a layer")


def check_names(names: Sequence[str], scales: Mapping[str, object]) -> None:
    """Raise ValueError unless there is one scale for each adapter, and no other."""
    check_keys("scales", names, [*scales])


@functools.cache
def _factor_shapes(functions: Decomposition, kernel_shape: tuple[int, ...], rank: int) -> Shapes:
    kernel = jax.ShapeDtypeStruct(kernel_shape, jnp.float32)
    return jax.eval_shape(lambda key, kernel: functions.init(key, kernel, rank), jax.random.key(0), kernel)


def check_finite(trees: Mapping[str, AdapterTree]) -> None:
    """Raise ValueError with the factors that hold NaN or infinite values, of which no image could be made."""
    wrong = [f"{name}: {path}/{factor}" for name, tree in trees.items() for path, factor in not_finite(tree)]
    if wrong:
        raise ValueError(
            f"{len(wrong)} factors of the adapters hold values that are not finite: {shorten(wrong)}; the training "
            "that wrote them has diverged, use an earlier file"
        )


def not_finite(tree: AdapterTree) -> list[tuple[str, str]]:
    """List the factors of an adapter with NaN or infinite values, as pairs (module path, factor)."""
    return [
        (path, factor)
        for path, factors in tree.items()
        for factor, value in factors.items()
        if not np.isfinite(np.asarray(value, np.float32)).all()
    ]
