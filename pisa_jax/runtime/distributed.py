"""Mesh, layouts and process start: batches over every device, frozen weights cut over "fsdp", adapters everywhere."""

import os
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

# Smaller arrays are not worth cutting: the biases and norms of Stable Diffusion have at most 10 240 elements.
MIN_SIZE_TO_SHARD = 2**14


def initialize() -> None:
    """Join the other processes of this run, if the environment says there are any (a pod, SLURM, or JAX_* variables).

    JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID describe a run on localhost or by hand.
    """
    named = {name: os.environ.get(f"JAX_{name.upper()}") for name in ("num_processes", "process_id")}
    if all(named.values()):
        jax.distributed.initialize(
            os.environ["JAX_COORDINATOR_ADDRESS"], int(named["num_processes"]), int(named["process_id"])
        )
    elif "TPU_WORKER_HOSTNAMES" in os.environ or "SLURM_JOB_NUM_NODES" in os.environ:
        jax.distributed.initialize()


def make_mesh(data: int = -1, fsdp: int = 1) -> Mesh:
    """A (data, fsdp) mesh over the first devices; data = -1 takes all that fsdp leaves.

    Raises:
        ValueError: there are not enough devices, or one that belongs to another process is left out.
    """
    count = jax.device_count()
    if data == -1:
        data = max(count // fsdp, 1)
    used = data * fsdp
    if used > count or (used < count and jax.process_count() > 1):
        among = f" of {jax.process_count()} processes, which all take part" if jax.process_count() > 1 else ""
        raise ValueError(f"a mesh of data {data} x fsdp {fsdp} has {used} devices, and there are {count}{among}")
    # Auto: under the default, Explicit, Flax convolutions raise.
    axes = {"axis_shapes": (data, fsdp), "axis_names": ("data", "fsdp"), "axis_types": (AxisType.Auto,) * 2}
    return jax.make_mesh(**axes, devices=jax.devices()[:used])


def local_mesh(count: int) -> Mesh:
    """A mesh with one axis, data, over the first devices of this process.

    Raises:
        ValueError: there are fewer.
    """
    devices = jax.local_devices()
    if count > len(devices):
        raise ValueError(f"{count} devices are asked for, and there are {len(devices)} ({devices[0].platform})")
    return jax.make_mesh((count,), ("data",), axis_types=(AxisType.Auto,), devices=devices[:count])


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, P())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The first axis cut over all devices."""
    return NamedSharding(mesh, P(mesh.axis_names))


def weight_shardings(mesh: Mesh, tree: Any) -> Any:
    """For frozen weights (arrays or shapes): the largest axis that "fsdp" divides is cut over it."""
    size = mesh.shape["fsdp"]

    def sharding(leaf):
        axes = [axis for axis in range(leaf.ndim) if leaf.shape[axis] % size == 0]
        if size == 1 or not axes or leaf.size < MIN_SIZE_TO_SHARD:
            return replicated(mesh)
        longest = max(axes, key=lambda axis: leaf.shape[axis])
        return NamedSharding(mesh, P(*["fsdp" if axis == longest else None for axis in range(leaf.ndim)]))

    return jax.tree.map(sharding, tree)


def make_global_arrays(tree: Any, shardings: Any, dtype: Any = None) -> Any:
    """Equal host arrays of every process as global arrays: each device receives its part alone, cast on the host."""

    def put(leaf, sharding):
        def part(index):
            return np.asarray(leaf[index], dtype or leaf.dtype)

        return jax.make_array_from_callback(leaf.shape, sharding, part)

    return jax.tree.map(put, tree, shardings)
