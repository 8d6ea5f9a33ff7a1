"""Hand-made torch files: hostile pickles, tensors that exceed their storage, missing parts."""

import copyreg
import os
import pickle
import struct
import subprocess
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest

from pisa_jax.runtime.tensor_files import read_tensors, write_safetensors
from pisa_jax.runtime.torch_pickle import UnsafePickleError, read_torch

KINDS = ["zip", "legacy"]
MAGIC = 0x1950A86A20F9469CFC6C


@pytest.fixture
def canary(tmp_path):
    """Path of a file that the hostile pickles would create; it must never exist."""
    path = tmp_path / "canary"
    yield path
    assert not path.exists(), "a hostile pickle was executed"


def torch_file(path: Path, kind: str, data: bytes | None, storages=(), numels=(), **zip_extra):
    """Write a torch file around a pickle; `numels` are the element counts of the legacy format (default: float32)."""
    storages, numels = dict(storages), dict(numels)
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in {"data.pkl": data, "byteorder": b"little", "version": b"3", **zip_extra}.items():
                if content is not None:
                    archive.writestr(f"archive/{name}", content)
            for key, content in storages.items():
                archive.writestr(f"archive/data/{key}", content)
        return path
    system = {"protocol_version": 1001, "little_endian": zip_extra.get("byteorder") != b"big", "type_sizes": {}}
    parts = [pickle.dumps(part, 2) for part in (MAGIC, 1001, system)]
    parts += [data, pickle.dumps(list(storages), 2)]
    parts += [struct.pack("<q", numels.get(key, len(raw) // 4)) + raw for key, raw in storages.items()]
    path.write_bytes(b"".join(parts))
    return path


def text(value: str) -> bytes:
    raw = value.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


def opcodes(obj) -> bytes:
    """Return the opcodes of a plain object, without header, memo and STOP."""
    match obj:
        case bytes():
            return obj
        case bool() | None:
            return {True: b"\x88", False: b"\x89", None: b"N"}[obj]
        case int():
            return pickle.dumps(obj, 2)[2:-1]
        case str():
            return text(obj)
        case tuple():
            return b"(" + b"".join(map(opcodes, obj)) + b"t"
        case dict():
            return b"}(" + b"".join(opcodes(key) + opcodes(value) for key, value in obj.items()) + b"u"
    raise TypeError(obj)


def tensor(key="0", numel=4, offset=0, size=(4,), stride=(1,), storage="FloatStorage", reference=None) -> bytes:
    """Return the opcodes of one tensor as torch writes them."""
    if reference is None:
        reference = ("storage", f"ctorch\n{storage}\n".encode(), key, "cpu", numel)
    args = (opcodes(reference) + b"Q", offset, size, stride, False, b"ccollections\nOrderedDict\n)R")
    return b"ctorch._utils\n_rebuild_tensor_v2\n" + opcodes(args) + b"R"


def pickle_of(body: bytes | dict) -> bytes:
    return b"\x80\x02" + opcodes(body) + b"."


FOUR = np.arange(4, dtype="<f4").tobytes()


def test_reads_tensors_of_torch_before_0_4(tmp_path):
    args = (opcodes(("storage", b"ctorch\nFloatStorage\n", "0", "cpu", 4)) + b"Q", 1, (2,), (2,))
    body = b"ctorch._utils\n_rebuild_tensor\n" + opcodes(args) + b"R"
    path = torch_file(tmp_path / "x.pth", "legacy", pickle_of({"w": body}), {"0": FOUR})
    np.testing.assert_array_equal(read_tensors(path)["w"], np.float32([1, 3]), strict=True)


def test_tensors_are_mapped_and_not_copied(tmp_path):
    raw = np.zeros(2**21, "<f4")
    body = pickle_of({"w": tensor(numel=raw.size, size=(raw.size,))})
    torch_file(tmp_path / "x.pth", "zip", body, {"0": raw.tobytes()})
    write_safetensors(tmp_path / "x.safetensors", {"w": raw}, {})
    for name in ("x.pth", "x.safetensors"):
        tracemalloc.start()
        found = read_tensors(tmp_path / name)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert found["w"].nbytes == 2**23
        assert peak < 2**20, name


class Reduce:
    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def hostile_pickles(canary: Path) -> dict[str, tuple[bytes, str]]:
    """Return name -> (pickle, text that the error message must contain)."""
    command = f"touch {canary}"
    touch = f"__import__('pathlib').Path({str(canary)!r}).touch()"
    state = opcodes({"__code__": 1, "__class__": 2})
    rebuild = b"ctorch._utils\n_rebuild_tensor_v2\n"
    call = opcodes((command,))
    return {
        "reduce": (pickle.dumps({"w": Reduce(os.system, command)}, 2), "posix.system"),
        "stack_global": (pickle.dumps(Reduce(os.system, command), 4), "posix.system"),
        "protocol_0": (pickle.dumps(Reduce(os.system, command), 0), "system"),
        "eval": (b"\x80\x02cbuiltins\neval\n" + opcodes((touch,)) + b"R.", "builtins.eval"),
        "inst": (b"(" + text(command) + b"ios\nsystem\n.", "os system"),
        "obj": (b"(cos\nsystem\n" + text(command) + b"o.", "os.system"),
        "newobj": (b"\x80\x02cos\nsystem\n" + call + b"\x81.", "os.system"),
        "newobj_allowed_class": (b"\x80\x02ccollections\nOrderedDict\n)\x81.", "NEWOBJ"),
        "newobj_ex": (b"\x80\x04ccollections\nOrderedDict\n)}\x92.", "NEWOBJ_EX"),
        "subprocess": (pickle.dumps(Reduce(subprocess.getoutput, command), 2), "getoutput"),
        "dotted_attribute": (b"\x80\x02cos\npath.join\n" + opcodes(("a", "b")) + b"R.", "os.path.join"),
        "attribute_of_allowed": (b"\x80\x02ctorch._utils\n_rebuild_tensor_v2.__globals__\n.", "__globals__"),
        "method_of_allowed": (b"\x80\x02ccollections\nOrderedDict.fromkeys\n.", "OrderedDict.fromkeys"),
        "attribute_in_module": (
            b"\x80\x04" + text("collections.OrderedDict") + text("__init__") + b"\x93.",
            "__init__",
        ),
        "global_by_number": (b"\x80\x04K\x01K\x02\x93.", "without a name"),
        "getattr": (b"\x80\x02cbuiltins\ngetattr\n.", "builtins.getattr"),
        "nested_load": (b"\x80\x02ctorch.storage\n_load_from_bytes\n.", "torch.storage._load_from_bytes"),
        "torch_load": (b"\x80\x02ctorch\nload\n.", "torch.load"),
        "copyreg": (b"\x80\x02ccopyreg\n_reconstructor\n.", "copyreg._reconstructor"),
        "copyreg_python_2": (b"\x80\x02ccopy_reg\n_reconstructor\n.", "copy_reg._reconstructor"),
        "extension": (b"\x80\x02\x82\xf0" + call + b"R.", "EXT1"),
        "extension_2": (b"\x80\x02\x83\xf0\x00" + call + b"R.", "EXT2"),
        "extension_4": (b"\x80\x02\x84\xf0\x00\x00\x00" + call + b"R.", "EXT4"),
        "text_persistent_id": (b"Pos.system\n.", "PERSID"),
        "call_a_string": (b"\x80\x02" + text("os.system") + call + b"R.", "a str"),
        "call_a_dtype": (b"\x80\x02ctorch\nfloat32\n" + call + b"R.", "Float32DType"),
        "call_without_tuple": (b"\x80\x02" + rebuild + text(command) + b"R.", "with a str"),
        "build_function": (b"\x80\x02" + rebuild + state + b"b.", "attributes of a function"),
        "build_dtype": (b"\x80\x02ctorch\nfloat32\n" + state + b"b.", "attributes of a Float32DType"),
        "build_list": (b"\x80\x02]" + state + b"b.", "attributes of a list"),
        "escape_codes": (b"\x80\x02c\x1b[2Jos\nsystem\n.", r"'\\x1b\[2Jos.system'"),
    }


HOSTILE = list(hostile_pickles(Path("canary")))


@pytest.mark.parametrize("kind", [*KINDS, "bare"])
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_pickles_are_refused_by_name(name, kind, tmp_path, canary):
    data, named = hostile_pickles(canary)[name]
    path = tmp_path / "x.pth"
    copyreg.add_extension("os", "system", 0xF0)
    try:
        path.write_bytes(data) if kind == "bare" else torch_file(path, kind, data)
        with pytest.raises(UnsafePickleError, match=f"nothing in it was executed.*{named}"):
            read_tensors(path)
    finally:
        copyreg.remove_extension("os", "system", 0xF0)


def test_the_standard_unpickler_executes_the_hostile_pickles(tmp_path):
    canary = tmp_path / "canary"
    for name in ("reduce", "inst", "obj", "stack_global", "eval"):
        pickle.loads(hostile_pickles(canary)[name][0])
        assert canary.exists()
        canary.unlink()


def test_build_sets_no_attributes_of_dicts(tmp_path):
    state = {"items": b"ctorch._utils\n_rebuild_tensor_v2\n", "__class__": b"ctorch\nfloat32\n", "_metadata": 1}
    body = b"\x80\x02ccollections\nOrderedDict\n)R" + opcodes({"a": 1})[1:] + opcodes(state) + b"b."
    found = read_torch(torch_file(tmp_path / "x.pth", "zip", body))
    assert type(found) is dict
    assert found == {"a": 1}
    assert not hasattr(found, "_metadata")


def test_build_on_a_tensor_is_refused(tmp_path):
    body = pickle_of(tensor() + opcodes({"shape": 1}) + b"b")
    with pytest.raises(UnsafePickleError, match="attributes of a ndarray"):
        read_torch(torch_file(tmp_path / "x.pth", "zip", body, {"0": FOUR}))


@pytest.mark.parametrize(
    "reference",
    [
        "0",
        7,
        (),
        ("storage",),
        ("module", "a", "b", "c"),
        ("storage", "torch.FloatStorage", "0", "cpu", 4),
        ("storage", b"ctorch._utils\n_rebuild_tensor_v2\n", "0", "cpu", 4),
        ("storage", b"ctorch\nFloatStorage\n", 0, "cpu", 4),
        ("storage", b"ctorch\nFloatStorage\n", "0", "cpu", -4),
        ("storage", b"ctorch\nFloatStorage\n", "0", "cpu", True),
        ("storage", b"ctorch\nFloatStorage\n", "0", "cpu", "4"),
        ("storage", b"ctorch\nFloatStorage\n", "0", "cpu", 4, ("0", 1, 2)),
        ("storage", b"ctorch\nFloatStorage\n", "0", "cpu", 4, None, None),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_references_to_storages_are_validated(reference, kind, tmp_path):
    path = torch_file(tmp_path / "x.pth", kind, pickle_of(tensor(reference=reference)), {"0": FOUR})
    with pytest.raises(ValueError, match="not a storage"):
        read_torch(path)


@pytest.mark.parametrize("key", ["../data.pkl", "/etc/passwd", "1", ""])
def test_storage_keys_are_limited_to_the_storages_of_the_file(key, tmp_path):
    with pytest.raises(ValueError, match="missing from the archive"):
        read_torch(torch_file(tmp_path / "x.pth", "zip", pickle_of(tensor(key=key)), {"0": FOUR}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stride": (2,)}, "reaches element 6 of a storage of 4"),
        ({"offset": 1}, "reaches element 4 of a storage of 4"),
        ({"size": (5,)}, "reaches element 4"),
        ({"size": (2, 2), "stride": (3, 2)}, "reaches element 5"),
        ({"size": (2**62, 2**62), "stride": (2**62, 1)}, "reaches element"),
        ({"size": (2**40,), "stride": (0,)}, "clone"),
        ({"size": (8,), "stride": (0,)}, "clone"),
        ({"offset": -1}, "non-negative"),
        ({"stride": (-1,)}, "non-negative"),
        ({"size": (-4,)}, "non-negative"),
        ({"size": (True,)}, "non-negative"),
        ({"size": ("4",)}, "non-negative"),
        ({"size": (2, 2)}, "non-negative"),
        ({"size": 4}, "non-negative"),
        ({"numel": 5}, "storage '0'"),
        ({"numel": 3, "size": (3,)}, "storage '0'"),
        ({"numel": 2**62}, "storage '0'|too big"),
        ({"numel": 2**70}, "storage '0'|dimension exceeded"),
        ({"storage": "DoubleStorage"}, "storage '0' has 16 bytes, not 4 x float64"),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_tensors_stay_inside_their_storage(change, message, kind, tmp_path):
    path = torch_file(tmp_path / "x.pth", kind, pickle_of(tensor(**change)), {"0": FOUR})
    with pytest.raises(ValueError, match=message):
        read_torch(path)


def test_a_tensor_as_storage_does_not_bypass_the_bounds(tmp_path):
    # The storage of the outer tensor is a strided view of two elements.
    inner = tensor(size=(2,), stride=(2,))
    outer = b"ctorch._utils\n_rebuild_tensor\n" + opcodes((inner, 0, (3,), (1,))) + b"R"
    with pytest.raises(ValueError, match="reaches element 2 of a storage of 2"):
        read_torch(torch_file(tmp_path / "x.pth", "zip", pickle_of(outer), {"0": FOUR}))


def test_contradicting_declarations_of_a_storage_are_refused(tmp_path):
    small = tensor(numel=4)
    for large in (tensor(numel=400, size=(400,)), tensor(storage="DoubleStorage")):
        for pair in ({"a": small, "b": large}, {"a": large, "b": small}):
            with pytest.raises(ValueError, match="storage '0' is declared in two ways"):
                read_torch(torch_file(tmp_path / "x.pth", "legacy", pickle_of(pair), {"0": FOUR}))


# ((((1,), (1,)), ...: a tuple of 2^60 leaves in 180 bytes. Hashing, comparing or formatting it would never end.
NESTED = b"K\x01" + b"\x85" + b"q\x01h\x01\x86" * 60


@pytest.mark.parametrize(
    "body",
    [b"}" + NESTED + b"K\x01s", NESTED + b"Q", NESTED + b")R", NESTED + NESTED + b"\x93"],
    ids=["dict key", "persistent id", "function", "global"],
)
def test_exponentially_nested_tuples_are_refused_without_traversal(body, tmp_path):
    with pytest.raises(ValueError, match=r"cannot be read|nothing in it was executed"):
        read_torch(torch_file(tmp_path / "x.pth", "zip", b"\x80\x02" + body + b"."))


def test_deeply_nested_lists_are_read_without_recursion(tmp_path):
    deep = b"]" * 100_000 + b"a" * 99_999
    found = read_torch(torch_file(tmp_path / "x.pth", "zip", b"\x80\x02" + deep + b"."))
    depth = 0
    while found:
        (found,) = found
        depth += 1
    assert depth == 99_999


def test_a_large_memo_index_allocates_nothing(tmp_path):
    path = torch_file(tmp_path / "x.pth", "zip", b"\x80\x02Nr\xff\xff\xff\xff")  # without STOP
    tracemalloc.start()
    with pytest.raises(ValueError, match="cannot be read"):
        read_torch(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20


def test_missing_parts_are_reported(tmp_path):
    path = tmp_path / "x.pth"
    body = pickle_of({"w": tensor()})
    with pytest.raises(ValueError, match=r"without data\.pkl"):
        read_torch(torch_file(path, "zip", None, {"0": FOUR}, **{"data.pkl": None}))
    with pytest.raises(ValueError, match="storage '0' is missing"):
        read_torch(torch_file(path, "zip", body, {"1": FOUR}))
    with pytest.raises(ValueError, match="differs from the storages"):
        read_torch(torch_file(path, "legacy", body, {"1": FOUR}))
    with pytest.raises(ValueError, match="5 elements, not 4"):
        read_torch(torch_file(path, "legacy", body, {"0": FOUR}, numels={"0": 5}))
    with pytest.raises(FileNotFoundError):
        read_torch(tmp_path / "none.pth")
    with pytest.raises(IsADirectoryError):
        read_torch(tmp_path)


def test_big_endian_files_are_refused(tmp_path):
    path = tmp_path / "x.pth"
    with pytest.raises(ValueError, match="big-endian"):
        read_torch(torch_file(path, "zip", pickle_of({"w": tensor()}), {"0": FOUR}, byteorder=b"big"))
    read_torch(torch_file(path, "zip", pickle_of({"w": tensor()}), {"0": FOUR}, byteorder=None))
    with pytest.raises(ValueError, match="big-endian"):
        read_torch(torch_file(path, "legacy", pickle_of({"w": tensor()}), {"0": FOUR}, byteorder=b"big"))


def test_compressed_archives_are_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(10_000))
    with pytest.raises(ValueError, match="compressed"):
        read_torch(tmp_path / "x.pth")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"w": 1, "x": "text"}, r"found a dict \{'w': int, 'x': str\}"),
        (opcodes(3), "found a int"),
        ({}, r"found a dict \{\}"),
        (tensor(), "found a ndarray"),
        ({"state_dict": {"w": 1}}, "'w': int"),
    ],
)
def test_read_tensors_accepts_only_flat_dicts_of_tensors(body, message, tmp_path):
    path = torch_file(tmp_path / "x.pth", "zip", pickle_of(body), {"0": FOUR})
    with pytest.raises(ValueError, match=message):
        read_tensors(path)


def test_an_integer_of_thousands_of_digits(tmp_path):
    """Python refuses to print it, also in a message."""
    path = torch_file(tmp_path / "x.pth", "zip", pickle_of({10**5000: 1}))
    with pytest.raises(ValueError, match=r"x\.pth cannot be read as a torch file: an integer of 16610 bits"):
        read_torch(path)
