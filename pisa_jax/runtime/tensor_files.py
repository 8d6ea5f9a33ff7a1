"""Tensor files as numpy arrays: safetensors, and PyTorch's own format (see `torch_pickle`)."""

import json
import mmap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from pisa_jax.runtime.atomic_write import atomic_write
from pisa_jax.runtime.messages import excerpt
from pisa_jax.runtime.torch_pickle import read_torch

_SAFETENSORS_DTYPES = {
    "F32": np.dtype("<f4"),
    "F64": np.dtype("<f8"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}


def read_tensors(path: str | Path) -> dict[str, np.ndarray]:
    """Read the tensors of a safetensors file or a torch state dict, recognized by content.

    A torch file may hold the state dict itself or {"state_dict": ...}. Arrays are read-only views of the mapped file.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is damaged, or holds anything but tensors.
        UnsafePickleError: a pickle refers to anything but tensors and plain containers (a ValueError).
    """
    if is_safetensors(path):
        return _read_safetensors(path)
    state = read_torch(path)
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    tensors = state if isinstance(state, dict) else {}
    other = [
        f"'{excerpt(name)}': {type(value).__name__}"
        for name, value in tensors.items()
        if not isinstance(value, np.ndarray)
    ]
    if not tensors or other:
        found = f"{type(state).__name__} {{{', '.join(other[:5] + ['...'] * (len(other) > 5))}}}"
        raise ValueError(f'{path}: expected a dict of tensors, or one under "state_dict"; found a {found}')
    return {str(name): value for name, value in tensors.items()}


def release_mapped_pages(array: np.ndarray) -> None:
    """Release the resident pages of the mapped file that `array` is a view of; later accesses read the file again.

    Has no effect on other arrays, and on platforms without `madvise`.
    """
    owner = array
    while owner is not None and not isinstance(owner, mmap.mmap):
        owner = owner.obj if isinstance(owner, memoryview) else getattr(owner, "base", None)
    if owner is not None and hasattr(mmap, "MADV_DONTNEED"):
        owner.madvise(mmap.MADV_DONTNEED)


def is_safetensors(path: str | Path) -> bool:
    """Return True if the file starts like safetensors: 8 bytes of header length, then the brace of the header."""
    with open(path, "rb") as file:
        return file.read(9)[8:] == b"{"


def read_metadata(path: str | Path) -> dict[str, str]:
    """Return the metadata of a safetensors file.

    Raises:
        ValueError: the file is damaged or has another format.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            return file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or not a safetensors file: {excerpt(error, 300)}") from error


def write_safetensors(path: str | Path, tensors: Mapping[str, Any], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file atomically.

    The same input gives the same bytes if `metadata` has at most one entry (the library orders several at random).

    Raises:
        OSError: the file cannot be written, or a dtype has no safetensors name.
    """
    # The library writes the memory of an array as it is: transposed and big-endian arrays must be copied first.
    arrays = {name: np.asarray(value) for name, value in tensors.items()}
    arrays = {name: a.astype(a.dtype.newbyteorder("<"), order="C", copy=False) for name, a in arrays.items()}
    try:
        with atomic_write(path) as temporary:
            save_file(arrays, temporary, dict(metadata))
    except SafetensorError as error:
        raise OSError(f"cannot write {path}: {error}") from error


def _read_safetensors(path: str | Path) -> dict[str, np.ndarray]:
    # The library validates the header (bounds, overlaps, sizes), but copies every tensor; views of a map do not.
    read_metadata(path)
    with open(path, "rb") as file:
        data = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
    start = 8 + int.from_bytes(data[:8].tobytes(), "little")
    header = json.loads(data[8:start].tobytes())
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        if entry["dtype"] not in _SAFETENSORS_DTYPES:
            raise ValueError(
                f"{path}: {excerpt(name)} is {entry['dtype']}; supported are {', '.join(_SAFETENSORS_DTYPES)}"
            )
        first, last = (start + offset for offset in entry["data_offsets"])
        array = data[first:last].view(_SAFETENSORS_DTYPES[entry["dtype"]]).reshape(entry["shape"])
        tensors[name] = np.require(array, requirements="A")
    return tensors
