"""Watchdog of a run: a step that does not end, such as a collective that another process never joins, ends the run."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from types import TracebackType


class Watchdog:
    """Context in which `expired` is called, in a thread, if no `beat` follows the previous one within some minutes.

    Nothing is expected before the first `beat`, and inside `paused`. Zero minutes: nothing is ever expected.
    """

    def __init__(self, minutes: float | int, expired: Callable[[], None]):
        self._seconds, self._expired = 60 * minutes, expired
        self._changed = threading.Condition()
        # Time at which the next beat is overdue; None while none is expected.
        self._due: float | None = None
        self._closed = False

    def __enter__(self) -> "Watchdog":
        if self._seconds:
            threading.Thread(target=self._watch, daemon=True, name="watchdog").start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify()

    def beat(self) -> None:
        """Report progress; the next beat is expected within the time."""
        self._set(time.monotonic() + self._seconds)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Expect nothing during the body, such as a compilation, which may take any time; its end is a beat."""
        self._set(None)
        yield
        self.beat()

    def _set(self, due: float | None) -> None:
        with self._changed:
            if self._due is None:  # otherwise the thread wakes up by itself
                self._changed.notify()
            self._due = due

    def _watch(self) -> None:
        with self._changed:
            while not self._closed:
                left = None if self._due is None else self._due - time.monotonic()
                if left is not None and left <= 0:
                    break
                self._changed.wait(left)
        if not self._closed:
            self._expired()
