"""PyTorch's checkpoint files as numpy arrays, without PyTorch and without executing code.

A torch file is a pickle that refers to storages, and the bytes of these storages. `pickle.Unpickler` is not used: its
opcodes BUILD, NEWOBJ and EXT can have effects that `find_class` does not control. `_interpret` implements only the
opcodes that `torch.save` writes, and can call only `_FUNCTIONS`. Arrays are read-only views of the memory-mapped file:
pages are read on access, and tensors that share a storage in the file share it here.
"""

import math
import mmap
import pickletools
import struct
import zipfile
from collections.abc import Callable
from io import BufferedIOBase, BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from numpy.lib.stride_tricks import as_strided

from pisa_jax.runtime.messages import excerpt

# torch dtype -> (class of its storages in a pickle, numpy dtype). Only little-endian files are read.
_DTYPES = {
    "float32": ("FloatStorage", np.dtype("<f4")),
    "float64": ("DoubleStorage", np.dtype("<f8")),
    "float16": ("HalfStorage", np.dtype("<f2")),
    "bfloat16": ("BFloat16Storage", np.dtype(ml_dtypes.bfloat16)),
    "int64": ("LongStorage", np.dtype("<i8")),
    "int32": ("IntStorage", np.dtype("<i4")),
    "int16": ("ShortStorage", np.dtype("<i2")),
    "int8": ("CharStorage", np.dtype("i1")),
    "uint8": ("ByteStorage", np.dtype("u1")),
    "bool": ("BoolStorage", np.dtype("?")),
}

_ADVICE = "If you trust its author, load it in PyTorch and save only the tensors: torch.save(model.state_dict(), path)"


class UnsafePickleError(ValueError):
    """A pickle refers to something that is neither a tensor nor a plain container. Nothing in it was executed."""


def read_torch(path: str | Path) -> Any:
    """Read a file of `torch.save` (zip or legacy format): containers, numbers and strings, and tensors as numpy arrays.

    A Parameter is read as its data, an OrderedDict as a dict without attributes such as `_metadata`, and a torch dtype
    as a numpy dtype.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is truncated, damaged or big-endian, or a tensor exceeds its storage.
        UnsafePickleError: the pickle refers to anything else, which the message names.
    """
    try:
        with open(path, "rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            data = np.frombuffer(mapped, np.uint8)
            return _read_zip(file, data) if mapped[:2] == b"PK" else _read_legacy(mapped, data)
    except UnsafePickleError as error:
        raise UnsafePickleError(
            f"{path} was not loaded, and nothing in it was executed: {excerpt(error, 300)}. {_ADVICE}."
        ) from None
    except (zipfile.BadZipFile, NotImplementedError, struct.error, OverflowError) as error:
        raise ValueError(f"{path} is truncated or damaged: {excerpt(error, 300)}") from error
    except ValueError as error:
        raise ValueError(f"{path} cannot be read as a torch file: {excerpt(error, 300)}") from error


class _Reference(NamedTuple):
    """A reference to a storage in the pickle, with the dtype and the number of elements that it declares."""

    dtype: np.dtype
    key: str
    numel: int


def _read_zip(file: BufferedIOBase, data: np.ndarray) -> Any:
    records = _zip_records(file, data)
    if "data.pkl" not in records:
        raise ValueError(f"a zip archive without data.pkl is not a torch file (it holds {sorted(records)[:5]})")
    if "byteorder" in records and records["byteorder"].tobytes() != b"little":
        raise ValueError("it is big-endian; only little-endian files are read")

    def storage(reference: _Reference) -> np.ndarray:
        if f"data/{reference.key}" not in records:
            raise ValueError(f"storage {reference.key!r} is missing from the archive")
        return _typed(records[f"data/{reference.key}"], reference)

    return _interpret(BytesIO(records["data.pkl"].tobytes()), storage)


def _zip_records(file: BufferedIOBase, data: np.ndarray) -> dict[str, np.ndarray]:
    """Return file name, relative to the archive's top folder, -> view of its bytes."""
    records = {}
    for entry in zipfile.ZipFile(file).infolist():
        if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
            raise ValueError(f"{entry.filename!r} is compressed or encrypted, which torch.save never does")
        # The extra field of the local header may be longer than in the directory: torch uses it for alignment.
        name_size, extra_size = struct.unpack_from("<26xHH", data, entry.header_offset)
        start = entry.header_offset + 30 + name_size + extra_size
        records[entry.filename.partition("/")[2]] = data[start : start + entry.file_size]
    return records


def _read_legacy(stream: mmap.mmap, data: np.ndarray) -> Any:
    """Read pickles of magic number, version, system, object and storage keys, then each storage's length and bytes."""
    no_storage: Callable = {}.__getitem__
    if _interpret(stream, no_storage) != 0x1950A86A20F9469CFC6C:
        raise ValueError("it is neither a zip archive nor a legacy torch file (no magic number)")
    if _interpret(stream, no_storage) != 1001:
        raise ValueError("its format version is not 1001, the only legacy version")
    system = _interpret(stream, no_storage)
    if type(system) is not dict or system.get("little_endian") is not True:
        raise ValueError("it is big-endian; only little-endian files are read")

    # The storages follow the pickle that declares them, so the pickle is interpreted twice: first with placeholders
    # of stride 0, which need no memory, to find the storages.
    declared: dict[str, _Reference] = {}

    def declare(reference: _Reference) -> np.ndarray:
        if declared.setdefault(reference.key, reference) != reference:
            raise ValueError(f"storage {reference.key!r} is declared in two ways")
        return np.broadcast_to(np.zeros((), reference.dtype), (reference.numel,))

    start = stream.tell()
    _interpret(stream, declare)
    keys = _interpret(stream, no_storage)
    if type(keys) is not list or any(type(key) is not str for key in keys) or set(keys) != set(declared):
        raise ValueError("its list of storages differs from the storages of its tensors")
    storages, at = {}, stream.tell()
    for key in keys:
        (numel,) = struct.unpack_from("<q", data, at)
        if numel != declared[key].numel:
            raise ValueError(f"storage {key!r} has {numel} elements, not {declared[key].numel}")
        end = at + 8 + numel * declared[key].dtype.itemsize
        storages[key], at = _typed(data[at + 8 : end], declared[key]), end
    stream.seek(start)
    return _interpret(stream, lambda reference: storages[reference.key])


def _typed(data: np.ndarray, reference: _Reference) -> np.ndarray:
    if data.size != reference.numel * reference.dtype.itemsize:
        raise ValueError(f"storage {reference.key!r} has {data.size} bytes, not {reference.numel} x {reference.dtype}")
    return np.require(data.view(reference.dtype), requirements="A")  # the storages of legacy files are not aligned


def _rebuild_tensor(storage: Any, offset: Any, size: Any, stride: Any) -> np.ndarray:
    """Return the view of a 1-d `storage` with offset, size and stride in elements; ValueError if it exceeds it."""
    if not isinstance(storage, np.ndarray) or storage.ndim != 1:
        raise ValueError("a tensor without a storage")
    shapes = type(size) is type(stride) is tuple and len(size) == len(stride)
    if not shapes or any(type(n) is not int or n < 0 for n in (offset, *size, *stride)):
        raise ValueError("a tensor whose offset, size or stride are not non-negative integers")
    if not all(size):
        return storage[:0].reshape(size)
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if last >= storage.size:
        raise ValueError(f"a tensor reaches element {last} of a storage of {storage.size}")
    if math.prod(size) > storage.size:  # an expanded view: a few bytes could represent any number of gigabytes
        raise ValueError(f"a tensor of {size} on a storage of {storage.size} elements; save a clone() of it")
    strides = [step * storage.strides[0] for step in stride]
    return as_strided(storage[offset:], size, strides, writeable=False)


def _rebuild_tensor_v2(storage, offset, size, stride, requires_grad, hooks, metadata=None) -> np.ndarray:
    if metadata:
        raise ValueError("a tensor with a conjugate or negative bit; save it after resolve_conj() and resolve_neg()")
    return _rebuild_tensor(storage, offset, size, stride)


def _ordered_dict(pairs: Any = ()) -> dict:
    items: dict = {}
    for pair in pairs:
        _fill(pair, items)
    return items


_FUNCTIONS: dict[str, Callable] = {
    "torch._utils._rebuild_tensor": _rebuild_tensor,  # before torch 0.4, as in torchvision's vgg16-397923af.pth
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor_v2,
    "torch._utils._rebuild_parameter": lambda data, requires_grad, hooks: data,
    "torch.Size": lambda size: size,
    "collections.OrderedDict": _ordered_dict,
}
_GLOBALS: dict[str, Any] = {f"torch.{name}": dtype for name, (_, dtype) in _DTYPES.items()}
_GLOBALS |= {f"torch.{storage}": dtype for storage, dtype in _DTYPES.values()} | _FUNCTIONS


def _interpret(stream: BufferedIOBase | mmap.mmap, storage: Callable[[_Reference], np.ndarray]) -> Any:
    """Build the object of the pickle at the stream's position; `storage` maps references to arrays."""
    stack: list = []
    marks: list[int] = []
    memo: dict[int, Any] = {}
    push = stack.append

    def pop_from(at: int) -> list:
        items = stack[at:]
        del stack[at:]
        return items

    literals = "BININT BININT1 BININT2 BINFLOAT BINUNICODE SHORT_BINUNICODE BINSTRING SHORT_BINSTRING"
    handlers: dict[str, Callable[[Any], object]] = {
        **dict.fromkeys(literals.split(), push),
        **dict.fromkeys(["LONG1", "LONG4"], lambda number: push(_of_128_bits(number))),
        **dict.fromkeys(["PROTO", "FRAME"], lambda _: None),
        "NONE": lambda _: push(None),
        "NEWTRUE": lambda _: push(True),
        "NEWFALSE": lambda _: push(False),
        "EMPTY_LIST": lambda _: push([]),
        "EMPTY_DICT": lambda _: push({}),
        "EMPTY_TUPLE": lambda _: push(()),
        "MARK": lambda _: marks.append(len(stack)),
        "TUPLE": lambda _: push(tuple(pop_from(marks.pop()))),
        **{f"TUPLE{n}": lambda _, n=n: push(tuple(pop_from(-n))) for n in (1, 2, 3)},
        "APPEND": lambda _: _fill(pop_from(-1), stack[-1]),
        "SETITEM": lambda _: _fill(pop_from(-2), stack[-1]),
        **dict.fromkeys(["APPENDS", "SETITEMS"], lambda _: _fill(pop_from(marks.pop()), stack[-1])),
        **dict.fromkeys(["BINPUT", "LONG_BINPUT"], lambda index: memo.update({index: stack[-1]})),
        "MEMOIZE": lambda _: memo.update({len(memo): stack[-1]}),
        **dict.fromkeys(["BINGET", "LONG_BINGET"], lambda index: push(memo[index])),
        "GLOBAL": lambda names: push(_global(*names.split(" ", 1))),
        "STACK_GLOBAL": lambda _: push(_global(*pop_from(-2))),
        "BINPERSID": lambda _: push(storage(_reference(stack.pop()))),
        "REDUCE": lambda _: push(_call(*pop_from(-2))),
        "BUILD": lambda _: _drop_state(stack[-2], stack.pop()),
    }
    try:
        for opcode, arg, _ in pickletools.genops(stream):
            if opcode.name == "STOP":
                return stack.pop()
            if opcode.name not in handlers:
                argument = f" {arg[:80]!r}" if isinstance(arg, str) else ""
                raise UnsafePickleError(f"it uses the opcode {opcode.name}{argument}, which torch.save never writes")
            handlers[opcode.name](arg)
    except (IndexError, KeyError, TypeError, OverflowError) as error:
        raise ValueError(f"the pickle is damaged ({type(error).__name__}: {error})") from error


def _of_128_bits(number: int) -> int:
    """Return an integer; Python refuses to print those of many digits, and their arithmetic takes time."""
    if number.bit_length() > 128:
        raise ValueError(f"an integer of {number.bit_length()} bits")
    return number


def _global(module: Any, name: Any) -> Any:
    full = f"{module}.{name}" if type(module) is type(name) is str else "something without a name"
    if full not in _GLOBALS:
        raise UnsafePickleError(f"it refers to {full[:80]!r}")
    return _GLOBALS[full]


def _call(function: Any, args: Any) -> Any:
    if type(args) is not tuple or not any(function is allowed for allowed in _FUNCTIONS.values()):
        raise UnsafePickleError(f"it calls a {type(function).__name__} with a {type(args).__name__}")
    return function(*args)


def _drop_state(target: Any, state: Any) -> None:
    # A torch state dict has an attribute `_metadata`, which is dropped: attributes are never set.
    if type(target) is not dict:
        raise UnsafePickleError(f"it sets attributes of a {type(target).__name__}")


def _fill(items: list, target: Any) -> None:
    if type(target) is list:
        target.extend(items)
    # Other keys are refused: hashing a few nested tuples can take exponential time.
    elif type(target) is dict and all(type(key) in (str, int) for key in items[::2]):
        target.update(zip(items[::2], items[1::2], strict=True))
    else:
        raise ValueError("the pickle is damaged, or a dict has keys that are neither strings nor integers")


def _reference(persistent_id: Any) -> _Reference:
    match persistent_id:
        case ("storage", np.dtype() as dtype, str(key), str(), int(numel), *view):
            if numel >= 0 and type(numel) is int and view in ([], [None]):
                return _Reference(dtype, key, numel)
    raise ValueError("a tensor refers to something that is not a storage (type, key, device, number of elements)")
