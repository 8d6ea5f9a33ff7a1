"""Another base model: the method, the training step and inference with a toy model in place of Stable Diffusion."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from pisa_jax import (
    Adapters,
    Objective,
    Settings,
    Upscaler,
    init_adapter,
    init_state,
    jit_train_step,
    make_frozen,
    make_mesh,
)
from pisa_jax.config import AdapterSpec
from pisa_jax.inference import make_weights
from pisa_jax.model import BaseModel, LoadedModel
from pisa_jax.train_step import Batch

# Rank 12 lets dW of the last convolution, which has 12 outputs, be any matrix, -W included.
SPEC = AdapterSpec(rank=12, targets="conv")


class ToyUNet(nn.Module):
    """Two convolutions and a prompt; latents of 12 channels at half the resolution."""

    @nn.compact
    def __call__(self, latents, prompt):
        hidden = nn.tanh(nn.Conv(16, (3, 3), name="conv_in")(latents)) + prompt.mean((1, 2))[:, None, None, None]
        return nn.Conv(12, (3, 3), name="conv_out")(hidden)


def toy_model() -> LoadedModel:
    """Space-to-depth as the VAE, so that encoding is exact, and an embedding table as the text encoder."""

    def encode(params, images, noise):
        del params
        b, h, w, c = images.shape
        latents = images.reshape(b, h // 2, 2, w // 2, 2, c).transpose(0, 1, 3, 2, 4, 5).reshape(b, h // 2, w // 2, 12)
        return latents if noise is None else latents + 0.01 * noise

    def decode(params, latents):
        del params
        b, h, w, _ = latents.shape
        return latents.reshape(b, h, w, 2, 2, 3).transpose(0, 1, 3, 2, 4, 5).reshape(b, 2 * h, 2 * w, 3)

    base = BaseModel(
        encode=encode,
        decode=decode,
        predict_noise=lambda params, latents, t, prompt: ToyUNet().apply({"params": params}, latents, prompt),
        encode_text=lambda params, ids: params["table"][ids],
        vae_scale_factor=2,
        latent_channels=12,
    )
    unet = ToyUNet().init(jax.random.key(0), jnp.zeros((1, 4, 4, 12)), jnp.zeros((1, 1, 3)))["params"]
    params = {"unet": jax.device_get(unet), "vae": {"unused": np.zeros(1)}, "text": {"table": np.zeros((8, 3))}}
    return LoadedModel(base, params, lambda prompts: np.zeros((len(prompts), 1), np.int32), {})


def test_a_toy_base_model_learns_to_return_its_input():
    """The adapter can remove the residual of the untrained UNet, so that l2 falls towards 0."""
    model, mesh = toy_model(), make_mesh(data=1)
    optimizer, frozen = optax.adam(5e-3), make_frozen(model, mesh)
    state = init_state(init_adapter(jax.random.key(1), model.params["unet"], SPEC), optimizer, ema=False)
    step = jit_train_step(model.base, Objective(SPEC), optimizer, frozen, mesh)
    images = jnp.tanh(jax.random.normal(jax.random.key(2), (2, 16, 16, 3))) / 2
    batch = Batch(images, images, jnp.zeros((2, 1), jnp.int32), jnp.zeros(2, bool))
    found = []
    for _ in range(60):
        state, measured = step(frozen, state, batch, jax.random.key(3))
        found.append(float(measured["l2"]))
    assert found[-1] < 0.5 * found[0], found


def test_a_toy_base_model_upscales():
    model = toy_model()
    sem = jax.tree.map(lambda leaf: leaf + 0.1, init_adapter(jax.random.key(1), model.params["unet"], SPEC))
    trees = {"pix": jax.tree.map(jnp.zeros_like, sem), "sem": sem}
    weights = make_weights(model, Adapters(jax.device_get(trees), dict.fromkeys(trees, SPEC)))
    upscaler = Upscaler(model.base, weights, dict.fromkeys(trees, SPEC), Settings(min_size=8, color_fix="none"))
    image = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    session = upscaler.open(image, scale=3)
    assert session.latents.shape == (1, 8, 11, 12)
    assert session.render(1.0, 0.5).shape == (15, 21, 3)
    # Its VAE is exact, so scales 0, 0 give the resized input back, but for the rounding to 8 bits.
    resized = (np.asarray(model.base.decode({}, session.latents))[0, :15, :21] + 1) * 127.5
    np.testing.assert_allclose(session.render(0.0, 0.0), resized, atol=0.51)
    expected = session.latents - 0.3 * session.eps_pix - 0.6 * (session.eps_full - session.eps_pix)
    rendered = np.clip((np.asarray(model.base.decode({}, expected))[0, :15, :21] + 1) * 127.5, 0, 255)
    np.testing.assert_allclose(session.render(0.3, 0.6), rendered, atol=0.51)
