"""Failures in a run of several processes: a failure is published, and all processes end within seconds.

Otherwise, the other processes would wait for minutes in a collective, or for this one at their exit.
"""

import contextlib
import faulthandler
import json
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import NamedTuple, NoReturn

import jax

from pisa_jax.runtime import key_value_store as store
from pisa_jax.runtime.console import say

# Exit codes: an error that the same command would meet again, and a loss that it may not meet again (EX_TEMPFAIL of
# sysexits.h).
FAILED = 1
TRY_AGAIN = 75
# Seconds between a failure and the end of the other processes, in which they may end by themselves or add reasons.
GRACE = 2.0
# Seconds for which the first process, which stores the published failures, waits until the others have read them.
FAREWELL = 5.0


class Failure(NamedTuple):
    """The reason for the end of a run, and the exit code of its processes."""

    message: str
    code: int = FAILED
    # Every process prints the stacks of its threads.
    stacks: bool = False


class Refused(ValueError):
    """The processes agreed that they cannot start; the message, which is the same in all, names the processes."""


def is_plain(error: BaseException) -> bool:
    """Return True if the message of an error is enough to understand it, without a traceback."""
    return isinstance(error, OSError | ValueError | FloatingPointError)


def failure_of(error: BaseException) -> Failure:
    """Describe an error of this process for the others."""
    if isinstance(error, jax.errors.JaxRuntimeError):
        # Collectives fail if another process has ended; a device that is too small will remain so.
        code = FAILED if "RESOURCE_EXHAUSTED" in str(error) else TRY_AGAIN
        return Failure(f"a computation failed: {' '.join(str(error).split())[:300]}", code)
    if is_plain(error):
        return Failure(str(error), TRY_AGAIN if isinstance(error, ConnectionError | TimeoutError) else FAILED)
    return Failure(f"{type(error).__name__}: {error}")


def publish(failure: Failure) -> None:
    """Publish a failure of this process if there are other processes."""
    with contextlib.suppress(ConnectionError, TimeoutError):  # the first process is lost: the others notice that
        if store.connected():
            content = {"host": socket.gethostname(), **failure._asdict()}
            store.put(f"failures/{store.process_index()}", json.dumps(content))
            store.put("failed", "")


@contextlib.contextmanager
def publishing_errors(but: type[Exception]) -> Iterator[None]:
    """Publish an error of the body, except those of type `but`, before what waits for the other processes."""
    try:
        yield
    except Exception as error:
        if not isinstance(error, but):
            publish(failure_of(error))
        raise


def published() -> Failure | None:
    """Combine the published failures of all processes, with the names of the processes; None if there are none.

    A lost process is a reason only if there is no other one: the others lose every process that fails.
    """
    found = {int(index): json.loads(text) for index, text in store.read_folder("failures").items()}
    causes = {index: failure for index, failure in found.items() if failure["code"] != TRY_AGAIN} or found
    if not causes:
        return None
    message = join_reasons({index: (failure["host"], failure["message"]) for index, failure in causes.items()})
    code = min(failure["code"] for failure in causes.values())
    return Failure(message, code, any(failure["stacks"] for failure in causes.values()))


def join_reasons(reasons: Mapping[int, tuple[str, str]]) -> str:
    """Join the reasons of processes, given as (host, reason) by process; equal ones are named once."""
    sources: dict[str, list[str]] = {}
    for index, (host, reason) in sorted(reasons.items()):
        sources.setdefault(reason, []).append(f"{index} on {host}")
    return "; ".join(f"process {', '.join(processes)}: {reason}" for reason, processes in sources.items())


class FailureWatch:
    """Context in which a failure of another process ends this one; a thread waits for it.

    The thread ends the whole program, because nothing else interrupts a collective. The files of a run are complete at
    any time: they are written under another name and renamed.
    """

    def __init__(self, prog: str):
        self._prog, self._closed, self._ending = prog, threading.Event(), threading.Lock()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="failure_watch")

    def __enter__(self) -> "FailureWatch":
        if store.connected():
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._closed.set()
        if self._thread.is_alive():
            self._thread.join()

    @property
    def active(self) -> bool:
        """True if there are other processes."""
        return store.connected()

    def end(self, reason: Failure | Exception) -> NoReturn:
        """Publish a failure of this process, report the failures of all, and end the program at once."""
        if isinstance(reason, Refused):  # all processes know it
            self._end(Failure(str(reason)))
        if isinstance(reason, Exception):
            if not is_plain(reason) and not isinstance(reason, jax.errors.JaxRuntimeError):
                traceback.print_exception(reason)
            reason = failure_of(reason)
        publish(reason)
        if reason.code == TRY_AGAIN and store.connected():
            time.sleep(GRACE)  # the cause may be in another process
        self._end(reason, ask=True)

    def _watch(self) -> None:
        while not self._closed.is_set():
            try:
                store.wait_for("failed", 1)
                failure = Failure("another process failed")
            except TimeoutError:
                continue
            except ConnectionError:
                failure = Failure("the first process of the run has ended", TRY_AGAIN)
            if not self._closed.wait(GRACE):
                self._end(failure, ask=True)
            return

    def _end(self, failure: Failure, ask: bool = False) -> NoReturn:
        """Report a failure, or what is published in its place, and end the program."""
        with self._ending:  # never released: the main thread and the watch do not both report
            if ask and store.connected():
                with contextlib.suppress(ConnectionError, TimeoutError):
                    failure = published() or failure
            say(f"{self._prog}: {failure.message}", sys.stderr)
            if failure.stacks and sys.__stderr__ is not None:
                faulthandler.dump_traceback(sys.__stderr__, all_threads=True)
            leave(failure.code)


def leave(code: int) -> NoReturn:
    """End the program at once; the first process waits until the others have read the failures."""
    with contextlib.suppress(ConnectionError, TimeoutError):
        if store.connected():
            store.put(f"left/{store.process_index()}", "")
            end = time.monotonic() + FAREWELL
            while store.process_index() == 0 and len(store.read_folder("left")) < store.process_count():
                if time.monotonic() > end:
                    break
                time.sleep(0.1)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, OSError, ValueError):
            stream.flush()
    os._exit(code)
