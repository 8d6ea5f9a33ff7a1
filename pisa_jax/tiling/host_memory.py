"""Memory of the host: how much this process may still use, and the return of freed memory.

The limit is the memory of the machine, or less in a container or a batch job.
"""

import contextlib
import ctypes
from collections.abc import Iterator
from pathlib import Path

# Names of a limit, of the usage, and of the entry of memory.stat for cached files that the kernel drops on demand.
CGROUP_V2 = ("memory.max", "memory.current", "inactive_file")
CGROUP_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def available_bytes(root: Path = Path("/")) -> int | None:
    """Return the bytes that Linux can still give to this process, or None if /proc/meminfo does not report it.

    The limits of all control groups above the process apply. `root` is the folder that holds `proc` and `sys`.
    """
    meminfo = _fields(root / "proc" / "meminfo")
    if "MemAvailable" not in meminfo:
        return None
    return min([1024 * meminfo["MemAvailable"], *_cgroup_bytes(root)])


def _cgroup_bytes(root: Path) -> Iterator[int]:
    """Yield the free bytes of every control group of this process that has a limit."""
    for line in _text(root / "proc" / "self" / "cgroup").splitlines():
        _, controllers, group = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        mount, names = root / "sys" / "fs" / "cgroup", CGROUP_V2
        if controllers:
            mount, names = mount / "memory", CGROUP_V1
        # In a container the path can be that of the host, and only its root, the container's own group, exists.
        folder = mount / group.lstrip("/")
        for parent in (folder, *folder.parents):
            yield from _free(parent, *names)
            if parent == mount:
                break


def _free(folder: Path, limit_name: str, usage_name: str, cache_name: str) -> Iterator[int]:
    limit, usage = _text(folder / limit_name).strip(), _text(folder / usage_name).strip()
    if limit.isdecimal() and usage.isdecimal():  # a v2 group without a limit says "max"
        cached = _fields(folder / "memory.stat").get(cache_name, 0)
        yield max(int(limit) - int(usage) + cached, 0)


def _fields(file: Path) -> dict[str, int]:
    """Read lines such as "MemAvailable: 1024 kB" or "inactive_file 1024"."""
    rows = [line.replace(":", " ").split() for line in _text(file).splitlines()]
    return {row[0]: int(row[1]) for row in rows if len(row) > 1 and row[1].isdecimal()}


def _text(file: Path) -> str:
    try:
        return file.read_text()
    except (OSError, ValueError):
        return ""


def return_freed_memory() -> None:
    """Return freed memory to the system where the C library keeps it for later (glibc)."""
    with contextlib.suppress(OSError, AttributeError, TypeError):  # other C libraries, and Windows
        ctypes.CDLL(None).malloc_trim(0)
