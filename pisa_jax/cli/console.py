"""Lines for the user: no encoding of a terminal and no closed pipe makes a run fail."""

import contextlib
import io
import os
import sys
from typing import TextIO


def show_any_name() -> None:
    """Let the standard streams write characters that their encoding lacks as escapes, such as `\\u5199`."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def say(text: str, stream: TextIO | None) -> None:
    """Print a line beside a progress bar; lines to a stream that is closed, or that nobody reads, are dropped."""
    from tqdm import tqdm

    try:
        tqdm.write(text, file=stream)
        if stream is not None:
            stream.flush()
    except ValueError:  # a closed stream
        return
    except OSError:
        _discard(stream)


def _discard(stream: TextIO | None) -> None:
    """Connect a broken stream to the null device: Python would fail again when it flushes the stream at the exit."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)
