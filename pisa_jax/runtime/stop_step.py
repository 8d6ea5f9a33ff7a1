"""The step after which a run stops because of a signal; several processes agree on one."""

import contextlib
import signal
import threading
from types import TracebackType

from pisa_jax.runtime import key_value_store as store
from pisa_jax.runtime.agreement import gather
from pisa_jax.runtime.stop_signals import StopSignals


class StopStep:
    """Context in which a signal to any process stops all of them after the same step.

    Once a process has received a signal, every process publishes the last step that it passed, in a thread: its main
    thread may be in a collective. They stop at the step after the largest one, which none of them has passed.
    """

    def __init__(self, signals: StopSignals | None):
        self._signals, self._number = signals, None
        self._lock, self._closed = threading.Lock(), threading.Event()
        self._passed, self._last = 0, None
        self._thread = threading.Thread(target=self._watch, daemon=True, name="stop_step")

    def __enter__(self) -> "StopStep":
        if store.connected():
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._closed.set()
        if self._thread.is_alive():
            self._thread.join(2)  # it may wait for a process that has just closed its own

    @property
    def number(self) -> signal.Signals | None:
        """The signal that was received by this process or, once all have agreed on a step, by another one."""
        return self._number or (self._signals and self._signals.received)

    @property
    def at_once(self) -> bool:
        """True if this process, the only one of the run, received a signal."""
        return self.number is not None and not store.connected()

    def reached(self, step: int) -> bool:
        """Return True if the run stops after this step; every process calls this after each of its steps."""
        if not store.connected():
            return self.at_once
        with self._lock:  # while the processes agree, none passes another step
            self._passed = step
            return self._last is not None and step >= self._last

    def _watch(self) -> None:
        with contextlib.suppress(ConnectionError, TimeoutError):  # the run ends for another reason
            while not self._closed.is_set():
                if self._signals is not None and self._signals.received is not None:
                    store.put("stop", str(int(self._signals.received)))
                try:
                    number = signal.Signals(int(store.wait_for("stop", 1)))
                except TimeoutError:
                    continue
                with self._lock:
                    self._last = max(gather("stop", self._passed)) + 1
                    self._number = number
                return
