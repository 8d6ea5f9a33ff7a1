"""Shared parts of tests: recorded arrays in NHWC layout, the recorded model, and a tiny random model."""

import functools

import jax
import numpy as np
from conftest import golden
from recorded import TOLERANCE, nhwc, read_json, recorded_adapters, recorded_model, recorded_vgg, relative

from pisa_jax import Settings, Upscaler
from pisa_jax.adapters import injection
from pisa_jax.config import AdapterSpec
from pisa_jax.model import BaseModel
from pisa_jax.runtime.distributed import on_device
from pisa_jax.sd import backbone, pretrained, random_model
from pisa_jax.sd.base_model import make_base_model
from pisa_jax.weights import Weights

__all__ = ["nhwc", "read_json", "recorded_adapters", "recorded_model", "recorded_vgg", "relative"]


@functools.cache
def recorded_backbone() -> backbone.Backbone:
    """Build the modules of that checkpoint."""
    return pretrained.load_backbone(golden("sd_tiny"))


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


def random_upscaler(
    on_compile=lambda what, seconds: None, notice=lambda line: None, parts=None, **settings
) -> Upscaler:
    """Make an upscaler of the tiny random model with two adapters."""
    base, params = parts or random_base("nano")
    spec = AdapterSpec(rank=2)
    sem = jax.tree.map(lambda leaf: leaf + 0.05, injection.init_adapter(jax.random.key(1), params["unet"], spec))
    prompt = jax.random.normal(jax.random.key(2), (1, 5, 32))
    weights = Weights(params["unet"], (sem,), params["vae"], prompt)
    return Upscaler(
        base, weights, {"pix": spec, "sem": spec}, Settings(**({"min_size": 32} | settings)), on_compile, notice
    )


def random_image(height, width, seed=0):
    """Make an image of random pixels."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def close(found, expected, tolerance=TOLERANCE) -> None:
    """Assert equal shapes and elements that differ by at most `tolerance`."""
    found, expected = np.asarray(found), np.asarray(expected)
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance)


jax.config.update("jax_default_matmul_precision", "highest")
