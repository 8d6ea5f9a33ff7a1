"""Traces of training steps for xprof and TensorBoard, of chosen steps or on SIGUSR1."""

import logging
import signal
import tempfile
import threading
from pathlib import Path
from types import TracebackType
from typing import Any

import jax

from pisa_jax.runtime.messages import error_text
from pisa_jax.runtime.remote_paths import AnyPath, copy_folder

logger = logging.getLogger(__name__)

# Steps of a trace that SIGUSR1 starts.
SIGNAL_STEPS = 5


class Profiler:
    """Context that traces the steps "A:B", both included, and after SIGUSR1 the next `SIGNAL_STEPS` steps.

    Traces are written to the folder of TensorBoard, one folder below `plugins/profile` for each. Each process of a run
    traces its own devices; SIGUSR1 starts a trace in the process that receives it. A trace that fails is reported and
    does not stop the run. Signals are handled only if it is entered in the main thread.
    """

    def __init__(self, folder: AnyPath, steps: str | None = None):
        self._folder = folder
        self._steps = range(0)
        if steps:
            first, last = map(int, steps.split(":"))
            self._steps = range(first, last + 1)
        self._requested = threading.Event()
        self._trace: tempfile.TemporaryDirectory | None = None

    def __enter__(self) -> "Profiler":
        self._handler_before: Any = None
        if threading.current_thread() is threading.main_thread():
            self._handler_before = signal.signal(signal.SIGUSR1, lambda *_: self._requested.set())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stop()
        if self._handler_before is not None:
            signal.signal(signal.SIGUSR1, self._handler_before)

    def before(self, step: int) -> None:
        """Start a trace if one begins with this step."""
        if self._trace is None and self._requested.is_set():
            self._requested.clear()
            self._steps = range(step, step + SIGNAL_STEPS)
        if self._trace is None and step in self._steps:
            trace = tempfile.TemporaryDirectory(prefix="pisa_jax_")
            try:
                jax.profiler.start_trace(trace.name)
            except Exception as error:  # such as a trace that the caller has started
                self._steps = range(0)
                trace.cleanup()
                logger.warning("step %d cannot be traced: %s", step, error_text(error))
            else:
                self._trace = trace

    def after(self, step: int, results: Any) -> None:
        """End the trace if this step, whose results are `results`, is its last."""
        if self._trace is not None and step + 1 not in self._steps:
            jax.block_until_ready(results)
            self._stop()

    def _stop(self) -> None:
        if self._trace is None:
            return
        try:
            jax.profiler.stop_trace()
            copy_folder(Path(self._trace.name), self._folder)
            logger.info("steps %d to %d were traced, see %s", self._steps[0], self._steps[-1], self._folder)
        except Exception as error:  # a full disk, or a bucket that cannot be reached
            logger.warning("the trace could not be written to %s: %s", self._folder, error_text(error))
        finally:
            self._trace.cleanup()
            self._trace, self._steps = None, range(0)
