"""What several tests share: golden arrays in our layout, the recorded model, and a tiny one made on the fly."""

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
from pisa_jax.sd.base_model import base_model

TOLERANCE = 1e-4  # float32 against the original program, from fixtures/README.md


def nhwc(array: np.ndarray) -> jax.Array:
    """The goldens are NCHW."""
    return jnp.asarray(array.transpose(0, 2, 3, 1))


@functools.cache
def recorded_model() -> LoadedModel:
    """The SD-2.1-shaped checkpoint that the original program was run with."""
    loaded = pretrained.load_pretrained(str(golden("sd_tiny")))
    return loaded._replace(params=on_device(loaded.params, np.float32))


@functools.cache
def recorded_backbone() -> backbone.Backbone:
    """The modules of that checkpoint."""
    return pretrained.load_backbone(golden("sd_tiny"))


@functools.cache
def recorded_adapters() -> Adapters:
    """The published file format, as written by the original program."""
    return files.load_adapters(golden("pisa_sr.pkl"))


@functools.cache
def random_backbone(size: str = "tiny") -> tuple[backbone.Backbone, dict]:
    """A model of the same architecture with random weights, for tests that need no golden."""
    modules = backbone.build_modules(*random_model.model_configs(size))
    shapes = backbone.param_shapes(modules)
    rng = np.random.default_rng(0)
    params = {part: random_model.random_params(shapes[part], rng) for part in shapes}
    return modules, on_device(params, np.float32)


@functools.cache
def random_base(size: str = "tiny") -> tuple[BaseModel, dict]:
    """`random_backbone` as a base model."""
    modules, params = random_backbone(size)
    return base_model(modules), params


def close(found, expected, tolerance=TOLERANCE) -> None:
    """Equal shapes, and no element further off than `tolerance`."""
    found, expected = np.asarray(found), np.asarray(expected)
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance)


def read_json(path: Path):
    """The content of a JSON file."""
    return json.loads(path.read_text())


jax.config.update("jax_default_matmul_precision", "highest")


@functools.cache
def recorded_vgg() -> dict:
    """The random VGG16 of the goldens, with LPIPS's heads."""
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
    """Relative L2 difference."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))
