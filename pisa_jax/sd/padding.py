"""The UNet and the VAE on images that are padded at the bottom and at the right, without an effect of the padding.

A compiled program serves images of many sizes: those that fit into its arrays. The size of each image is a traced
argument. Where a layer depends on other positions than its own, it sees what it would see without padding:
convolutions see zeros beyond the image, as at the border of an array; GroupNorm has means over the image; attention
has the keys of the image. Sizes of levels follow those of the latents: downsampling halves them and rounds up,
upsampling returns to the size before, or doubles it in the decoder.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pisa_jax.imaging.masks import image_mask
from pisa_jax.sd import backbone as bb
from pisa_jax.sd import layers
from pisa_jax.sd.backbone import Backbone, Hooks, Params

# Height and width in latents of each image of a batch.
Sizes = Int[Array, "b 2"]


def predict_noise(
    backbone: Backbone,
    params: Params,
    latents: Float[Array, "b h w c"],
    timesteps: Any,
    prompt: Any,
    sizes: Sizes | None = None,
    interceptor: Callable = bb.no_interception,
) -> Float[Array, "b h w c"]:
    """Predict the noise in scaled latents, of which the first `sizes` belong to the image; all without `sizes`.

    `interceptor`, of Flax's methods, sees inputs of convolutions that are zero beyond the image.
    """
    hooks = _hooks(sizes, latents.shape[1:3])
    return bb.predict_noise(backbone, params, latents, timesteps, prompt, hooks, interceptor)


def encode(
    backbone: Backbone,
    params: Params,
    images: Float[Array, "b h w 3"],
    noise: Float[Array, "#b y x c"] | None = None,
    sizes: Sizes | None = None,
) -> Float[Array, "b y x c"]:
    """Encode images in [-1, 1] to scaled latents, of which the first `sizes` belong to the image."""
    pixels = None if sizes is None else sizes * backbone.vae_scale_factor
    return bb.encode(backbone, params, images, noise, _hooks(pixels, images.shape[1:3]))


def decode(
    backbone: Backbone, params: Params, latents: Float[Array, "b y x c"], sizes: Sizes | None = None
) -> Float[Array, "b h w 3"]:
    """Decode scaled latents, of which the first `sizes` belong to the image, to images, not clipped."""
    return bb.decode(backbone, params, latents, _hooks(sizes, latents.shape[1:3]))


def _hooks(sizes: Sizes | None, padded: tuple[int, ...]) -> Hooks:
    return bb.DEFAULT_HOOKS if sizes is None else PaddedLevels(sizes, padded).hooks()


class PaddedLevels:
    """Overrides of the layers for padded images. They track the size of the images through the levels of a module."""

    def __init__(self, sizes: Int[Array, "b 2"], padded: tuple[int, ...]):
        # Sizes of the images, and of the array that holds them, at the level of the current layer.
        self.sizes, self.padded = sizes, tuple(padded)
        # Those before each downsampler whose level has not been left again.
        self.before: list[tuple[Array, tuple[int, ...]]] = []

    def hooks(self) -> Hooks:
        """Return the overrides for the functions of `backbone`."""
        return Hooks(self.norm, self.attention, self.before_upsample, self.after_downsample, self.before_conv)

    def norm(self, x, scale, bias, groups, epsilon):
        """GroupNorm with means over the positions of the image."""
        inside, count = image_mask(self.sizes, self.padded), self.sizes.prod(1)[:, None]

        def mean_of(array):
            return jnp.where(inside, array, 0).sum((1, 2)) / count

        return layers.group_norm(x, scale, bias, groups, epsilon, mean_of)

    def attention(self, query, key, value, size):
        """Attend to the positions of the image, which are moved to the front: kernels know lengths, not masks."""
        del size
        height, width = self.sizes[:, 0, None], self.sizes[:, 1, None]
        position = jnp.arange(key.shape[1])
        source = jnp.where(position < height * width, position // width * self.padded[1] + position % width, 0)
        key, value = (jnp.take_along_axis(array, source[:, :, None, None], axis=1) for array in (key, value))
        return layers.attention(query, key, value, self.sizes.prod(1))

    def before_conv(self, x):
        """Set what is beyond the image to zero; the VAE's downsampler adds a row and a column of zeros before."""
        return jnp.where(image_mask(self.sizes, x.shape[1:3]), x, 0)

    def after_downsample(self, x):
        """Enter a level of half the size, rounded up."""
        self.before.append((self.sizes, self.padded))
        self.sizes, self.padded = -(-self.sizes // 2), x.shape[1:3]
        return x

    def before_upsample(self, x):
        """Return to the level before the last downsampler, or, in the decoder, enter one of twice the size."""
        doubled = 2 * self.sizes, tuple(2 * side for side in self.padded)
        self.sizes, self.padded = self.before.pop() if self.before else doubled
        return x
