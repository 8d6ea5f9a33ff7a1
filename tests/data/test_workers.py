"""The default number of loader workers: processor cores, limits of containers, and devices."""

import os

import pytest

from pisa_jax.data.workers import available_cores, default_workers


@pytest.mark.parametrize(
    ("devices", "cores", "workers"),
    [
        (8, 224, 32),  # an 8-chip v5e host
        (4, 208, 16),  # a host of a v5p slice
        (8, 20, 19),
        (1, 2, 1),
        (1, 1, 1),
        (8, 1, 1),
    ],
)
def test_workers_follow_the_devices_as_far_as_there_are_cores(devices, cores, workers):
    assert default_workers(devices, cores) == workers


def write(root, name, text):
    path = root / "sys" / "fs" / "cgroup" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, 64),
        ({"cpu.max": "max 100000\n"}, 64),
        ({"cpu.max": "800000 100000\n"}, 8),
        ({"cpu.max": "150000 100000\n"}, 2),
        ({"cpu.max": "broken"}, 64),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 64),
        ({"cpu/cpu.cfs_quota_us": "400000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 4),
    ],
)
def test_the_limit_of_a_container_counts(tmp_path, monkeypatch, files, cores):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(64))
    for name, text in files.items():
        write(tmp_path, name, text)
    assert available_cores(tmp_path) == cores
