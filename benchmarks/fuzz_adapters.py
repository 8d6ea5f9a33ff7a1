"""Sound adapter and checkpoint files, and mutations of their structure: pickle opcodes, zip directories, headers.

The sound files hold a few layers of the demo's adapters in every format that is read.
"""

import collections
import io
import json
import pickle
import pickletools
import random
import struct
import sys
import tempfile
import types
import warnings
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import fuzz_bytes
import numpy as np

from pisa_jax.adapters.adapter_tree import Adapters
from pisa_jax.adapters.files import export_pisa_sr, load_adapters, save_adapters
from pisa_jax.adapters.pisa_sr_file import unet_part
from pisa_jax.config import AdapterSpec
from pisa_jax.runtime.tensor_files import read_tensors
from pisa_jax.sd.pretrained import DEMO

SENTINEL = "code_was_run"  # in the working folder of the reader
LAYERS = 2  # of each adapter: small files get denser mutations
DEEP = 100_000

_COMMAND = f"touch {SENTINEL}".encode()
_PYTHON = f"open('{SENTINEL}', 'w')".encode()
_LONG = b"x" * DEEP
# Opcodes that push one object: hostile calls, objects that take exponential time or endless recursion, huge values.
SNIPPETS: dict[str, bytes] = {
    "os.system": b"cos\nsystem\nU" + bytes([len(_COMMAND)]) + _COMMAND + b"\x85R",
    "posix.system": b"\x8c\x05posix\x8c\x06system\x93U" + bytes([len(_COMMAND)]) + _COMMAND + b"\x85R",
    "eval": b"cbuiltins\neval\nU" + bytes([len(_PYTHON)]) + _PYTHON + b"\x85R",
    "inst": b"(U" + bytes([len(_COMMAND)]) + _COMMAND + b"ios\nsystem\n",
    "obj": b"(cos\nsystem\nU" + bytes([len(_COMMAND)]) + _COMMAND + b"o",
    "newobj": b"cbuiltins\neval\nU" + bytes([len(_PYTHON)]) + _PYTHON + b"\x85\x81",
    "build": b"ccollections\nOrderedDict\n)R}U\x09__class__U\x01xsb",
    "extension": b"\x82\x01",
    "function": b"ctorch._utils\n_rebuild_tensor_v2\n",
    "dtype": b"ctorch\nFloatStorage\n",
    "tuple of tuples": b")" + b"\x85" * DEEP,
    "list of lists": b"]" * DEEP + b"a" * (DEEP - 1),
    "doubled tuple": b")" + b"q\xffh\xff\x86" * 64,
    "list in itself": b"]q\xffh\xffa",
    "dict in itself": b"}q\xffU\x01xh\xffs",
    "long text": b"X" + struct.pack("<I", DEEP) + _LONG,
    "control characters": b"X\x08\x00\x00\x00a\nb\x1b[31m",
    "surrogate": b"X\x03\x00\x00\x00\xed\xa0\x80",
    "large integer": b"\x8b" + struct.pack("<i", 5000) + b"\x7f" * 5000,
    "negative": b"J\xff\xff\xff\xff",
    "zero": b"K\x00",
    "nan": b"G\x7f\xf8\x00\x00\x00\x00\x00\x00",
    "none": b"N",
    "true": b"\x88",
    "text": b"U\x01x",
    "dict": b"}",
}
# Values in the headers of safetensors files and in their metadata; DEEPLY stands for many nested lists.
DEEPLY = "@deeply nested@"
VALUES: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    1,
    1.5,
    float("nan"),
    float("inf"),
    2**31,
    2**63,
    2**64,
    10**4000,
    "",
    "x" * DEEP,
)
VALUES += (
    "\ud800",
    "a\nb\x1b[31m",
    "4",
    [],
    [[]],
    {},
    DEEPLY,
    "loha",
    "(" * 2000,
    "a{99999999999999999999}",
    "F64",
    "F8_E4M3",
)
NAMES = (
    "",
    "/",
    "a",
    "pix/a/b",
    "pix//a",
    "sem/" + "x" * DEEP + "/a",
    "\ud800",
    "a\nb\x1b[31m",
    "__metadata__",
    "pix/../../a",
)


def adapter_seeds() -> list[tuple[str, str, bytes]]:
    """Return (kind, suffix, content) of every sound file, the same list on every call."""
    whole = load_adapters(DEMO / "adapters.safetensors")
    trees = {name: dict(list(tree.items())[:LAYERS]) for name, tree in whole.trees.items()}
    trees = {name: {path: _narrow(factors) for path, factors in tree.items()} for name, tree in trees.items()}
    lora = Adapters(trees, whole.specs, whole.base_model)
    loha_spec = AdapterSpec(decomposition="loha", rank=2)
    factors = {"a1": (3, 2), "b1": (2, 4), "a2": (3, 2), "b2": (2, 4)}
    loha_tree = {"mid_block/resnets_0/conv_shortcut": {k: np.ones(shape, np.float32) for k, shape in factors.items()}}
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / name for name in ("ours", "half", "loha", "original")]
        save_adapters(paths[0], lora)
        save_adapters(paths[1], lora, "float16")
        save_adapters(paths[2], Adapters({"pix": loha_tree}, {"pix": loha_spec}, None))
        export_pisa_sr(paths[3], lora)
        state = dict(read_tensors(paths[3]))
        contents = [path.read_bytes() for path in paths]
    pkl = _published(state, {name: spec.rank for name, spec in lora.specs.items()})
    return [
        *(("adapters", ".safetensors", content) for content in contents),
        ("adapters", ".pkl", torch_zip(pkl)),
        ("adapters", ".pkl", torch_legacy(pkl)),
        ("checkpoint", ".bin", torch_zip({"state_dict": state})),
        ("checkpoint", ".safetensors", contents[3]),
    ]


def mutate_adapters(data: bytes, others: Sequence[bytes], rng: random.Random) -> tuple[bytes, list[str]]:
    """Mutate the bytes of a file, or one to three times its structure; returns the new content and what was done."""
    if rng.random() < 0.4:
        return fuzz_bytes.mutate(data, others, rng)
    done = []
    for _ in range(rng.choice((1, 1, 2, 3))):
        mutation = mutate_header if data[8:9] == b"{" else rng.choice((mutate_pickle, mutate_pickle, mutate_archive))
        try:
            data, name = mutation(data, rng)
        except Exception:  # an earlier mutation destroyed the structure
            break
        done.append(name)
    return data, done


def mutate_pickle(data: bytes, rng: random.Random) -> tuple[bytes, str]:
    """Change an opcode of the pickle in a torch file."""
    if not data.startswith(b"PK"):
        return _mutate_opcodes(data, rng)
    records = _records(data)
    index = next(i for i, (name, _) in enumerate(records) if name.endswith("data.pkl"))
    changed, name = _mutate_opcodes(records[index][1], rng)
    records[index] = (records[index][0], changed)
    return _archive(records), name


def _mutate_opcodes(data: bytes, rng: random.Random) -> tuple[bytes, str]:
    """Delete, repeat, exchange or replace an opcode of the pickles at the start of `data`."""
    opcodes = _opcodes(data)
    (kind, start, end), (_, first, last) = sorted((rng.choice(opcodes), rng.choice(opcodes)), key=lambda each: each[1])
    match rng.choice(("delete", "repeat", "swap", "code", *["snippet"] * 6)):
        case "delete":
            return data[:start] + data[end:], f"delete {kind}"
        case "repeat":
            return data[:end] + data[start:end] * rng.choice((1, 3)) + data[end:], f"repeat {kind}"
        case "swap" if end <= first:
            return data[:start] + data[first:last] + data[end:first] + data[start:end] + data[last:], "swap opcodes"
        case "code" | "swap":
            return data[:start] + rng.choice(pickletools.opcodes).code.encode("latin1") + data[
                start + 1 :
            ], "other code"
    literals = [each for each in opcodes if each[0].startswith(("BININT", "BINUNICODE", "NEWFALSE", "EMPTY"))]
    kind, start, end = rng.choice(literals or opcodes)
    name = rng.choice(list(SNIPPETS))
    return data[:start] + SNIPPETS[name] + data[end:], f"{name} for {kind}"


def mutate_archive(data: bytes, rng: random.Random) -> tuple[bytes, str]:
    """Change the records of a zip archive, or a field of its directory; the start of a legacy file."""
    if not data.startswith(b"PK"):
        return fuzz_bytes.extreme_length(data, rng), "extreme_length"
    records = _records(data)
    index = rng.randrange(len(records))
    name, content = records[index]
    match rng.choice(("drop", "twice", "rename", "resize", "compress", *["directory"] * 4)):
        case "drop":
            return _archive(records[:index] + records[index + 1 :]), f"drop {name}"
        case "twice":
            return _archive([*records, (name, content[::-1])]), f"twice {name}"
        case "rename":
            records[index] = (rng.choice((*NAMES[:5], "../../x", "archive/data/0", "archive/data.pkl")), content)
            return _archive(records), f"rename {name}"
        case "resize":
            records[index] = (name, content[: len(content) // 2] if rng.random() < 0.5 else content + content)
            return _archive(records), f"resize {name}"
        case "compress":
            return _archive(records, zipfile.ZIP_DEFLATED), "compress"
    start = rng.choice([start for start, _ in fuzz_bytes.zip_headers(data) if data[start + 2] != 3])
    size = rng.choice((1, 2, 4, 8))
    value = rng.choice(fuzz_bytes.LIMITS)(8 * size).to_bytes(size, "little")
    at = start + rng.randrange(4, 46)
    return data[:at] + value + data[at + size :], "directory"


def mutate_header(data: bytes, rng: random.Random) -> tuple[bytes, str]:
    """Change the header of a safetensors file: lengths, names, shapes, dtypes, offsets, metadata."""
    size = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + size]), data[8 + size :]
    tensors = [name for name in header if name != "__metadata__"]
    entry = header[rng.choice(tensors)]
    match rng.choice(("dtype", "shape", "offset", "rename", "drop", *["metadata"] * 3, "any", "size")):
        case "dtype":
            entry["dtype"], done = (
                rng.choice(("F64", "F32", "F16", "BF16", "I64", "U8", "BOOL", "F8_E5M2", "")),
                "dtype",
            )
        case "shape":
            entry["shape"], done = rng.choice(([], entry["shape"][::-1], [*entry["shape"], 1], [0], [1] * 70)), "shape"
        case "offset":
            entry["data_offsets"], done = header[rng.choice(tensors)]["data_offsets"], "offset"
        case "rename":
            header[rng.choice(NAMES)], done = header.pop(rng.choice(tensors)), "rename"
        case "drop":
            done = f"drop {rng.choice([*header])}"
            del header[done.removeprefix("drop ")]
        case "metadata":
            metadata = header.setdefault("__metadata__", {})
            text = json.loads(metadata.get("pisa_jax", "{}"))
            _change_leaf(text, rng)
            metadata["pisa_jax"], done = _dump(text), "metadata"
        case "any":
            done = f"any {_change_leaf(header, rng)}"
        case "size":
            changed = rng.choice([limit(64) for limit in fuzz_bytes.LIMITS] + [size - 1, size + 1])
            return struct.pack("<Q", changed) + data[8:], "size"
    text = _dump(header).encode()
    return struct.pack("<Q", len(text)) + text + body, done


def torch_zip(content: Any) -> bytes:
    """Encode arrays in plain containers as `torch.save` does."""
    storages: list[bytes] = []
    pickled = _pickle(content, storages)
    records = [("data.pkl", pickled), ("byteorder", b"little"), ("version", b"3\n")]
    records += [(f"data/{key}", storage) for key, storage in enumerate(storages)]
    return _archive([(f"archive/{name}", record) for name, record in records])


def torch_legacy(content: Any) -> bytes:
    """Encode arrays in plain containers as `torch.save` did before its release 1.6."""
    storages: list[bytes] = []
    system = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}
    parts = [pickle.dumps(part, 2) for part in (0x1950A86A20F9469CFC6C, 1001, system)]
    parts += [_pickle(content, storages), pickle.dumps([str(key) for key in range(len(storages))], 2)]
    return b"".join([*parts, *(struct.pack("<q", len(storage) // 4) + storage for storage in storages)])


def _published(state: dict[str, np.ndarray], ranks: dict[str, int]) -> dict[str, Any]:
    """Return the content of a `pisa_sr.pkl` with these tensors."""
    content: dict[str, Any] = {f"lora_rank_unet_{name}": rank for name, rank in ranks.items()}
    for name in ranks:
        keys = [key for key in state if f"_{name}.weight" in key and ".lora_A." in key]
        modules = [key.partition(".lora_A.")[0] for key in keys]
        for part in ("encoder", "decoder", "others"):
            content[f"unet_lora_{part}_modules_{name}"] = [each for each in modules if unet_part(each) == part]
    return content | {"state_dict_unet": state}


def _narrow(factors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Keep eight input and eight output channels of a layer."""
    return {"a": np.ascontiguousarray(factors["a"][..., :8, :]), "b": np.ascontiguousarray(factors["b"][..., :8])}


def _pickle(content: Any, storages: list[bytes]) -> bytes:
    """Pickle `content` as torch does, and append the bytes of its arrays to `storages`."""
    torch, utils = types.ModuleType("torch"), types.ModuleType("torch._utils")
    torch.FloatStorage = type("FloatStorage", (), {"__module__": "torch"})
    utils._rebuild_tensor_v2 = types.FunctionType((lambda: None).__code__, {}, "_rebuild_tensor_v2")
    utils._rebuild_tensor_v2.__module__ = "torch._utils"
    utils._rebuild_tensor_v2.__qualname__ = "_rebuild_tensor_v2"

    class Storage(int):
        """The number of a storage."""

    class Pickler(pickle._Pickler):  # the one in C writes other opcodes for the same objects
        def persistent_id(self, each: Any) -> Any:
            if type(each) is Storage:
                return ("storage", torch.FloatStorage, str(int(each)), "cpu", len(storages[each]) // 4)
            return None

        def reducer_override(self, each: Any) -> Any:
            if not isinstance(each, np.ndarray):
                return NotImplemented
            storages.append(each.astype("<f4").tobytes())
            stride = tuple(step // each.itemsize for step in np.ascontiguousarray(each).strides)
            arguments = (Storage(len(storages) - 1), 0, each.shape, stride, False, collections.OrderedDict())
            return utils._rebuild_tensor_v2, arguments

    file = io.BytesIO()
    with mock.patch.dict(sys.modules, {"torch": torch, "torch._utils": utils}):
        Pickler(file, 2).dump(content)
    return file.getvalue()


def _opcodes(data: bytes) -> list[tuple[str, int, int]]:
    """Return (name, start, end) of the opcodes of the pickles at the start of `data`; ValueError if there are none."""
    stream, starts, end = io.BytesIO(data), [], 0
    try:
        while end < len(data):
            starts += [(opcode.name, at) for opcode, _, at in pickletools.genops(stream)]
            end = stream.tell()
    except ValueError:  # the storages of a legacy file
        if not starts:
            raise
    ends = [start for _, start in starts[1:]] + [end]
    return [(name, start, end) for (name, start), end in zip(starts, ends, strict=True)]


def _records(data: bytes) -> list[tuple[str, bytes]]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return [(entry.filename, archive.read(entry)) for entry in archive.infolist()]


def _archive(records: Sequence[tuple[str, bytes]], compression: int = zipfile.ZIP_STORED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of two records with one name
        for name, content in records:
            # A fixed date: the same records give the same bytes.
            archive.writestr(zipfile.ZipInfo(name.encode(errors="replace").decode()), content, compression)
    return file.getvalue()


def _change_leaf(tree: Any, rng: random.Random) -> str:
    """Replace a value somewhere in a JSON tree, change its name or remove it; returns the path."""
    path = []
    while isinstance(tree, dict | list) and tree:
        key = rng.choice([*tree]) if isinstance(tree, dict) else rng.randrange(len(tree))
        path.append(str(key))
        if not (isinstance(tree[key], dict | list) and tree[key]) or rng.random() < 0.1:
            if isinstance(tree, dict) and rng.random() < 0.3:
                value = tree.pop(key)
                if rng.random() < 0.5:
                    tree[rng.choice(NAMES)] = value
            else:
                tree[key] = rng.choice(VALUES)
            break
        tree = tree[key]
    return "/".join(path)


def _dump(tree: Any) -> str:
    return json.dumps(tree).replace(f'"{DEEPLY}"', "[" * DEEP + "]" * DEEP)
