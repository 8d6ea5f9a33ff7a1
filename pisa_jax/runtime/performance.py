"""Performance figures of a run: operations per second, share of the peak, device memory, compilation, data waits."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

# Peak of dense bfloat16 products, in TFLOP/s per JAX device, by device kind: data sheets of Google Cloud and NVIDIA.
# The share of the peak is left out for other devices. For float32 steps it is a share of the bfloat16 peak, too.
PEAK_TFLOPS = {
    "TPU v4": 275.0,
    "TPU v5 lite": 197.0,  # v5e
    "TPU v5": 459.0,  # v5p
    "TPU v6 lite": 918.0,  # v6e
    "NVIDIA A100-SXM4-40GB": 312.0,
    "NVIDIA A100-SXM4-80GB": 312.0,
    "NVIDIA A100-PCIE-40GB": 312.0,
    "NVIDIA A100 80GB PCIe": 312.0,
    "NVIDIA L4": 121.0,
    "NVIDIA L40S": 362.0,
    "NVIDIA H100 80GB HBM3": 989.0,
    "NVIDIA H100 PCIe": 756.0,
    "NVIDIA H100 NVL": 835.0,
    "NVIDIA H200": 989.0,
    "NVIDIA GH200 480GB": 989.0,
    "NVIDIA B200": 2250.0,
}
GIB = 2**30
_COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"


def utilization(flops: float | None, seconds: float, kind: str | None = None) -> dict[str, float]:
    """Return TFLOP/s of one device that does `flops` operations in `seconds`, and the share of its peak, if known."""
    if not flops or seconds <= 0:
        return {}
    tflops = flops / seconds / 1e12
    peak = PEAK_TFLOPS.get(jax.local_devices()[0].device_kind if kind is None else kind)
    return {"tflops": tflops} | ({"peak_share": tflops / peak} if peak else {})


def device_memory() -> dict[str, float]:
    """Return memory in use and its peak, in GiB, of the local device that uses most; empty on CPUs."""
    stats = [found for device in jax.local_devices() if (found := device.memory_stats())]
    names = {"memory": "bytes_in_use", "memory_peak": "peak_bytes_in_use"}
    return {name: max(entry.get(key, 0) for entry in stats) / GIB for name, key in names.items() if stats}


def step_flops(analysis: Any, devices: int, accumulate: int = 1) -> float | None:
    """Return the operations of one step on each device from the cost analysis of the lowered step, in FLOP.

    The analysis counts the body of a loop once, whatever the number of its iterations; with `accumulate`, the body is
    the whole step but the update of the optimizer. Returns None where a back end has no analysis.
    """
    flops = (analysis or {}).get("flops", 0.0)
    return flops * accumulate / devices if flops > 0 else None


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
