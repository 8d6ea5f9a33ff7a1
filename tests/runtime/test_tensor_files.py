"""Tensor files of torch and safetensors: reading, writing, damaged files, memory."""

import os
import pickle
import random
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from conftest import DATA, golden
from safetensors import safe_open

from pisa_jax.runtime import distributed
from pisa_jax.runtime.tensor_files import read_metadata, read_tensors, release_mapped_pages, write_safetensors
from pisa_jax.runtime.torch_pickle import read_torch

FILES = DATA / "weights"
KINDS = ["zip", "legacy"]


@pytest.fixture(scope="module")
def expected():
    return dict(np.load(FILES / "expected.npz"))


def check(found: dict, expected: dict):
    assert list(found) == list(expected)
    for name, array in expected.items():
        values = found[name]
        if values.dtype == ml_dtypes.bfloat16:
            values = values.astype(np.float32)
        assert values.dtype == array.dtype, name
        np.testing.assert_array_equal(values, array, strict=True, err_msg=name)


def tensor_values(expected):
    return {name: array for name, array in expected.items() if not name.startswith("module/")}


@pytest.mark.parametrize("kind", KINDS)
def test_reads_every_dtype_view_and_parameter(kind, expected):
    found = read_tensors(FILES / f"nested_{kind}.pth")
    check(found, tensor_values(expected))
    assert found["dtype_bfloat16"].dtype == ml_dtypes.bfloat16


@pytest.mark.parametrize("kind", KINDS)
def test_reads_other_values_than_tensors(kind):
    found = read_torch(FILES / f"nested_{kind}.pth")
    assert found["epoch"] == 3
    assert found["rate"] == 1e-4
    assert found["names"] == ["a", "b", ("c", None, True)]
    assert found["size"] == (2, 3)
    assert found["dtype"] == ml_dtypes.bfloat16
    assert found["big"] == 2**70
    assert type(found["state_dict"]) is dict


@pytest.mark.parametrize("kind", KINDS)
def test_storages_are_shared_as_in_the_file(kind):
    found = read_torch(FILES / f"nested_{kind}.pth")
    state = found["state_dict"]
    for name in ("transposed", "row", "column", "block"):
        assert np.shares_memory(state["whole"], state[name]), name
    assert np.shares_memory(state["whole"], found["again"])
    assert not np.shares_memory(state["whole"], state["channels_last"])
    assert not any(array.flags.writeable for array in state.values() if array.size)
    assert all(array.flags.aligned for array in state.values())


@pytest.mark.parametrize("kind", KINDS)
def test_reads_module_state_dicts_with_metadata_attribute(kind, expected):
    found = read_tensors(FILES / f"module_{kind}.pth")
    check({f"module/{name}": array for name, array in found.items()}, dict(list(expected.items())[-len(found) :]))
    assert type(read_torch(FILES / f"module_{kind}.pth")) is dict


def test_reads_other_pickle_protocols(expected):
    check(read_tensors(FILES / "protocol4_zip.pth"), tensor_values(expected))


def test_reads_files_written_by_python_2():
    found = read_tensors(FILES / "lpips_vgg_python2.pth")
    assert [array.shape for array in found.values()] == [(1, n, 1, 1) for n in (64, 128, 256, 512, 512)]
    heads = np.load(golden("train/lpips_lin.npz"))
    for index, array in enumerate(found.values()):
        np.testing.assert_array_equal(array, heads[f"lin{index}"], strict=True)


def test_reads_the_published_checkpoint_format():
    found = read_torch(golden("pisa_sr.pkl"))
    state = read_tensors(golden("pisa_sr_state_dict.safetensors"))
    assert found["lora_rank_unet_pix"] == 4
    assert set(found["state_dict_unet"]) == set(state)
    for name, array in state.items():
        np.testing.assert_array_equal(found["state_dict_unet"][name], array, strict=True)


def test_truncated_files_are_refused(tmp_path):
    for path in FILES.glob("*.pth"):
        whole = path.read_bytes()
        for size in {0, 1, 2, 9, *range(10, len(whole), max(1, len(whole) // 50)), len(whole) - 1}:
            (tmp_path / "x.pth").write_bytes(whole[:size])
            with pytest.raises(ValueError, match=r"x\.pth"):
                read_tensors(tmp_path / "x.pth")


def outcome(path):
    try:
        return read_torch(path)
    except ValueError as error:
        return error


def test_random_damage_gives_only_clear_errors(tmp_path):
    rng = random.Random(0)
    target = tmp_path / "x.pth"
    for path in sorted(FILES.glob("*.pth")):
        whole = path.read_bytes()
        for _ in range(200):
            damaged = bytearray(whole)
            for _ in range(rng.choice([1, 1, 3, 30])):
                damaged[rng.randrange(len(damaged))] = rng.choice([0, 0x2E, 0x52, 0x62, 0xFF, rng.randrange(256)])
            target.write_bytes(damaged)
            found = outcome(target)
            assert not isinstance(found, ValueError) or str(target) in str(found)
            str(found)  # every element can be accessed


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty"),
        (b"hello, world, this is text", "pickle|opcode"),
        (b"\x89PNG\r\n\x1a\n" + bytes(50), "pickle|opcode"),
    ],
)
def test_files_of_other_formats_are_refused(content, message, tmp_path):
    (tmp_path / "x.pth").write_bytes(content)
    with pytest.raises(ValueError, match=rf"x\.pth.*({message})"):
        read_tensors(tmp_path / "x.pth")


def test_plain_pickles_are_refused(tmp_path):
    (tmp_path / "x.pkl").write_bytes(pickle.dumps({"a": 1}, 2))
    with pytest.raises(ValueError, match="magic number"):
        read_tensors(tmp_path / "x.pkl")


def sample_tensors():
    rng = np.random.default_rng(0)
    return {
        "f32": rng.normal(size=(3, 4)).astype(np.float32),
        "bf16": rng.normal(size=5).astype(ml_dtypes.bfloat16),
        "f16": rng.normal(size=(2, 1)).astype(np.float16),
        "i64": rng.integers(-9, 9, 4),
        "bool": np.array([True, False]),
        "scalar": np.array(2.5),
        "empty": np.zeros((0, 3), np.float32),
        "transposed": rng.normal(size=(3, 4)).T,
        "big_endian": np.arange(3, dtype=">f4"),
    }


def test_safetensors_round_trip(tmp_path):
    path = tmp_path / "x.safetensors"
    tensors = sample_tensors()
    write_safetensors(path, {**tensors, "jax": jnp.arange(3.0)}, {"note": "a\nb"})
    found = read_tensors(path)
    assert set(found) == {*tensors, "jax"}
    for name, array in tensors.items():
        assert found[name].dtype == array.dtype.newbyteorder("<"), name
        np.testing.assert_array_equal(found[name], array, err_msg=name)
    assert read_metadata(path) == {"note": "a\nb"}
    with safe_open(path, "numpy") as file:
        for name in found:
            np.testing.assert_array_equal(file.get_tensor(name), found[name], strict=True)


def test_equal_input_gives_equal_bytes(tmp_path):
    for name in ("a", "b"):
        write_safetensors(tmp_path / name, sample_tensors(), {"note": "x"})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_failed_write_keeps_the_old_file_and_leaves_no_other(tmp_path, monkeypatch):
    path = tmp_path / "x.safetensors"
    write_safetensors(path, {"a": np.ones(2)}, {})
    before = path.read_bytes()
    with pytest.raises(OSError, match="cannot write"):
        write_safetensors(path, {"a": np.ones(2, np.complex256)}, {})
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_safetensors(path, {"a": np.zeros(2)}, {})
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["x.safetensors"]


def test_written_files_have_the_permissions_of_the_umask(tmp_path):
    write_safetensors(tmp_path / "a", {"a": np.ones(2)}, {})
    (tmp_path / "b").touch()
    assert os.stat(tmp_path / "a").st_mode == os.stat(tmp_path / "b").st_mode


def test_writing_to_a_missing_folder_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        write_safetensors(tmp_path / "none" / "x", {"a": np.ones(2)}, {})


def test_a_mapped_file_can_be_replaced(tmp_path):
    path = tmp_path / "x"
    write_safetensors(path, {"a": np.ones(2)}, {})
    first = read_tensors(path)["a"]
    write_safetensors(path, {"a": first + 1}, {})
    np.testing.assert_array_equal(first, 1)
    np.testing.assert_array_equal(read_tensors(path)["a"], 2)


def test_damaged_safetensors_are_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    write_safetensors(path, sample_tensors(), {"note": "x"})
    whole = path.read_bytes()
    for size in (9, 50, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"x\.safetensors is damaged"):
            read_tensors(path)
    path.write_bytes(whole.replace(b'"F16"', b'"C64"'))
    with pytest.raises(ValueError, match=r"x\.safetensors"):
        read_tensors(path)
    with pytest.raises(FileNotFoundError):
        read_tensors(tmp_path / "none.safetensors")


def mapped_kib():
    """Return the resident memory that is mapped from files."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssFile"))
    return int(line.split()[1])


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="resident memory is read from /proc")
@pytest.mark.parametrize("transposed", [True, False])
def test_global_arrays_of_a_mapped_file_leave_no_page_of_it_in_memory(tmp_path, transposed):
    values = np.arange(8 * 2**20, dtype=np.float32).reshape(2048, -1)
    write_safetensors(tmp_path / "a.safetensors", {"a": values}, {})
    view = read_tensors(tmp_path / "a.safetensors")["a"]
    tree = {"a": view.T if transposed else view}
    before = mapped_kib()
    made = distributed.make_global_arrays(tree, {"a": distributed.replicated(distributed.make_mesh(data=1))})
    assert mapped_kib() - before < 0.1 * values.nbytes / 2**10
    np.testing.assert_array_equal(made["a"], values.T if transposed else values)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="resident memory is read from /proc")
def test_released_pages_use_no_memory_and_are_read_again(tmp_path):
    values = np.arange(8 * 2**20, dtype=np.float32).reshape(2048, -1)
    write_safetensors(tmp_path / "a.safetensors", {"a": values}, {})
    view = read_tensors(tmp_path / "a.safetensors")["a"].T
    before = mapped_kib()
    np.testing.assert_array_equal(view, values.T)
    assert mapped_kib() - before > 0.9 * values.nbytes / 2**10
    release_mapped_pages(view)
    assert mapped_kib() - before < 0.1 * values.nbytes / 2**10
    np.testing.assert_array_equal(view, values.T)
    release_mapped_pages(values)  # not a view of a file: no effect
