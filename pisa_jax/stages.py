"""The three jitted stages of inference: encode, predict and render; all arrays are arguments.

With `sizes`, the arrays of a batch are padded to a bucket, and `sizes` has the height and width of each image in them.
"""

from typing import Any

import jax
import jax.numpy as jnp

from pisa_jax import model
from pisa_jax.config import AdapterSpec
from pisa_jax.imaging.color import COLOR_FIXES
from pisa_jax.imaging.ranges import signed_to_unit, unit_to_signed
from pisa_jax.model import BaseModel, Predictions
from pisa_jax.weights import Weights


def encode(base: BaseModel, weights: Weights, batch: Any, noise: Any, sizes: Any = None) -> jax.Array:
    """Stage 1: encode network inputs in [-1, 1] to scaled latents; `sizes` in latents."""
    return base.encode(weights.vae, batch, noise, **model.given(sizes))


def predict(
    base: BaseModel, specs: tuple[AdapterSpec, ...], rows: tuple, weights: Weights, latents: Any, sizes: Any = None
) -> jax.Array:
    """Stage 2: predict the residuals at every row of scales of the later adapters, concatenated along the channels.

    `sizes` are in latents.
    """
    out = model.predict_rows(base, weights.unet, weights.adapters, specs, latents, weights.prompt, rows, sizes=sizes)
    return jnp.concatenate(list(out), axis=-1)


def render(
    base: BaseModel, color_fix: str, size: tuple, weights: Weights, predictions: Predictions, scales: Any, style: Any
) -> jax.Array:
    """Stage 3: decode images in [-1, 1] at given scales, cropped to `size`, with the colors of `style`."""
    height, width = size
    decoded = base.decode(weights.vae, model.combine(*predictions, scales))[:, :height, :width]
    return recolor(color_fix, weights, decoded, style[:, :height, :width])


def render_padded(
    base: BaseModel, color_fix: str, weights: Weights, predictions: Predictions, scales: Any, style: Any, sizes: Any
) -> jax.Array:
    """Stage 3 for padded batches: the first `sizes` pixels of each result belong to the image."""
    latent_sizes = -(-sizes // base.vae_scale_factor)
    decoded = base.decode(weights.vae, model.combine(*predictions, scales), sizes=latent_sizes)
    return recolor(color_fix, weights, decoded, style, sizes)


def recolor(color_fix: str, weights: Weights, decoded: Any, style: Any, sizes: Any = None) -> jax.Array:
    """Apply the color fix: the end of stage 3, and a stage of its own for tiled images; `sizes` in pixels."""
    del weights
    # AdaIN's epsilon depends on the range of the values: the original's is for images in [0, 1].
    content, source = signed_to_unit(jnp.clip(decoded, -1, 1)), signed_to_unit(style)
    return unit_to_signed(jnp.clip(COLOR_FIXES[color_fix](content, source, sizes), 0, 1))
