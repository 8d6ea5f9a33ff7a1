"""Processes, meshes, shardings: batches over all devices, frozen weights and large factors of adapters over "fsdp"."""

import os
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from pisa_jax.runtime.tensor_files import release_mapped_pages

# Smaller arrays are replicated: the biases and norms of Stable Diffusion have at most 10 240 elements.
MIN_SIZE_TO_SHARD = 2**14
# The same for factors of adapters and their optimizer state: those of rank 4 have at most 92 160 elements.
MIN_FACTOR_SIZE_TO_SHARD = 2**17


def default_dtype() -> str:
    """Return the default dtype of the UNet: float32 on CPUs, where bfloat16 is slower; bfloat16 on GPUs and TPUs."""
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def initialize() -> None:
    """Connect to the other processes of this run if the environment describes any (TPU pod, SLURM, or JAX_* variables).

    JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID describe processes that are started by hand.
    """
    named = {name: os.environ.get(f"JAX_{name.upper()}") for name in ("num_processes", "process_id")}
    if all(named.values()):
        jax.distributed.initialize(
            os.environ["JAX_COORDINATOR_ADDRESS"], int(named["num_processes"]), int(named["process_id"])
        )
    elif "TPU_WORKER_HOSTNAMES" in os.environ or "SLURM_JOB_NUM_NODES" in os.environ:
        jax.distributed.initialize()


def make_mesh(data: int = -1, fsdp: int = 1) -> Mesh:
    """Return a (data, fsdp) mesh over the first devices; data = -1 uses all devices.

    Raises:
        ValueError: there are not enough devices, or devices of another process would be unused.
    """
    count = jax.device_count()
    if data == -1:
        data = max(count // fsdp, 1)
    used = data * fsdp
    if used > count or (used < count and jax.process_count() > 1):
        among = f" of {jax.process_count()} processes, which must all be used" if jax.process_count() > 1 else ""
        raise ValueError(f"a mesh of data {data} x fsdp {fsdp} has {used} devices, and there are {count}{among}")
    # Under Explicit axes, jax's default, Flax convolutions raise. The shape is positional: jax 0.12 renamed it.
    axis_types = (AxisType.Auto, AxisType.Auto)
    return jax.make_mesh((data, fsdp), ("data", "fsdp"), axis_types=axis_types, devices=jax.devices()[:used])


def local_mesh(count: int) -> Mesh:
    """Return a mesh with one axis, "data", over the first `count` devices of this process.

    Raises:
        ValueError: the process has fewer devices.
    """
    devices = jax.local_devices()
    if count > len(devices):
        raise ValueError(f"{count} devices are requested, and there are {len(devices)} ({devices[0].platform})")
    return jax.make_mesh((count,), ("data",), axis_types=(AxisType.Auto,), devices=devices[:count])


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the sharding of arrays that every device holds completely."""
    return NamedSharding(mesh, P())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Return the sharding of batches: the first axis over all devices."""
    return NamedSharding(mesh, P(mesh.axis_names))


def weight_shardings(mesh: Mesh, tree: Any, min_size: int | None = None) -> Any:
    """Return the shardings of frozen weights (arrays or shapes): the longest axis that "fsdp" divides is sharded.

    Arrays of less than `min_size` elements, by default `MIN_SIZE_TO_SHARD`, are replicated.
    """
    size, least = mesh.shape["fsdp"], MIN_SIZE_TO_SHARD if min_size is None else min_size

    def sharding(leaf):
        axes = [axis for axis in range(leaf.ndim) if leaf.shape[axis] % size == 0]
        if size == 1 or not axes or leaf.size < least:
            return replicated(mesh)
        longest = max(axes, key=lambda axis: leaf.shape[axis])
        return NamedSharding(mesh, P(*["fsdp" if axis == longest else None for axis in range(leaf.ndim)]))

    return jax.tree.map(sharding, tree)


def factor_shardings(mesh: Mesh, tree: Any) -> Any:
    """Return the shardings of adapters and their optimizer state: as `weight_shardings`, for larger arrays only."""
    return weight_shardings(mesh, tree, MIN_FACTOR_SIZE_TO_SHARD)


def factor_shapes(mesh: Mesh, tree: Any) -> Any:
    """Return the shapes and dtypes of such a tree (arrays or shapes) with these shardings, for restoring it."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        tree,
        factor_shardings(mesh, tree),
    )


def to_host(tree: Any) -> Any:
    """Copy arrays to the host of every process, from all processes over which they are sharded."""

    def copy(leaf):
        if isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated):
            return multihost_utils.process_allgather(leaf, tiled=True)
        return jax.device_get(leaf)

    return jax.tree.map(copy, tree)


def make_global_arrays(tree: Any, shardings: Any, dtype: Any = None) -> Any:
    """Make global arrays from host arrays that are equal in every process.

    Each device receives only its shard, cast to `dtype` on the host.
    """

    def make(leaf, sharding):
        def shard(index):
            return np.asarray(leaf[index], dtype or leaf.dtype)

        return jax.make_array_from_callback(leaf.shape, sharding, shard)

    return jax.tree.map(make, tree, shardings)


def on_device(tree: Any, dtype: Any) -> Any:
    """Cast host arrays and place them on the default device one by one; file-mapped memory is released as they go.

    With `dtype` None, they keep their dtypes.
    """

    def place(leaf):
        placed = jax.block_until_ready(jax.device_put(np.asarray(leaf, dtype)))
        release_mapped_pages(leaf)
        return placed

    return jax.tree.map(place, tree)
