"""Color correction: transfer the colors of the network input (style) to the network output (content).

Both methods take (content, style) in [0, 1], the range for which the original program's epsilon of 1e-5 is meant, and
treat every image of a batch separately. Padding changes nothing if `sizes`, the height and width of each image in its
array, are given: it is at the bottom and at the right.
"""

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from pisa_jax.imaging.masks import image_mask

EPSILON = 1e-5  # added to the variance, as in the original program

Sizes = Int[Array, "b 2"] | None


def _mean_std(
    x: Float[Array, "b h w c"], sizes: Sizes = None
) -> tuple[Float[Array, "b 1 1 c"], Float[Array, "b 1 1 c"]]:
    """Compute mean and sqrt(unbiased variance + 1e-5) per image and channel; the variance of a single pixel is 0."""
    if sizes is not None:
        return _mean_std_of_padded(x, sizes)
    pixels = x.shape[1] * x.shape[2]
    mean = x.mean((1, 2), keepdims=True)
    variance = jnp.square(x - mean).sum((1, 2), keepdims=True) / max(pixels - 1, 1)
    return mean, jnp.sqrt(variance + EPSILON)


def _mean_std_of_padded(x, sizes):
    inside = image_mask(sizes, x.shape[1:3])
    pixels = sizes.prod(1)[:, None, None, None]
    mean = jnp.where(inside, x, 0).sum((1, 2), keepdims=True) / pixels
    variance = jnp.where(inside, jnp.square(x - mean), 0).sum((1, 2), keepdims=True) / jnp.maximum(pixels - 1, 1)
    return mean, jnp.sqrt(variance + EPSILON)


def adain(
    content: Float[Array, "b h w c"], style: Float[Array, "b h2 w2 c"], sizes: Sizes = None
) -> Float[Array, "b h w c"]:
    """Give every channel of `content` the mean and standard deviation of `style` (adaptive instance normalization).

    (content - mean_c) / std_c * std_s + mean_s. Huang and Belongie, ICCV 2017, eq. 8.
    """
    mean_c, std_c = _mean_std(content, sizes)
    mean_s, std_s = _mean_std(style, sizes)
    return (content - mean_c) / std_c * std_s + mean_s


def adain_in_place(content: Float[np.ndarray, "h w c"], style: Float[np.ndarray, "h w c"], rows: int = 256) -> None:
    """Apply `adain` to one image in [-1, 1] on the host, without copies, and clip the result; `style` is in [-1, 1]."""
    strips = [slice(first, first + rows) for first in range(0, len(content), rows)]
    (mean_c, std_c), (mean_s, std_s) = (_mean_std_by_strips(array, strips) for array in (content, style))
    for strip in strips:
        content[strip] = np.clip((content[strip] - mean_c) / std_c * std_s + mean_s, -1, 1)


def _mean_std_by_strips(array, strips):
    pixels = array.shape[0] * array.shape[1]
    mean = sum(array[strip].sum((0, 1), dtype=np.float64) for strip in strips) / pixels
    squares = sum(np.square(array[strip] - mean).sum((0, 1)) for strip in strips)
    # The range [-1, 1] is twice as wide as [0, 1], so its variance is four times as large.
    deviation = np.sqrt(squares / max(pixels - 1, 1) + 4 * EPSILON)
    return mean.astype(np.float32), deviation.astype(np.float32)


# Receptive field of `wavelet` around a pixel: 1 + 2 + 4 + 8 + 16.
WAVELET_REACH = 31


def wavelet_blur(x: Float[Array, "b h w c"], radius: int, sizes: Sizes = None) -> Float[Array, "b h w c"]:
    """Blur with (1 2 1)/4 along both axes, taps `radius` pixels apart, padded with the border pixels."""
    for axis in (1, 2):
        size = x.shape[axis]
        if sizes is not None:
            x = _repeat_last(x, sizes[:, axis - 1], axis)
        padded = jnp.pad(x, [(radius, radius) if i == axis else (0, 0) for i in range(4)], mode="edge")
        before, here, after = (lax.slice_in_dim(padded, k * radius, k * radius + size, axis=axis) for k in range(3))
        x = (before + 2 * here + after) / 4
    return x


def _repeat_last(x, lengths, axis):
    """Replace what follows the first `lengths` positions of an axis with the last of them."""
    index = jnp.minimum(jnp.arange(x.shape[axis]), lengths[:, None] - 1)
    return jnp.take_along_axis(x, jnp.expand_dims(index, [each for each in (1, 2, 3) if each != axis]), axis=axis)


def wavelet_decompose(
    x: Float[Array, "b h w c"], levels: int = 5, sizes: Sizes = None
) -> tuple[Float[Array, "b h w c"], Float[Array, "b h w c"]]:
    """Split into (high, low) frequencies by blurs of radius 1, 2, 4, ... (a-trous wavelets); high + low = x."""
    low = x
    for level in range(levels):
        low = wavelet_blur(low, 2**level, sizes)
    return x - low, low


def wavelet(
    content: Float[Array, "b h w c"], style: Float[Array, "b h w c"], sizes: Sizes = None
) -> Float[Array, "b h w c"]:
    """Combine the high frequencies of `content` with the low frequencies of `style`: high(content) + low(style).

    Wang et al., StableSR, IJCV 2024 ("color correction").
    """
    return wavelet_decompose(content, sizes=sizes)[0] + wavelet_decompose(style, sizes=sizes)[1]


def no_correction(
    content: Float[Array, "b h w c"], style: Float[Array, "b h2 w2 c"], sizes: Sizes = None
) -> Float[Array, "b h w c"]:
    """Return `content`."""
    del style, sizes
    return content


COLOR_FIXES = {"adain": adain, "wavelet": wavelet, "none": no_correction}
