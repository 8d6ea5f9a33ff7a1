"""The memory that a container leaves to a process."""

import platform
from pathlib import Path

import pytest

from pisa_jax.tiling import host_memory

GIB = 2**30


def write(root, files):
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(str(text))


@pytest.fixture
def machine(tmp_path):
    """A machine of which 10 GiB are available."""
    write(tmp_path, {"proc/meminfo": f"MemTotal: {16 * 2**20} kB\nMemAvailable:   {10 * 2**20} kB\nHugePages: 0\n"})
    return tmp_path


def test_without_limits_the_memory_of_the_machine_counts(machine, tmp_path):
    assert host_memory.available_bytes(machine) == 10 * GIB
    assert host_memory.available_bytes(tmp_path / "no_linux") is None


@pytest.mark.parametrize("limited", ["", "job/", "job/step/"])
def test_limits_of_version_2(machine, limited):
    """Every group above the process counts; files that are only cached are free."""
    group = f"sys/fs/cgroup/{limited}"
    write(machine, {"proc/self/cgroup": "0::/job/step\n", "sys/fs/cgroup/job/step/memory.max": "max"})
    write(machine, {
        f"{group}memory.max": 4 * GIB,
        f"{group}memory.current": 3 * GIB,
        f"{group}memory.stat": f"anon 5\ninactive_file {GIB}\n",
    })  # fmt: skip
    assert host_memory.available_bytes(machine) == 2 * GIB


@pytest.mark.parametrize("folder", ["memory/docker/abc", "memory"])
def test_limits_of_version_1(machine, folder):
    """A container does not see the folder of the host that /proc names, and its own group is the root."""
    write(machine, {"proc/self/cgroup": "5:cpu,cpuacct:/docker/abc\n4:memory:/docker/abc\n0::/\n"})
    group = f"sys/fs/cgroup/{folder}"
    write(machine, {f"{group}/memory.limit_in_bytes": 3 * GIB, f"{group}/memory.usage_in_bytes": GIB})
    assert host_memory.available_bytes(machine) == 2 * GIB


def test_a_limit_above_the_memory_or_below_the_usage(machine):
    write(machine, {"proc/self/cgroup": "4:memory:/\n", "sys/fs/cgroup/memory/memory.usage_in_bytes": GIB})
    write(machine, {"sys/fs/cgroup/memory/memory.limit_in_bytes": 9223372036854771712})  # no limit
    assert host_memory.available_bytes(machine) == 10 * GIB
    write(machine, {"sys/fs/cgroup/memory/memory.limit_in_bytes": GIB // 2})
    assert host_memory.available_bytes(machine) == 0


def test_unreadable_entries_are_ignored(machine):
    write(machine, {"proc/self/cgroup": "0::/../elsewhere\n", "sys/fs/cgroup/memory.max": "many"})
    assert host_memory.available_bytes(machine) == 10 * GIB


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_freed_memory_is_returned():
    def resident():
        return 4096 * int(Path("/proc/self/statm").read_text().split()[1])

    # Blocks too small for a mapping of their own; the last one keeps the heap from shrinking by itself.
    blocks = [b"1" * 2**16 for _ in range(2000)]
    blocks = blocks[-1:]
    before = resident()
    host_memory.return_freed_memory()
    assert before - resident() > 2**26
    assert blocks
