"""Performance figures of a run: operations per second, share of the peak, device memory, compilation, data waits."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from pisa_jax.runtime.chips import chip_of

GIB = 2**30
_COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"


def utilization(flops: float | None, seconds: float, device: Any = None) -> dict[str, float]:
    """Return TFLOP/s of a device that does `flops` operations in `seconds`, and the share of its peak, if known.

    The peak is that of bfloat16 products, also for float32 steps. `device` is the first local one by default.
    """
    if not flops or seconds <= 0:
        return {}
    tflops = flops / seconds / 1e12
    chip = chip_of(jax.local_devices()[0] if device is None else device)
    return {"tflops": tflops} | ({"peak_share": tflops / chip.tflops} if chip else {})


def device_memory() -> dict[str, float]:
    """Return memory in use and its peak, in GiB, of the local device that uses most; empty on CPUs."""
    stats = [found for device in jax.local_devices() if (found := device.memory_stats())]
    names = {"memory": "bytes_in_use", "memory_peak": "peak_bytes_in_use"}
    return {name: max(entry.get(key, 0) for entry in stats) / GIB for name, key in names.items() if stats}


@functools.cache
def _compilations() -> list[float]:
    """Seconds of every compilation since the first call."""
    seconds: list[float] = []

    def listen(event: str, duration: float, **_: Any) -> None:
        if event == _COMPILE_EVENT:
            seconds.append(duration)

    jax.monitoring.register_event_duration_secs_listener(listen)
    return seconds


def compile_seconds() -> float:
    """Return the seconds that this process has compiled, or read compiled programs, since the first call."""
    return float(sum(_compilations()))


class DataWait:
    """Time that this process waits for data."""

    def __init__(self) -> None:
        self._seconds = 0.0

    def add(self, seconds: float) -> None:
        """Add time spent waiting."""
        self._seconds += seconds

    def gather(self) -> Sequence[float]:
        """Return the seconds of every process since the last call, in order; all processes call it at one step."""
        seconds, self._seconds = self._seconds, 0.0
        if jax.process_count() == 1:
            return [seconds]
        return multihost_utils.process_allgather(np.float32(seconds)).tolist()
