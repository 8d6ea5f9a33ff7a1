"""Number of loader workers of a process, from its processor cores and its devices."""

import math
import os
from pathlib import Path

# One core makes 73 pairs of 512 x 512 per second from small files, and a device takes at most some 60: docs/data.md.
WORKERS_PER_DEVICE = 4


def default_workers(devices: int, cores: int | None = None) -> int:
    """Return `WORKERS_PER_DEVICE` for each local device, but leave one core to the training process; at least 1."""
    cores = available_cores() if cores is None else cores
    return max(1, min(WORKERS_PER_DEVICE * devices, cores - 1))


def available_cores(root: Path = Path("/")) -> int:
    """Return the cores that this process may use: its affinity, or less under the limit of a container.

    `root` is the folder that holds `sys`.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    folder = root / "sys" / "fs" / "cgroup"
    for files in (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):  # versions 2 and 1
        quota, *period = [word for file in files for word in _text(folder / file).split()] or ["max"]
        if quota.isdecimal() and period and int(period[0]) > 0:  # "max" and -1: no limit
            cores = min(cores, math.ceil(int(quota) / int(period[0])))
    return max(cores, 1)


def _text(file: Path) -> str:
    try:
        return file.read_text()
    except (OSError, ValueError):
        return ""
