"""Shared parts of tests: recorded arrays in NHWC layout, the recorded model, and a tiny random model."""

import functools
import json
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from conftest import golden
from safetensors.numpy import save_file

from pisa_jax.adapters import files
from pisa_jax.adapters.adapter_tree import Adapters
from pisa_jax.metrics import lpips
from pisa_jax.model import BaseModel, LoadedModel
from pisa_jax.runtime.distributed import on_device
from pisa_jax.sd import backbone, pretrained, random_model
from pisa_jax.sd.base_model import make_base_model

TOLERANCE = 1e-4  # float32 against the original program, from fixtures/README.md


def nhwc(array: np.ndarray) -> jax.Array:
    """Convert a recorded array from NCHW to NHWC."""
    return jnp.asarray(array.transpose(0, 2, 3, 1))


@functools.cache
def recorded_model() -> LoadedModel:
    """Load the checkpoint of Stable Diffusion 2.1's structure that the recorded runs used."""
    loaded = pretrained.load_pretrained(str(golden("sd_tiny")))
    return loaded._replace(params=on_device(loaded.params, np.float32))


@functools.cache
def recorded_backbone() -> backbone.Backbone:
    """Build the modules of that checkpoint."""
    return pretrained.load_backbone(golden("sd_tiny"))


@functools.cache
def recorded_adapters() -> Adapters:
    """Load the adapters in the published file format, as the original program writes it."""
    return files.load_adapters(golden("pisa_sr.pkl"))


@functools.cache
def random_backbone(size: str = "tiny") -> tuple[backbone.Backbone, dict]:
    """Make a model of the same architecture with random weights, for tests without recordings."""
    modules = backbone.build_modules(*random_model.model_configs(size))
    shapes = backbone.param_shapes(modules)
    rng = np.random.default_rng(0)
    params = {part: random_model.random_params(shapes[part], rng) for part in shapes}
    return modules, on_device(params, np.float32)


@functools.cache
def random_base(size: str = "tiny") -> tuple[BaseModel, dict]:
    """Make a base model of `random_backbone`."""
    modules, params = random_backbone(size)
    return make_base_model(modules), params


def close(found, expected, tolerance=TOLERANCE) -> None:
    """Assert equal shapes and elements that differ by at most `tolerance`."""
    found, expected = np.asarray(found), np.asarray(expected)
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance)


def read_json(path: Path):
    """Read a JSON file."""
    return json.loads(path.read_text())


jax.config.update("jax_default_matmul_precision", "highest")


@functools.cache
def recorded_vgg() -> dict:
    """Make the random VGG16 of the recordings, with the heads of LPIPS."""
    recipe = read_json(golden("train/vgg_recipe.json"))
    draw, layers = np.random.RandomState(recipe["seed"]), {}
    for name in recipe["order"]:
        shape = recipe["shapes"][name]
        spread = np.sqrt(6 / (9 * shape[1])) if name.endswith("weight") else 0.1
        layers[name] = ((draw.random_sample(shape) * 2 - 1) * spread).astype(np.float16).astype(np.float32)
    with tempfile.TemporaryDirectory() as folder:
        save_file(layers, f"{folder}/vgg16.safetensors")
        return on_device(lpips.load_weights(f"{folder}/vgg16.safetensors", "vgg"), np.float32)


def relative(found, expected) -> float:
    """Compute the relative L2 difference."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))
