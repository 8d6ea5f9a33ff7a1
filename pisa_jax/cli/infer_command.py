"""The command line of `pisa-sr infer` that makes a given result."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pisa_jax.cli.infer import parser
from pisa_jax.config import Scales
from pisa_jax.runtime.messages import number_text


def infer_command(**options: Any) -> str:
    """Return the `pisa-sr infer` command with the given options, quoted for a POSIX shell; defaults are left out.

    The options are named as in the parsed command line (`input`, `output`, `scale`, `scales`, `sem_map`, ...);
    `scales` is a list of tuples with one number for each adapter.

    >>> infer_command(input=["my photo.jpg"], scales=[(1.0, 0.5)], ext="png")
    "pisa-sr infer --input 'my photo.jpg' --scales 1,0.5 --ext png"

    Raises:
        TypeError: an option that the command does not have.
        ValueError: several values of one option, of which one begins with "-".
    """
    known, words = vars(parser().parse_args([])), ["pisa-sr", "infer"]
    if unknown := options.keys() - known:
        raise TypeError(f"pisa-sr infer has no option {', '.join(sorted(unknown))}; allowed are {', '.join(known)}")
    for name in known:
        if options.get(name, known[name]) != known[name]:
            words += _words(f"--{name.replace('_', '-')}", options[name])
    return shlex.join(words)


def _words(flag: str, value: str | int | float | Path | Sequence[str] | Sequence[Scales]) -> list[str]:
    if value is True:
        return [flag]
    values = list(map(_text, value if isinstance(value, list | tuple) else [value]))
    if not any(each.startswith("-") for each in values):
        return [flag, *values]
    if len(values) > 1:
        raise ValueError(f"{flag} with {' '.join(values)}: a value that begins with '-' can only be given alone")
    return [f"{flag}={values[0]}"]  # such as a negative scale, which would be taken for a flag


def _text(value: str | int | float | Path | Scales) -> str:
    if isinstance(value, tuple):
        return ",".join(map(number_text, value))
    return number_text(value) if isinstance(value, float) else str(value)
