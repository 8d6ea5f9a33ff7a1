"""Meshes and shardings: batches over all devices, frozen weights and large factors of adapters over "fsdp"."""

import collections
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
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


def make_mesh(data: int = -1, fsdp: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
    """Return a (data, fsdp) mesh over the first of `devices` (default: all); data = -1 uses all of them.

    The axes follow the network: fsdp, whose collectives carry the weights, connects neighbors of one slice or host, and
    crosses slices only if it is larger than a slice.

    Raises:
        ValueError: there are not enough devices, or devices of another process would be unused.
    """
    devices = jax.devices() if devices is None else list(devices)
    count, processes = len(devices), len({device.process_index for device in devices})
    if data == -1:
        data = max(count // fsdp, 1)
    used = data * fsdp
    if used > count or (used < count and processes > 1):
        among = f" of {processes} processes, which must all be used" if processes > 1 else ""
        raise ValueError(f"a mesh of data {data} x fsdp {fsdp} has {used} devices, and there are {count}{among}")
    # Under Explicit axes, jax's default, Flax convolutions raise.
    axis_types = (AxisType.Auto, AxisType.Auto)
    return Mesh(_arrange_devices(data, fsdp, devices[:used]), ("data", "fsdp"), axis_types=axis_types)


def _arrange_devices(data: int, fsdp: int, devices: Sequence[Any]) -> np.ndarray:
    """Return the devices as an array of shape (data, fsdp).

    A slice is a TPU slice, or the GPUs of one host: inside, devices have a faster network than across slices.
    """
    slices = collections.Counter(getattr(device, "slice_index", 0) for device in devices)
    size = len(devices) // len(slices)
    if len(set(slices.values())) > 1 or not _is_cuboid(devices, size):
        return np.array(devices).reshape(data, fsdp)
    if len(slices) == 1:
        return mesh_utils.create_device_mesh((data, fsdp), devices, allow_split_physical_axes=True)
    # The largest part of fsdp that fits into a slice; the rest divides the number of slices.
    inside = math.gcd(fsdp, size)
    across = fsdp // inside
    return mesh_utils.create_hybrid_device_mesh(
        (size // inside, inside), (len(slices) // across, across), devices, allow_split_physical_axes=True
    )


def _is_cuboid(devices: Sequence[Any], size: int) -> bool:
    """Return True if TPU chips fill a cuboid of `size` devices, and for other devices.

    GPUs have coordinates too, of their host and place in it, but no `core_on_chip`.
    """
    if devices[0].platform != "tpu":
        return True
    places = np.array([(*device.coords, device.core_on_chip) for device in devices])
    return bool(np.prod(np.ptp(places, axis=0) + 1) == size)


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


def batch_rows(mesh: Mesh, batch_size: int) -> list[int]:
    """Return the rows of a batch that the devices of this process own, in ascending order.

    The mesh may interleave the devices of several processes, so they are not always neighbors.
    """
    owned = batch_sharding(mesh).addressable_devices_indices_map((batch_size,)).values()
    return [
        row for start, stop, _ in sorted(index[0].indices(batch_size) for index in owned) for row in range(start, stop)
    ]


def place_batch(mesh: Mesh, batch_size: int, rows: Sequence[int], tree: Any) -> Any:
    """Make global arrays of `batch_size` rows from arrays of the rows that `batch_rows` returned for this process."""
    layout, position = batch_sharding(mesh), {row: place for place, row in enumerate(rows)}

    def place(array):
        def shard(index):
            start = position[index[0].indices(batch_size)[0]]
            return array[start : start + batch_size // mesh.size]

        return jax.make_array_from_callback((batch_size, *array.shape[1:]), layout, shard)

    return jax.tree.map(place, tree)


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

    Each device receives only its shard, cast to `dtype` on the host. Resident pages of mapped files are released.
    """

    def make(leaf, sharding):
        def shard(index):
            return np.asarray(leaf[index], dtype or leaf.dtype)

        made = jax.block_until_ready(jax.make_array_from_callback(leaf.shape, sharding, shard))
        release_mapped_pages(leaf)
        return made

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
