"""The visitors of the page, each under the key of its browser window."""

import threading
import time
from collections.abc import Callable

from pisa_jax.app.visitor import Visitor
from pisa_jax.tiling.host_memory import return_freed_memory

MOST = 16  # windows with an image; the one that was idle longest is freed for another
IDLE = 3600.0  # seconds after which a window's image is freed


class Visitors:
    """Visitors by key, made when they are first asked for. Closed, idle and surplus ones are freed."""

    def __init__(
        self,
        make: Callable[[], Visitor],
        most: int = MOST,
        idle: float = IDLE,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._make, self._most, self._idle, self._clock = make, most, idle, clock
        self._visitors: dict[str, tuple[Visitor, float]] = {}  # the one used last is the last
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._visitors)

    def get(self, key: str) -> Visitor:
        """Return the visitor of a key."""
        with self._lock:
            now = self._clock()
            visitor = self._visitors.pop(key, (None, now))[0] or self._make()
            idle = [other for other, (_, used) in self._visitors.items() if now - used > self._idle]
            surplus = list(self._visitors)[: max(len(self._visitors) + 1 - self._most, 0)]
            for other in dict.fromkeys(idle + surplus):
                self._free(other)
            self._visitors[key] = visitor, now
            return visitor

    def close(self, key: str) -> None:
        """Free the visitor of a key whose window was closed."""
        with self._lock:
            if key in self._visitors:
                self._free(key)

    def close_all(self) -> None:
        """Free all visitors."""
        for key in list(self._visitors):
            self.close(key)

    def _free(self, key: str) -> None:
        self._visitors.pop(key)[0].close()
        return_freed_memory()
