"""Argument types shared by the commands, for `argparse`."""

import argparse
import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pisa_jax.config import Scales, check_path, check_scales, check_seed
from pisa_jax.tiling import buckets, memory


def local(text: str) -> str:
    """Parse a local path, or the name of a model; paths in buckets and with other schemes are refused."""
    return _checked_path(text, bucket=False)


def local_path(text: str) -> Path:
    """Parse a local path; paths in buckets and with other schemes are refused."""
    return Path(local(text))


def adapter_file(text: str) -> str:
    """Parse the path of an adapter file, which may be in a bucket."""
    return _checked_path(text, bucket=True)


def _checked_path(text: str, bucket: bool) -> str:
    try:
        return check_path("the path", text, bucket)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def scales_of_adapters(text: str) -> Scales:
    """Parse numbers such as "1.0,0.7", one for each adapter; a single number holds for all of them."""
    try:
        return check_scales([float(part) for part in text.split(",")], None)
    except ValueError:
        raise _not_scales(text) from None


def _not_scales(text: str) -> argparse.ArgumentTypeError:
    return argparse.ArgumentTypeError(f"{text!r} is not PIX,SEM (two numbers) or one number for both, such as 1.0,0.7")


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


def seed(text: str) -> int:
    """Parse an integer of 0 to 2^64 - 1."""
    value = integer_at_least(0)(text)
    try:
        check_seed(value)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return value


def name_part(text: str) -> str:
    """Parse text that can be a part of a file name."""
    if any(character in text for character in ("/", os.sep, "\0")):
        raise argparse.ArgumentTypeError(f"{text!r} is not part of a file name: it contains a folder separator")
    return text


def prompt(text: str) -> str:
    """Return the text of a prompt unless it is not Unicode, as where a shell passes bytes of another encoding."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError(f"{text!r} is not valid UTF-8") from None
    return text


def megapixels(text: str) -> float:
    """Parse a finite number greater than 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number greater than 0")
    return value


def image_size(text: str) -> tuple[int, int]:
    """Parse a width and a height in pixels, such as "640x512"."""
    found = re.fullmatch(r"(\d+)[xX](\d+)", text)
    if found is None or not all(map(int, found.groups())):
        raise argparse.ArgumentTypeError(f"{text!r} is not a width and a height in pixels, such as 640x512")
    width, height = map(int, found.groups())
    return width, height


def add_buckets(add: Callable[..., Any]) -> None:
    """Add the flag --buckets."""
    add("--buckets", choices=buckets.MODES, default="exact",
        help="exact (default): compute images of many sizes in arrays of a few sizes, which are compiled once, with "
        "equal results; off: compile every size")  # fmt: skip


def add_tile_mode(add: Callable[..., Any]) -> None:
    """Add the flag --vae-tile-mode."""
    add("--vae-tile-mode", choices=memory.TILE_MODES, default="exact",
        help="exact: the VAE's tiles equal the whole image to a tolerance; fast: one pass with statistics of a sample, "
        "unchecked (default exact)")  # fmt: skip
