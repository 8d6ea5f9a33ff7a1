"""Adapters as data: trees of factors, and the specification that turns each tree into weight differences.

{"pix": {"down_blocks_0/resnets_0/conv1": {"a": (3, 3, 320, 4), "b": (1, 1, 4, 320)}, ...}, "sem": {...}}
"""

import itertools
from collections.abc import Callable, Collection, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from pisa_jax.config import AdapterSpec

Factors = dict[str, Any]
"""Factors of one layer by name; the names depend on the decomposition."""
AdapterTree = dict[str, Factors]
"""Module path -> factors, for every adapted layer."""


class Adapters(NamedTuple):
    """Named adapters, their specifications, and the base model that they were trained for.

    The order of `specs` is that of the scales.
    """

    trees: dict[str, AdapterTree]
    specs: dict[str, AdapterSpec]
    base_model: str | None = None
    # Name of an adapter -> adapters that were merged into the base model when it was trained.
    trained_on: Mapping[str, tuple[str, ...]] = MappingProxyType({})
    # `weights_digest` of the UNet of the base model; None: not recorded.
    base_digest: str | None = None


def split(tree: AdapterTree, names: Collection[str]) -> tuple[AdapterTree, AdapterTree]:
    """Split a tree into the factors that are not in `names` and those that are.

    >>> split({"conv": {"a": 1, "a0": 2}}, ("a0",))
    ({'conv': {'a': 1}}, {'conv': {'a0': 2}})
    """
    rest = {path: {name: value for name, value in layer.items() if name not in names} for path, layer in tree.items()}
    named = {path: {name: value for name, value in layer.items() if name in names} for path, layer in tree.items()}
    return rest, named


def join(tree: AdapterTree, other: AdapterTree) -> AdapterTree:
    """Inverse of `split`."""
    return {path: {**layer, **other[path]} for path, layer in tree.items()}


def select_factors(test: Callable[[str], bool], tree: AdapterTree) -> dict[str, dict[str, bool]]:
    """Return test(name) for every factor of a tree, in a tree of the same structure."""
    return {path: {name: test(name) for name in layer} for path, layer in tree.items()}


def with_sem(adapters: Adapters) -> Adapters:
    """Add an empty adapter `sem` to `pix` alone, as after the pixel stage: two scales hold for every run."""
    if list(adapters.specs) != ["pix"]:
        return adapters
    return adapters._replace(trees={**adapters.trees, "sem": {}}, specs={**adapters.specs, "sem": AdapterSpec()})


def join_adapters(several: Mapping[str, Adapters]) -> Adapters:
    """Join adapters by source, in order.

    Raises:
        ValueError: an adapter name in two sources, or different base models.
    """
    for one, other in itertools.combinations(several, 2):
        _check_same_base(one, several[one], other, several[other])
    joined = Adapters({}, {})
    owners: dict[str, str] = {}
    for source, adapters in several.items():
        for name in adapters.specs:
            if name in owners:
                raise ValueError(f"{owners[name]} and {source} both have an adapter {name!r}; give one of them")
            owners[name] = source
        joined = Adapters(
            {**joined.trees, **adapters.trees},
            {**joined.specs, **adapters.specs},
            adapters.base_model or joined.base_model,
            {**joined.trained_on, **adapters.trained_on},
            adapters.base_digest or joined.base_digest,
        )
    return joined


def _check_same_base(one: str, first: Adapters, other: str, second: Adapters) -> None:
    """Raise ValueError if two sources have other base models: by their digests, and without these by their names."""
    if first.base_digest and second.base_digest:
        if first.base_digest != second.base_digest:
            raise ValueError(
                f"{one} was trained on the weights {first.base_digest} ({first.base_model}), {other} on the weights "
                f"{second.base_digest} ({second.base_model}); give adapters for one base model"
            )
    elif first.base_model and second.base_model and first.base_model != second.base_model:
        raise ValueError(
            f"{one} is for the base model {first.base_model}, {other} for {second.base_model}; give adapters for one"
        )


def summary(adapters: Adapters) -> str:
    """Describe each adapter in one line, then the base model in another."""
    lines = []
    for name, tree in adapters.trees.items():
        spec, factors = adapters.specs[name], [value for layer in tree.values() for value in layer.values()]
        size = sum(value.size for value in factors)
        options = "".join(f", {key} {value}" for key, value in spec.options)
        options += f", dropout {spec.dropout:g}" if spec.dropout else ""
        kind = f"{spec.decomposition}, rank {spec.rank}, alpha {spec.alpha:g}{options}"
        lines.append(f"  {name}: {kind}, {len(tree)} layers, {size:,} parameters")
    digest = f", weights {adapters.base_digest}" if adapters.base_digest else ""
    return "\n".join([*lines, f"  base model: {adapters.base_model or 'not recorded'}{digest}"])
