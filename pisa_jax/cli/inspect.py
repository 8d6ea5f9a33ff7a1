"""`pisa-sr inspect`: print what an adapter file holds, and how two files differ."""

import argparse
import sys
from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from pisa_jax.adapters.adapter_tree import summary
from pisa_jax.cli.arguments import adapter_file, local
from pisa_jax.cli.convert import read
from pisa_jax.runtime.console import say, show_any_name
from pisa_jax.runtime.messages import error_text
from pisa_jax.runtime.trees import flatten

if TYPE_CHECKING:
    from pisa_jax.adapters.adapter_tree import Adapters, AdapterTree


def main(argv: Sequence[str] | None = None, prog: str = "pisa-sr inspect") -> int:
    """Run the command line; returns 0, or 1 if a file cannot be read or two files differ."""
    show_any_name()
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Print the adapters of a file of any format that `pisa-sr convert` reads: decomposition, rank, "
        "layers, and the norm of the factors per block. With two files, print how they differ.",
    )
    parser.add_argument("file", type=adapter_file, metavar="FILE")
    parser.add_argument("other", type=adapter_file, metavar="OTHER", nargs="?", help="file to compare with")
    parser.add_argument("--model", type=local, metavar="FOLDER|ID", help="base model, as for `pisa-sr convert`")
    args = parser.parse_args(argv)
    try:
        found = [read(path, args.model, None) for path in (args.file, args.other) if path]
    except (ValueError, OSError) as error:
        say(f"{prog}: {error_text(error)}", sys.stderr)
        return 1
    for path, adapters in zip((args.file, args.other), found, strict=False):
        say(f"{path}\n{summary(adapters)}", sys.stdout)
        for name, tree in adapters.trees.items():
            say(f"  {name}, norm of the factors: {norms(tree)}", sys.stdout)
    if len(found) < 2:
        return 0
    lines = differences(*found)
    say("\n".join(lines) if lines else "no differences", sys.stdout)
    return 1 if lines else 0


def norms(tree: "AdapterTree") -> str:
    """Return the norm of the factors of each block: the first part of the module paths."""
    squares: defaultdict[str, float] = defaultdict(float)
    for path, factors in tree.items():
        squares[path.split("/")[0]] += sum(
            float(np.sum(np.square(value, dtype=np.float64))) for value in factors.values()
        )
    return ", ".join(f"{block} {square**0.5:.4g}" for block, square in sorted(squares.items())) or "no layers"


def differences(one: "Adapters", other: "Adapters") -> list[str]:
    """Describe how two sets of adapters differ: specifications, layers, and the largest change of each adapter."""
    lines = []
    for name in dict.fromkeys([*one.specs, *other.specs]):
        if name not in one.specs or name not in other.specs:
            lines.append(f"{name}: only in the {'first' if name in one.specs else 'second'} file")
            continue
        if one.specs[name] != other.specs[name]:
            lines.append(f"{name}: {one.specs[name]} and {other.specs[name]}")
        first, second = flatten(one.trees[name]), flatten(other.trees[name])
        shared = [path for path in first if path in second and first[path].shape == second[path].shape]
        if len(shared) < max(len(first), len(second)):
            lines.append(f"{name}: {len(shared)} factors of equal path and shape, of {len(first)} and {len(second)}")
        changes = {path: float(np.abs(first[path] - second[path]).max()) for path in shared if first[path].size}
        if (largest := max(changes, key=changes.__getitem__, default=None)) and changes[largest]:
            count = sum(change > 0 for change in changes.values())
            lines.append(f"{name}: {count} factors differ, at most by {changes[largest]:.3g} in {largest}")
    return lines
