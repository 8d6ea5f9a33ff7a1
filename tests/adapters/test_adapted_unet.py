"""Adapters in the UNet of Stable Diffusion: its layers, and parity with the original program."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import golden
from tiny import close, nhwc, random_backbone, read_json, recorded_adapters, recorded_backbone, recorded_model

from pisa_jax.adapters import injection
from pisa_jax.config import AdapterSpec
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


def test_unet_targets_exclude_the_time_embedding():
    _, params = random_backbone()
    found = injection.target_shapes(params["unet"], AdapterSpec().targets)
    assert not [path for path in found if "time" in path or "norm" in path]
    assert "conv_in" in found
