"""Adapters as data: trees of factors, and the specification that turns each tree into weight differences.

{"pix": {"down_blocks_0/resnets_0/conv1": {"a": (3, 3, 320, 4), "b": (1, 1, 4, 320)}, ...}, "sem": {...}}
"""

from typing import Any, NamedTuple

from pisa_jax.config import AdapterSpec

Factors = dict[str, Any]
"""Factors of one layer by name; the names depend on the decomposition."""
AdapterTree = dict[str, Factors]
"""Module path -> factors, for every adapted layer."""


class Adapters(NamedTuple):
    """Named adapters, their specifications, and the base model that they were trained for."""

    trees: dict[str, AdapterTree]
    specs: dict[str, AdapterSpec]
    base_model: str | None = None


def summary(adapters: Adapters) -> str:
    """Describe each adapter in one line, then the base model in another."""
    lines = []
    for name, tree in adapters.trees.items():
        spec, factors = adapters.specs[name], [value for layer in tree.values() for value in layer.values()]
        size = sum(value.size for value in factors)
        kind = f"{spec.decomposition}, rank {spec.rank}, alpha {spec.alpha:g}"
        lines.append(f"  {name}: {kind}, {len(tree)} layers, {size:,} parameters")
    return "\n".join([*lines, f"  base model: {adapters.base_model or 'not recorded'}"])
