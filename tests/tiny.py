"""Shared parts of tests: recorded arrays in NHWC layout, the recorded model, and a tiny random model."""

import functools

import jax
import numpy as np
from conftest import golden
from recorded import TOLERANCE, nhwc, read_json, recorded_adapters, recorded_model, recorded_vgg, relative

from pisa_jax.model import BaseModel
from pisa_jax.runtime.distributed import on_device
from pisa_jax.sd import backbone, pretrained, random_model
from pisa_jax.sd.base_model import make_base_model

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


def close(found, expected, tolerance=TOLERANCE) -> None:
    """Assert equal shapes and elements that differ by at most `tolerance`."""
    found, expected = np.asarray(found), np.asarray(expected)
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance)


jax.config.update("jax_default_matmul_precision", "highest")
