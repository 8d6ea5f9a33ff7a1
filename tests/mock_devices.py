"""Devices of TPU slices and GPU hosts that are not there, with the attributes that a mesh is built from."""

import dataclasses
import itertools

import numpy as np


@dataclasses.dataclass(frozen=True)
class Device:
    """The attributes of a JAX device that a mesh is built from."""

    id: int
    process_index: int
    slice_index: int
    device_kind: str
    platform: str = "gpu"


@dataclasses.dataclass(frozen=True)
class Gpu(Device):
    # As on an H200 with jax 0.11: coordinates, and no `core_on_chip`.
    coords: tuple[int, ...] = (0, 0)


@dataclasses.dataclass(frozen=True)
class Chip(Device):
    coords: tuple[int, int, int] = (0, 0, 0)
    core_on_chip: int = 0


def tpu_slices(kind, chips, host, slices=1):
    """Devices of TPU slices in the order of `jax.devices()`: by host, then z, y, x."""
    devices = []
    counts = [size // part for size, part in zip(chips, host, strict=True)]
    for index in range(slices):
        for corner in itertools.product(*(range(count) for count in reversed(counts))):
            process = len(devices) // int(np.prod(host))
            for place in itertools.product(*(range(part) for part in reversed(host))):
                coords = tuple(c * h + p for c, h, p in zip(reversed(corner), host, reversed(place), strict=True))
                devices.append(Chip(len(devices), process, index, kind, "tpu", coords))
    return devices


def gpu_hosts(hosts, processes_per_host):
    """Eight GPUs per host; JAX reports every host as a slice."""
    of_process = 8 // processes_per_host
    return [Gpu(n, n // of_process, n // 8, "NVIDIA H100 80GB HBM3", coords=(n // 8, n % 8)) for n in range(8 * hosts)]


THREE_AXES = {4: (2, 2, 1), 8: (2, 2, 2), 16: (2, 2, 4), 32: (2, 4, 4), 64: (4, 4, 4), 128: (4, 4, 8), 256: (4, 8, 8)}
TWO_AXES = {4: (2, 2), 8: (2, 4), 16: (4, 4), 32: (4, 8), 64: (8, 8), 128: (8, 16), 256: (16, 16)}
