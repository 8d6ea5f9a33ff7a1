"""The command line that makes the same file as the page."""

import argparse
import shlex
from collections.abc import Mapping, Sequence

from pisa_jax.runtime.messages import number_text


def infer_command(
    name: str, factor: float, scales: Sequence[float], ext: str, maps: Mapping[str, str], model_flags: Sequence[str]
) -> str:
    """Return the `pisa-sr infer` command for an image file `name`, quoted for a shell; `maps` is {flag: file}."""
    numbers = ",".join(map(number_text, scales))
    parts = ["pisa-sr", "infer", "-i", name, "-s", number_text(factor)]
    parts += [f"--scales={numbers}"] if numbers.startswith("-") else ["--scales", numbers]
    parts += ["--ext", ext] if ext != "auto" else []
    for flag, file in maps.items():
        parts += [flag, file]
    return shlex.join([*parts, *model_flags])


def changed_flags(parser: argparse.ArgumentParser, args: argparse.Namespace, skip: Sequence[str]) -> list[str]:
    """Return the flags of a command line that differ from their defaults, apart from those of the names in `skip`."""
    flags = []
    for action in parser._actions:
        value = getattr(args, action.dest, action.default)
        if action.dest in skip or action.dest == "help" or action.help == argparse.SUPPRESS or value == action.default:
            continue
        values = value if isinstance(value, list) else [value]
        flags += [next(o for o in action.option_strings if o.startswith("--")), *map(str, values)]
    return flags
