"""Lines for the user: no encoding of a terminal and no closed pipe makes a run fail."""

import contextlib
import io
import os
import sys
from typing import Any


def show_any_name() -> None:
    """Let the standard streams write characters that their encoding lacks as escapes, such as `\\u5199`."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def say(text: str, stream: Any) -> None:
    """Print a line beside a progress bar; a stream that is missing, closed, or read by nobody is ignored."""
    from tqdm import tqdm

    if stream is None:  # a program without a terminal
        return
    try:
        tqdm.write(text, file=stream)
        stream.flush()
    except ValueError:  # a closed stream
        return
    except OSError:
        _discard(stream)


def progress_bar(total: int, unit: str = "image", initial: int = 0) -> Any:
    """Make a bar that counts on a terminal, and that is not shown elsewhere."""
    from tqdm import tqdm

    return tqdm(total=total, initial=initial, unit=unit, disable=True if sys.stderr is None else None)


def _discard(stream: Any) -> None:
    """Connect a broken stream to the null device: Python would fail again when it flushes the stream at the exit."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)
