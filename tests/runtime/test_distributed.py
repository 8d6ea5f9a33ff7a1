"""Meshes over topologies that are not there, and batches whose rows belong to several processes."""

import functools
import itertools
import math
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from mock_devices import THREE_AXES, TWO_AXES, Chip, gpu_hosts, tpu_slices
from test_base_model import toy_model

from pisa_jax import train_step
from pisa_jax.data.loader import make_loader
from pisa_jax.data.sources import fake_source
from pisa_jax.runtime import distributed

TOPOLOGIES = {
    f"{slices} x {name}-{chips}": tpu_slices(kind, (*shape, 1)[:3], (2, 2, 1), slices)
    for name, kind, shapes in (
        ("v4", "TPU v4", THREE_AXES),
        ("v5p", "TPU v5", THREE_AXES),
        ("v5e", "TPU v5 lite", TWO_AXES),
        ("v6e", "TPU v6 lite", TWO_AXES),
    )
    for chips, shape in shapes.items()
    for slices in (1, 2, 4)
} | {
    f"{hosts} SLURM nodes, {processes} processes each": gpu_hosts(hosts, processes)
    for hosts in (1, 2, 3, 8)
    for processes in (1, 8)
}


@pytest.mark.parametrize("name", list(TOPOLOGIES))
def test_every_fsdp_has_a_mesh_along_the_network(name):
    devices = TOPOLOGIES[name]
    in_slice = sum(device.slice_index == 0 for device in devices)
    for fsdp in (size for size in (1, 2, 3, 4, 8, 16, 32, 64) if len(devices) % size == 0):
        mesh = distributed.make_mesh(fsdp=fsdp, devices=devices)
        assert dict(mesh.shape) == {"data": len(devices) // fsdp, "fsdp": fsdp}
        assert sorted(device.id for device in mesh.devices.flat) == [device.id for device in devices]
        crossed = {len({device.slice_index for device in group}) for group in mesh.devices}
        assert crossed == {math.lcm(fsdp, in_slice) // in_slice}  # as few as possible
        if isinstance(devices[0], Chip) and fsdp <= in_slice:
            boxes = [np.prod(np.ptp([device.coords for device in group], axis=0) + 1) for group in mesh.devices]
            assert set(boxes) == {fsdp}, f"fsdp {fsdp} connects chips that are no neighbors"


def test_a_part_of_a_host_and_hosts_of_different_sizes_have_a_mesh():
    eight = tpu_slices("TPU v5 lite", (2, 4, 1), (2, 4, 1))
    assert distributed.make_mesh(data=3, devices=eight).devices.ravel().tolist() == eight[:3]
    uneven = gpu_hosts(2, 1)[:12]
    assert distributed.make_mesh(fsdp=2, devices=uneven).devices.ravel().tolist() == uneven


def test_devices_of_other_processes_must_be_used():
    with pytest.raises(ValueError, match="has 8 devices, and there are 16 of 4 processes, which must all be used"):
        distributed.make_mesh(data=8, devices=tpu_slices("TPU v5 lite", (4, 4, 1), (2, 2, 1)))


def noisy_batch(mesh):
    """Load a batch of eight images and add the noise of a step; every process returns all images."""
    rows = distributed.batch_rows(mesh, 8)
    options = {"batch_size": 8, "crop": 8, "seed": 0, "degrade": lambda gt, rng: gt, "rows": rows}
    batch = next(make_loader(fake_source(20, 16), **options))
    images = distributed.place_batch(mesh, 8, rows, batch["gt"])
    base = toy_model().base

    @functools.partial(jax.jit, out_shardings=distributed.replicated(mesh))
    def add(images):
        return base.encode({}, images, train_step.draw(jax.random.key(0), base, (20, 499), images.shape).posterior)

    return rows, np.asarray(add(images))


def in_one_of_two_processes(address, index, result):
    """Place a batch on devices of processes 0, 1, 0, 1, as on a TPU slice of several hosts with 2 x 2 chips each."""
    jax.distributed.initialize(address, 2, index)
    first, second = ([device for device in jax.devices() if device.process_index == process] for process in (0, 1))
    mesh = distributed.make_mesh(devices=[*itertools.chain(*zip(first, second, strict=True))])
    rows, images = noisy_batch(mesh)
    np.savez(result, rows=rows, images=images)


def test_images_keep_their_noise_on_a_mesh_that_interleaves_processes(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[1]), environment.get("PYTHONPATH", "")])
    command = [sys.executable, __file__, address]
    started = [
        subprocess.Popen([*command, str(index), str(tmp_path / f"{index}.npz")], env=environment) for index in (0, 1)
    ]
    assert [process.wait(timeout=300) for process in started] == [0, 0]
    _, expected = noisy_batch(distributed.make_mesh(data=1))
    results = [np.load(tmp_path / f"{index}.npz") for index in (0, 1)]
    assert [result["rows"].tolist() for result in results] == [[0, 1, 4, 5], [2, 3, 6, 7]]
    for result in results:
        # To rounding: the programs for one and for four devices are compiled separately. The noise is around 0.01.
        np.testing.assert_allclose(result["images"], expected, rtol=0, atol=1e-6)


if __name__ == "__main__":
    in_one_of_two_processes(sys.argv[1], int(sys.argv[2]), sys.argv[3])
