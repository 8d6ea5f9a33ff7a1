"""Adapters in the UNet of Stable Diffusion: its layers, and parity with the original program."""

import functools
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import DATA, golden
from tiny import close, nhwc, random_backbone, read_json, recorded_adapters, recorded_backbone, recorded_model

from pisa_jax.adapters import injection
from pisa_jax.adapters.foreign_files import load_foreign, save_foreign
from pisa_jax.adapters.foreign_keys import is_foreign
from pisa_jax.config import AdapterSpec
from pisa_jax.runtime.tensor_files import read_metadata, read_tensors
from pisa_jax.sd import backbone, random_model


def test_targets_of_sd21_equal_those_of_the_published_adapters():
    golden_lists = read_json(golden("sd21_lora_modules.json"))

    shapes = backbone.param_shapes(backbone.build_modules(*random_model.model_configs("sd21")))["unet"]
    found = injection.target_shapes(shapes, AdapterSpec().targets)
    assert len(found) == golden_lists["counts"]["total"] == 258
    kinds = [sum(1 for shape in found.values() if test(shape)) for test in (
        lambda s: len(s) == 2, lambda s: s[:2] == (3, 3), lambda s: s[:2] == (1, 1))]  # fmt: skip
    assert kinds == [192, 52, 14]
    tree = jax.eval_shape(lambda: injection.init_adapter(jax.random.key(0), shapes, AdapterSpec(rank=4)))
    assert sum(leaf.size for leaf in jax.tree.leaves(tree)) == golden_lists["lora_params_rank4"] == 4_055_712
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == golden_lists["unet_params"]


@functools.partial(jax.jit, static_argnums=0)
def eps(modules, params, trees, x, timestep, prompt):
    """Run the UNet with some of the recorded adapters as additive paths."""
    scales = dict.fromkeys(trees, jnp.ones(()))
    with nn.intercept_methods(injection.interceptor(trees, recorded_adapters().specs, scales)):
        return backbone.predict_noise(modules, params, x, timestep, prompt)


@pytest.mark.parametrize("timestep", [1, 500])
@pytest.mark.parametrize("index", [0, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("names", [("pix",), ("pix", "sem")], ids="+".join)
def test_unet_with_adapters_equals_the_original(names, index, timestep):
    model, adapters = recorded_model(), recorded_adapters()
    arrays = np.load(golden("comp/unet.npz"))
    x, prompt = nhwc(arrays[f"x{index}"]), jnp.asarray(arrays[f"emb{index}"])
    expected = nhwc(arrays[f"{''.join(names)}{index}_t{timestep}"])
    trees = {name: adapters.trees[name] for name in names}
    scales = dict.fromkeys(names, jnp.ones(()))
    merged = injection.merge(model.params["unet"], trees, adapters.specs, scales)
    close(eps(recorded_backbone(), merged, {}, x, timestep, prompt), expected)
    close(eps(recorded_backbone(), model.params["unet"], trees, x, timestep, prompt), expected)


@pytest.mark.parametrize("name", ["diffusers_lora", "diffusers_unet_lora", "diffusers_dora"])
def test_adapters_that_diffusers_wrote_give_its_output(name, tmp_path):
    """Written by a pipeline and by a UNet of its own (tests/assets/adapters/record.py)."""
    recorded, kernels = DATA / "adapters" / name / "pytorch_lora_weights.safetensors", recorded_kernels()
    assert is_foreign(recorded)
    adapters = load_foreign(recorded, kernels, "pix")
    assert adapters.specs["pix"].decomposition == name.removeprefix("diffusers_").removeprefix("unet_")
    inputs = np.load(golden("comp/unet.npz"))
    expected = nhwc(np.load(DATA / "adapters" / "diffusers_outputs.npz")[adapters.specs["pix"].decomposition])
    x, prompt = nhwc(inputs["x0"]), jnp.asarray(inputs["emb0"])
    merged = injection.merge(recorded_model().params["unet"], adapters.trees, adapters.specs, {"pix": 1.0})
    close(eps(recorded_backbone(), merged, {}, x, 1, prompt), expected)
    assert np.abs(expected - nhwc(inputs["base0_t1"])).max() > 0.05
    save_foreign(tmp_path / "x.safetensors", adapters, "pix", kernels, "diffusers")
    written, given = read_tensors(tmp_path / "x.safetensors"), read_tensors(recorded)
    assert {key: value.shape for key, value in written.items()} == {
        as_written(key): v.shape for key, v in given.items()
    }
    ours, theirs = (
        json.loads(read_metadata(file)["lora_adapter_metadata"]) for file in (tmp_path / "x.safetensors", recorded)
    )
    assert {key.removeprefix("unet.") for key in ours} <= {key.removeprefix("unet.") for key in theirs}
    again = load_foreign(tmp_path / "x.safetensors", kernels, "pix")
    for path, factors in adapters.trees["pix"].items():
        for factor, value in factors.items():
            close(again.trees["pix"][path][factor], value, 1e-6)


def as_written(key):
    """The name of a tensor in the files that we write: diffusers drops layers of a file with both kinds of names."""
    return "unet." + key.removeprefix("unet.").replace("lora.down", "lora_A").replace("lora.up", "lora_B")


@functools.cache
def recorded_kernels():
    return injection.kernels_of(jax.device_get(recorded_model().params["unet"]))


def test_unet_targets_exclude_the_time_embedding():
    _, params = random_backbone()
    found = injection.target_shapes(params["unet"], AdapterSpec().targets)
    assert not [path for path in found if "time" in path or "norm" in path]
    assert "conv_in" in found
