"""Rows of results: reported as soon as they are measured; failures become rows, too."""

import math
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any

from pisa_jax.runtime.messages import error_text
from pisa_jax.tiling.memory import is_out_of_memory

# "wrong": a comparison exceeds its tolerance. "skipped": the time left would not suffice, or a package is missing.
STATUSES = ("ok", "wrong", "failed", "out of memory", "out of time", "skipped")
MESSAGE_LENGTH = 300


class Rows:
    """Collects the rows of one part until a time (of `time.time`)."""

    def __init__(self, write: Callable[[dict], None], until: float, earlier: Mapping[str, Any]):
        self._write, self.until = write, until
        # The document of the parts before this one.
        self.earlier = earlier

    def remaining(self) -> float:
        """Seconds until the time of this part is up."""
        return self.until - time.time()

    def add(self, name: str, status: str, message: str = "", values: Mapping[str, Any] | None = None) -> None:
        """Report a row."""
        assert status in STATUSES, status
        finite = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in (values or {}).items()
        }
        self._write({"row": {"name": name, "status": status, "message": message[:MESSAGE_LENGTH], "values": finite}})

    def add_failure(self, name: str, error: Exception) -> None:
        """Report a row that failed."""
        self.add(name, "out of memory" if is_out_of_memory(error) else "failed", error_text(error))

    def attempt(self, name: str, measure: Callable[[], Any], expected: float = 0.0) -> Any:
        """Call `measure` and report the dict that it returns; returns it, or None after a failure.

        Args:
            measure: its value under the key "status", if there is one, is the status of the row.
            expected: seconds that it will take; with less time left, the row is skipped.
        """
        if self.remaining() < expected:
            left = max(self.remaining(), 0)
            self.add(name, "skipped", f"takes about {expected:.0f} s, and {left:.0f} s are left")
            return None
        self._write({"start": name})
        try:
            values = dict(measure())
        except Exception as error:  # the other rows matter as much
            traceback.print_exc()
            self.add_failure(name, error)
            return None
        self.add(name, values.pop("status", "ok"), values=values)
        return values
