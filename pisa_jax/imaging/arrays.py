"""Arrays of images and latents."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int, UInt8

# An RGB image of 8 bits per channel.
RGB8 = UInt8[np.ndarray, "_ _ 3"]
# The latents of an image.
Latents = Float[np.ndarray, "_ _ _"]


def stack_images(images: Sequence[np.ndarray]) -> np.ndarray:
    """Stack images into a batch; a single image, which may be large, is not copied."""
    return np.stack(images) if len(images) > 1 else images[0][None]


def pad_images(images: Sequence[np.ndarray], size: tuple[int, int]) -> np.ndarray:
    """Stack images (h, w, ...) in arrays of `size`, with zeros at the bottom and at the right."""
    batch = np.zeros((len(images), *size, *images[0].shape[2:]), images[0].dtype)
    for target, image in zip(batch, images, strict=True):
        target[: image.shape[0], : image.shape[1]] = image
    return batch


def crop_images(batch: np.ndarray, sizes: Int[np.ndarray, "b 2"]) -> list[np.ndarray]:
    """Return the images of a padded batch as views: the first `sizes` rows and columns."""
    return [image[:height, :width] for image, (height, width) in zip(batch, sizes, strict=True)]
