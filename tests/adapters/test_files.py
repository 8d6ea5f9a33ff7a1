"""Adapter files of both formats: names and layouts, bit-exact round trips, the command line."""

import json
import os
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import golden
from small_adapters import CONV, DENSE, KERNELS, assert_same, original_state, random_adapters

from pisa_jax.adapters import pisa_sr_file
from pisa_jax.adapters.adapter_tree import Adapters
from pisa_jax.adapters.files import export_pisa_sr, load_adapters, save_adapters
from pisa_jax.adapters.fit import check_adapters
from pisa_jax.config import AdapterSpec
from pisa_jax.runtime import torch_layout
from pisa_jax.runtime.tensor_files import read_tensors, write_safetensors
from pisa_jax.runtime.torch_pickle import read_torch
from pisa_jax.runtime.trees import flatten


def read_json(relative):
    return json.loads(golden(relative).read_text())


# ------------------------------------------------------------------ names and layouts


def test_unet_parts_equal_the_module_lists_of_the_original():
    lists = read_json("sd21_lora_modules.json")
    for group in ("encoder", "decoder", "others"):
        assert {pisa_sr_file.unet_part(name) for name in lists[group]} == {group}


def test_weight_differences_equal_those_of_the_original():
    # dW = (alpha / r) B A, in the layouts of both sides.
    state = read_torch(golden("pisa_sr.pkl"))["state_dict_unet"]
    trees = load_adapters(golden("pisa_sr.pkl")).trees
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0"
    a, b = (state[f"{name}.lora_{side}.default_encoder_sem.weight"] for side in "AB")
    factors = trees["sem"][torch_layout.flax_module_path(name)]
    np.testing.assert_allclose(factors["a"] @ factors["b"], (b @ a).T, rtol=0, atol=1e-6)
    a, b = (state[f"mid_block.resnets.0.conv1.lora_{side}.default_others_pix.weight"] for side in "AB")
    factors = trees["pix"]["mid_block/resnets_0/conv1"]
    expected = np.einsum("or,rihw->hwio", b[:, :, 0, 0], a)
    np.testing.assert_allclose(factors["a"] @ factors["b"][0, 0], expected, rtol=0, atol=1e-6)


# ------------------------------------------------------------------ reading


def test_the_published_format_is_read():
    meta = read_json("pisa_sr_meta.json")
    adapters = load_adapters(golden("pisa_sr.pkl"))
    assert adapters.specs == {"pix": AdapterSpec("lora", 4, 8.0), "sem": AdapterSpec("lora", 6, 8.0)}
    assert adapters.base_model is None
    for name, tree in adapters.trees.items():
        spec = adapters.specs[name]
        assert spec.alpha / spec.rank == meta["observed"]["scaling"][f"default_encoder_{name}"]
        lists = [meta[f"unet_lora_{group}_modules_{name}"] for group in ("encoder", "decoder", "others")]
        assert sorted(tree) == sorted(torch_layout.flax_module_path(module) for modules in lists for module in modules)
    assert len(flatten(adapters.trees)) == meta["n_tensors"]


def test_pickle_and_safetensors_of_the_original_are_equal():
    assert_same(load_adapters(golden("pisa_sr_state_dict.safetensors")), load_adapters(golden("pisa_sr.pkl")))


@pytest.mark.parametrize("dtype", [np.float16, "bfloat16"])
def test_factors_of_half_precision_files_are_converted_to_float32(dtype, tmp_path):
    expected = random_adapters()
    state = original_state(expected, tmp_path)
    lower = {key: np.asarray(jnp.asarray(value, dtype)) for key, value in state.items()}
    write_safetensors(tmp_path / "low.safetensors", lower, {})
    found = flatten(load_adapters(tmp_path / "low.safetensors").trees)
    for path, array in flatten(expected.trees).items():
        np.testing.assert_array_equal(found[path], np.asarray(jnp.asarray(array, dtype), np.float32), strict=True)


# ------------------------------------------------------------------ round trips


def test_round_trip_through_both_formats(tmp_path):
    first = load_adapters(golden("pisa_sr.pkl"))
    save_adapters(tmp_path / "a.safetensors", first)
    second = load_adapters(tmp_path / "a.safetensors")
    assert_same(second, first)
    state = original_state(second, tmp_path)
    recorded = read_torch(golden("pisa_sr.pkl"))["state_dict_unet"]
    assert set(state) == set(recorded)
    for key, tensor in recorded.items():
        np.testing.assert_array_equal(state[key], tensor, strict=True)
    third = load_adapters(tmp_path / "original.safetensors")
    assert_same(third, first)
    save_adapters(tmp_path / "b.safetensors", third)
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_specs_base_model_and_special_values_are_kept(tmp_path):
    adapters = random_adapters(rank=3, alpha=5.5, names=("pix", "my-style", "sem"))
    adapters.trees["pix"][DENSE]["a"][0] = [np.nan, -0.0, np.inf]
    adapters.specs["sem"] = AdapterSpec("lora", 3, 1.0, targets="to_q$")
    save_adapters(tmp_path / "a.safetensors", adapters)
    found = load_adapters(tmp_path / "a.safetensors")
    assert_same(found, adapters)
    assert np.signbit(found.trees["pix"][DENSE]["a"][0, 1])


def test_equal_adapters_give_equal_files_for_any_order_and_array_type(tmp_path):
    adapters = random_adapters()
    turned = {
        name: {path: {k: jnp.asarray(v) for k, v in reversed(layer.items())} for path, layer in reversed(tree.items())}
        for name, tree in reversed(adapters.trees.items())
    }
    save_adapters(tmp_path / "a", adapters)
    save_adapters(tmp_path / "b", adapters._replace(trees=turned))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert set(read_tensors(tmp_path / "a")) == set(flatten(adapters.trees))


def test_an_adapter_without_layers_is_kept(tmp_path):
    adapters = random_adapters()
    adapters.trees["sem"] = {}
    save_adapters(tmp_path / "a", adapters)
    assert_same(load_adapters(tmp_path / "a"), adapters)


def test_other_decompositions_round_trip_but_cannot_be_exported(tmp_path):
    rng = np.random.default_rng(0)
    shapes = {"a1": (3, 3, 5, 2), "b1": (2, 7), "a2": (3, 3, 5, 2), "b2": (2, 7)}
    tree = {CONV: {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}}
    adapters = Adapters({"pix": tree}, {"pix": AdapterSpec("loha", 2)}, None)
    save_adapters(tmp_path / "a", adapters)
    assert_same(load_adapters(tmp_path / "a"), adapters)
    check_adapters(adapters.trees, adapters.specs, KERNELS)
    with pytest.raises(
        ValueError, match="adapter 'pix' has decomposition 'loha'; the original PiSA-SR supports only lora"
    ):
        export_pisa_sr(tmp_path / "b", adapters)
    del tree[CONV]["b2"]
    save_adapters(tmp_path / "a", adapters)
    found = load_adapters(tmp_path / "a")
    with pytest.raises(ValueError, match=f"missing {CONV}/b2"):
        check_adapters(found.trees, found.specs, KERNELS)


def test_exported_factors_give_the_same_difference_with_alpha_8(tmp_path):
    adapters = random_adapters(alpha=3.0)
    export_pisa_sr(tmp_path / "a", adapters)
    found = load_adapters(tmp_path / "a")
    assert found.specs["pix"].alpha == 8.0
    assert found.base_model == "owner/name"
    for path, factors in adapters.trees["pix"].items():
        ours, theirs = factors, found.trees["pix"][path]
        np.testing.assert_array_equal(ours["a"], theirs["a"])
        np.testing.assert_allclose(3.0 * ours["b"], 8.0 * theirs["b"], rtol=1e-6)


# ------------------------------------------------------------------ command line


def run(*args, cwd=None):
    return subprocess.run(
        [sys.executable, "-m", "pisa_jax", "convert", *map(str, args)],
        capture_output=True,
        text=True,
        cwd=cwd,
        check=False,
    )


def test_command_line_round_trip(tmp_path):
    adapters, original = tmp_path / "a.safetensors", tmp_path / "o.safetensors"
    done = run(golden("pisa_sr.pkl"), adapters)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [
        f"{adapters}: {adapters.stat().st_size:,} bytes, adapters",
        "  pix: lora, rank 4, alpha 8, 165 layers, 172,448 parameters",
        "  sem: lora, rank 6, alpha 8, 165 layers, 258,672 parameters",
        "  base model: not recorded",
    ]
    assert run(adapters, original, "--to", "original").returncode == 0
    recorded = read_torch(golden("pisa_sr.pkl"))["state_dict_unet"]
    assert set(read_tensors(original)) == set(recorded)
    before = adapters.read_bytes()
    done = run(original, adapters)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"pisa-sr convert: {adapters} exists; give another name, or --overwrite\n"
    assert run(original, adapters, "--overwrite").returncode == 0
    assert adapters.read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == ["a.safetensors", "o.safetensors"]


def test_command_line_errors_are_one_line(tmp_path):
    (tmp_path / "text.pkl").write_text("hello")
    (tmp_path / "empty.safetensors").write_bytes(b"")
    (tmp_path / "hostile.pkl").write_bytes(b"\x80\x02cos\nsystem\nX\x04\x00\x00\x00true\x85R.")
    write_safetensors(tmp_path / "other.safetensors", {"w": np.ones(2)}, {})
    for name in ("none.pkl", "text.pkl", "empty.safetensors", "hostile.pkl", "other.safetensors", "."):
        done = run(tmp_path / name, tmp_path / "out.safetensors")
        assert (done.returncode, done.stdout) == (1, ""), name
        assert done.stderr.startswith("pisa-sr convert: "), name
        assert done.stderr.count("\n") == 1, name
        assert name.strip(".") in done.stderr
    assert not (tmp_path / "out.safetensors").exists()
    assert run(golden("pisa_sr.pkl"), tmp_path / "none" / "out.safetensors").returncode == 1


def test_command_line_usage():
    assert run("--help").returncode == 0
    for args in ([], ["in.pkl"], ["in.pkl", "out.pkl"], ["in.pkl", "out.safetensors", "--to", "torch"]):
        done = run(*args)
        assert done.returncode == 2, args
        assert done.stderr.startswith("usage: pisa-sr convert")


def test_the_command_does_not_import_jax():
    code = "import sys, pisa_jax.cli.convert; sys.exit(any(m in sys.modules for m in ('jax', 'flax', 'diffusers')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
