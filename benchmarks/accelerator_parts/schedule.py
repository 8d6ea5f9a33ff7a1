"""Which parts there are, how much of the time each has, and running one in a process of its own.

A process that compiles cannot be interrupted, so it is killed when the time of its part is up. A crash ends one part,
and every part starts with an empty device.
"""

import contextlib
import importlib.util
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

BENCHMARKS = Path(__file__).resolve().parents[1]
ROOT = BENCHMARKS.parent
# Seconds for a process to end after its time is up.
GRACE = 2.0


class Part(NamedTuple):
    """A part of the benchmark, as a module of this package."""

    name: str
    title: str
    # Of the whole time.
    share: float
    # Packages without which it is skipped.
    needs: tuple[str, ...] = ()
    # Seconds that it has even if its share is less.
    least: float = 0.0

    def missing(self) -> list[str]:
        """The packages that it needs and that are not installed."""
        return [name for name in self.needs if importlib.util.find_spec(name) is None]


# Most important first.
PARTS = (
    Part("device", "Device and ceilings", 0.07, least=20.0),
    Part("correctness", "Correctness on this device", 0.26),
    Part("inference", "Inference", 0.27),
    Part("training", "Training step", 0.20),
    Part("torch_inference", "The same inference in PyTorch", 0.12, ("torch", "peft")),
    Part("trace", "Largest operations", 0.08),
)


def deadlines(parts: Sequence[Part], start: float, seconds: float) -> dict[str, float]:
    """Return the time at which each part has to end; what a part leaves is for those after it.

    The share of parts that cannot run is divided among the others.
    """
    able = [part for part in parts if not part.missing()]
    usable, whole = seconds - GRACE, sum(part.share for part in able)
    passed, end, times = 0.0, 0.0, {}
    for part in able:
        passed += part.share
        end = min(max(usable * passed / whole, end + part.least), usable)
        times[part.name] = start + end
    return times


def environment(cache: Path) -> dict[str, str]:
    """Environment of the processes: this checkout, and a compilation cache that the parts share."""
    paths = [str(BENCHMARKS), str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    return {
        "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92",
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        # A warm cache of the user's would hide what compiling takes.
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        # Small operations too: a part runs about a hundred of them one by one before it measures.
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
    }


def run_part(
    name: str, arguments: Sequence[str], until: float, env: dict[str, str], log: Path, receive: Callable[[dict], None]
) -> str:
    """Run a part and pass its records on; returns "complete", "out of time", or "failed"."""
    command = [sys.executable, "-m", "accelerator_parts.worker", name, "--until", str(until), *arguments]
    with log.open("w", encoding="utf-8") as errors:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, env=env, text=True, start_new_session=True
        )
    lines: queue.Queue[str | None] = queue.Queue()
    threading.Thread(target=_read, args=(process.stdout, lines), daemon=True).start()
    try:
        while True:
            try:
                line = lines.get(timeout=max(until + GRACE - time.time(), 0.01))
            except queue.Empty:
                return "out of time"
            if line is None:
                break
            receive(json.loads(line))
        try:
            return "complete" if process.wait(timeout=5 * GRACE) == 0 else "failed"
        except subprocess.TimeoutExpired:  # everything is measured
            return "complete"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # with the compilers that PyTorch starts
        process.wait()


def _read(stream, lines: queue.Queue) -> None:
    with stream:
        for line in stream:
            lines.put(line)
    lines.put(None)
