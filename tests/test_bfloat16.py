"""Inference and training in bfloat16, the default on GPUs and TPUs, against float32.

bfloat16 keeps 8 bits of a number, so one rounding is a relative error of 2^-9 = 0.2 %. The bounds are about twice the
errors that were measured on a CPU, which the comments state.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from tiny import random_backbone, relative

from pisa_jax import AdapterSpec, Batch, Objective, Upscaler, init_adapter, losses
from pisa_jax.sd import backbone, pretrained, random_model
from pisa_jax.sd.base_model import make_base_model
from pisa_jax.train_step import Draws, Frozen, gradient

# Of the UNet and of the VAE; the first pair is the default on GPUs and TPUs and in configs/sd21.py.
DTYPES = [("bfloat16", "float32"), pytest.param("bfloat16", "bfloat16", marks=pytest.mark.slow)]


@functools.cache
def open_session(dtype, vae_dtype):
    """Open a part of a sample image with the demo model."""
    with Image.open(pretrained.DEMO / "samples" / "perched_osprey.png") as sample:
        image = np.asarray(sample.convert("RGB"))[40:72, 60:92]
    return Upscaler.load(dtype=dtype, vae_dtype=vae_dtype, min_size=64).open(image, scale=2)


@pytest.mark.parametrize(("dtype", "vae_dtype"), DTYPES)
def test_upscaler(dtype, vae_dtype):
    exact, found = open_session("float32", "float32"), open_session(dtype, vae_dtype)
    assert relative(found.latents, exact.latents) < 0.01  # 0.004 with the VAE in bfloat16
    for name in ("eps_pix", "eps_full"):
        assert 0 < relative(getattr(found, name), getattr(exact, name)) < 0.06  # 0.032
    for scales in ((1, 1), (1, 0)):
        a, b = (session.render(*scales).astype(int) for session in (found, exact))
        assert np.abs(a - b).max() <= 4  # 2 gray levels
        assert np.mean((a - b) ** 2) < 0.6  # 0.32: 53 dB
    assert np.array_equal(found.render(1, sem=np.zeros((3, 3))), found.render(1, 0))


@functools.cache
def random_gradient(dtype, vae_dtype):
    """Compute losses and gradient for a random model and batch."""
    _, params = random_backbone("nano")
    modules = backbone.build_modules(*random_model.model_configs("nano"), jnp.dtype(dtype), jnp.dtype(vae_dtype))
    spec, keys = AdapterSpec(rank=2), jax.random.split(jax.random.key(0), 8)
    unet = jax.tree.map(lambda leaf: leaf.astype(dtype), params["unet"])
    vae = jax.tree.map(lambda leaf: leaf.astype(vae_dtype), params["vae"])
    adapter = jax.tree.map(lambda leaf: leaf + 0.05, init_adapter(keys[0], params["unet"], spec))
    null, negative = (jax.random.normal(key, (1, 5, 32)) for key in keys[1:3])
    alphas_cumprod = losses.ddpm_schedule().alphas_cumprod
    frozen = Frozen(unet, unet, vae, None, null, negative, None, alphas_cumprod)
    lq, gt = (jax.random.uniform(key, (2, 32, 32, 3), minval=-1) for key in keys[3:5])
    posterior, noise = (jax.random.normal(key, (2, 8, 8, 8)) for key in keys[5:7])
    batch = Batch(lq, gt, jnp.zeros((2, 5), jnp.int32), jnp.zeros(2, bool))
    draws = Draws(posterior, noise, jnp.array([100, 400]))
    function = functools.partial(gradient, base=make_base_model(modules), objective=Objective(spec, csd=1.0))
    return jax.jit(function)(adapter, frozen, batch, draws)


def flat(tree):
    return np.concatenate([np.ravel(np.asarray(leaf)) for leaf in jax.tree.leaves(tree)])


@pytest.mark.parametrize(("dtype", "vae_dtype"), DTYPES)
def test_gradient(dtype, vae_dtype):
    (exact, exact_gradient), (found, found_gradient) = (
        random_gradient(*dtypes) for dtypes in (("float32", "float32"), (dtype, vae_dtype))
    )
    for name, value in exact.items():
        assert float(found[name]) == pytest.approx(float(value), rel=0.015)  # 0.0064
    assert {leaf.dtype for leaf in jax.tree.leaves(found_gradient)} == {jnp.dtype("float32")}
    a, b = flat(found_gradient), flat(exact_gradient)
    # The gradient passes some forty layers with random weights: 0.29, a cosine of 0.96.
    assert relative(a, b) < 0.5
    assert a @ b > 0.9 * np.linalg.norm(a) * np.linalg.norm(b)
