"""Argument types shared by the commands, for `argparse`."""

import argparse
import math
from collections.abc import Callable

from pisa_jax.config import Scales


def scales(text: str) -> Scales:
    """Parse "1.0,0.7", or "0.7" for both, to (pix, sem)."""
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        values = []
    if len(values) not in (1, 2) or not all(map(math.isfinite, values)):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not PIX,SEM (two numbers) or one number for both, such as 1.0,0.7"
        )
    return values[0], values[-1]


def upscale_factor(text: str) -> float:
    """Parse a finite number of at least 1."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 1 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 1")
    return value


def integer_at_least(least: int) -> Callable[[str], int]:
    """Make a parser of integers of at least `least`."""

    def parse(text: str) -> int:
        if not text.lstrip("-").isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not an integer of at least {least}")
        return int(text)

    return parse
