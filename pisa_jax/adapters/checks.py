"""Validation of adapters: against their specification, and against the kernels of a base model."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from pisa_jax.adapters.adapter_tree import AdapterTree
from pisa_jax.config import AdapterSpec
from pisa_jax.runtime.messages import excerpt
from pisa_jax.runtime.trees import suggest


def check_factors(source: str, tree: AdapterTree, spec: AdapterSpec) -> None:
    """Check that each factor a (..., in, r) has its b (..., r, out), and that r is the rank of `spec` in all of them.

    Raises:
        ValueError: missing or unexpected factors, or other shapes; the message starts with `source`.
    """
    expected, wrong = [], []
    for path, factors in tree.items():
        others = sorted({name[1:] for name in factors if name[0] in "ab"})
        suffixes = {"lora": [""], "loha": ["1", "2"]}.get(spec.decomposition, others)
        expected += [f"{path}/{side}{suffix}" for suffix in suffixes for side in "ab"]
        if {_rank_of(name, value.shape) for name, value in factors.items()} != {spec.rank}:
            wrong.append(f"{path} with {', '.join(f'{name} {value.shape}' for name, value in factors.items())}")
    found = [f"{path}/{name}" for path, factors in tree.items() for name in factors]
    check_keys(f"{source}, factors", expected, found)
    check_empty(
        f"{source}: expected rank {spec.rank}, a (..., in, {spec.rank}) and b (..., {spec.rank}, out), found", wrong
    )


def check_adapters(trees: Mapping[str, AdapterTree], kernel_shapes: Mapping[str, Sequence[int]]) -> None:
    """Check that every factor fits the kernel of its layer: a, a1, ... (*window, in, r) and b, b1, ... (..., r, out).

    Raises:
        ValueError: layers that the base model does not have, or of another shape; the message lists them.
    """
    unknown = [(name, path) for name, tree in trees.items() for path in tree if path not in kernel_shapes]
    if unknown:
        name, path = unknown[0]
        raise ValueError(
            f"the base model has no layers {shorten(f'{name}: {path}' for name, path in unknown)}"
            f"{suggest(path, kernel_shapes)} (it has {len(kernel_shapes)} layers; are the adapters for another model?)"
        )
    wrong = []
    for name, tree in trees.items():
        for path, factors in tree.items():
            kernel = tuple(kernel_shapes[path])
            for factor, value in factors.items():
                shape, is_input = tuple(value.shape), factor.startswith("a")
                if (shape[:-1] != kernel[:-1]) if is_input else (shape[-1:] != kernel[-1:]):
                    fitting = (*kernel[:-1], "r") if is_input else ("...", "r", kernel[-1])
                    wrong.append(f"{name}: {path}/{factor} {shape}, expected ({', '.join(map(str, fitting))})")
    if wrong:
        raise ValueError(f"{len(wrong)} factors do not fit the base model: {shorten(wrong, '; ')}")


def check_finite(trees: Mapping[str, AdapterTree]) -> None:
    """Raise ValueError with the factors that hold NaN or infinite values, of which no image could be made."""
    wrong = [
        f"{name}: {path}/{factor}"
        for name, tree in trees.items()
        for path, factors in tree.items()
        for factor, value in factors.items()
        if not np.isfinite(np.asarray(value, np.float32)).all()
    ]
    if wrong:
        raise ValueError(
            f"{len(wrong)} factors of the adapters hold values that are not finite: {shorten(wrong)}; the training "
            "that wrote them has diverged, use an earlier file"
        )


def check_keys(header: str, expected: Collection[str], found: Collection[str]) -> None:
    """Raise ValueError, with the differences, unless two collections hold the same keys."""
    missing = sorted(set(expected) - set(found))
    unexpected = sorted(set(found) - set(expected))
    problems = [f"missing {shorten(missing)}"] if missing else []
    if unexpected:
        problems.append(f"unexpected {shorten(unexpected)}{suggest(unexpected[0], missing or expected)}")
    if problems:
        raise ValueError(f"{header}: expected {len(expected)}, found {len(found)}: {'; '.join(problems)}")


def check_empty(header: str, problems: Sequence[str]) -> None:
    """Raise ValueError with `header` and the first problems, if there are any."""
    if problems:
        raise ValueError(f"{header}: {shorten(problems, '; ', length=200)}")


def shorten(names: Iterable[Any], separator: str = ", ", limit: int = 4, length: int = 120) -> str:
    """Join the first `limit` names, cut to `length` since they may come from a damaged file, and count the rest.

    >>> shorten("abcdef")
    'a, b, c, d and 2 more'
    """
    names = list(names)
    return separator.join(excerpt(name, length) for name in names[:limit]) + (
        f" and {len(names) - limit} more" if len(names) > limit else ""
    )


def _rank_of(factor: str, shape: tuple[int, ...]) -> int | None:
    """Return the rank that the shape of a factor implies; None if no factor can have that shape."""
    is_input = factor.startswith("a")
    if len(shape) < 2 or not (is_input or set(shape[:-2]) <= {1}):
        return None
    return shape[-1] if is_input else shape[-2]
