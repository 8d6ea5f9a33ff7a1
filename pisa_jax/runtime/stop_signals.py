"""SIGINT and SIGTERM as requests to stop, also while the main thread compiles."""

import contextlib
import os
import signal
import threading
from types import TracebackType


class StopSignals:
    """Context in which a first SIGINT or SIGTERM is recorded in `received`, and a second one ends the process at once.

    A thread reads the signals from a pipe. Python calls signal handlers only between two bytecodes of the main thread,
    which is minutes later while it compiles, and a KeyboardInterrupt that is raised inside a callback of JAX is lost.
    A signal that the parent process told this one to ignore, as shell scripts do with SIGINT for programs in the
    background, remains ignored. Use it in the main thread.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None

    def __enter__(self) -> "StopSignals":
        reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        threading.Thread(target=self._watch, args=(reader,), daemon=True, name="stop_signals").start()
        self._fd_before = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        found = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        self._handlers_before = {number: handler for number, handler in found.items() if handler != signal.SIG_IGN}
        for number in self._handlers_before:
            signal.signal(number, lambda *_: None)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._handlers_before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._fd_before)
        os.close(self._writer)  # ends the thread

    def _watch(self, reader: int) -> None:
        while number := os.read(reader, 1):
            if number[0] not in (signal.SIGINT, signal.SIGTERM):
                continue
            if self.received is not None:
                _report("a second signal ends the program at once; the last checkpoint is intact")
                os._exit(128 + number[0])
            self.received = signal.Signals(number[0])
            _report(
                f"{self.received.name}: the run stops after this step and is saved; a second signal ends it at once"
            )
        os.close(reader)


def _report(text: str) -> None:
    """Write to standard error without its buffer, which the main thread may be using."""
    with contextlib.suppress(OSError):  # no terminal any more
        os.write(2, f"\n{text}\n".encode())
