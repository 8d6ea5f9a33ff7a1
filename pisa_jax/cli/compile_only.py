"""`train.py CONFIG --compile-only`: compile the steps of a run for any devices, and report on them."""

import sys
from collections.abc import Sequence
from typing import NamedTuple

from pisa_jax.config import Config
from pisa_jax.runtime.console import say

OPTIONS = {"--topology": "a TPU slice, such as v5e:4x4", "--peak-share": "a number such as 0.4"}


class CompileOnly(NamedTuple):
    """Options of a report on compiled steps."""

    # TPU slice to compile for; None: the local devices.
    topology: str | None = None
    # Fraction of the peak for which the time of a step is given.
    peak_share: float = 0.4


def take_options(arguments: Sequence[str]) -> tuple[list[str], CompileOnly | None]:
    """Separate --compile-only and its options from a command line; returns the rest, and None without the switch.

    Raises:
        ValueError: an option without its value, outside its range, or without --compile-only.
    """
    rest, values, iterator = [], {}, iter(arguments)
    for argument in iterator:
        name, has_value, value = argument.partition("=")
        if name not in OPTIONS:
            rest.append(argument)
        elif not (has_value or (value := next(iterator, ""))) or value.startswith("--"):
            raise ValueError(f"{name} needs {OPTIONS[name]}")
        else:
            values[name] = value
    if "--compile-only" not in rest:
        if values:
            raise ValueError(f"{', '.join(values)} is for --compile-only, which is not given")
        return rest, None
    return [argument for argument in rest if argument != "--compile-only"], CompileOnly(
        values.get("--topology"), _share(values.get("--peak-share", "0.4"))
    )


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise ValueError(f"--peak-share {text}: give a number above 0, at most 1")
    return share


def run(config: Config, options: CompileOnly, prog: str) -> int:
    """Print the report; returns 0, or 1 if the config cannot run on the devices."""
    import jax

    if options.topology:
        jax.config.update("jax_platforms", "cpu")  # local devices are not used
    from pisa_jax.training_report import report_compiled

    try:
        report_compiled(config, options.topology, options.peak_share)
    except (OSError, ValueError) as error:
        say(f"{prog}: {error}", sys.stderr)
        return 1
    return 0
