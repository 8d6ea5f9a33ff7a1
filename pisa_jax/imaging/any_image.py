"""Images as the library's users hold them: files, Pillow images, NumPy and JAX arrays."""

import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from pisa_jax.imaging.image_data import ImageData, from_array, to_array, to_pil
from pisa_jax.imaging.image_reading import from_pil, read_image


def to_image_data(image: Any) -> tuple[ImageData, Callable[[ImageData], Any]]:
    """Convert an image, and return a function that converts a result to the type of the image.

    The result is a Pillow image for a path.

    Raises:
        TypeError: not a path, a Pillow image, or an array.
        ImageError: an image that cannot be read or converted.
        OSError: a file that cannot be read.
    """
    if isinstance(image, str | os.PathLike):
        return read_image(image), _to_pil
    if isinstance(image, Image.Image):
        return from_pil(image), _to_pil
    if isinstance(image, jax.Array):
        # NumPy computes with bfloat16 as with an unknown type.
        array = np.asarray(image, np.float32 if image.dtype == jnp.bfloat16 else image.dtype)
        return from_array(array), lambda result: jnp.asarray(to_array(result, array.dtype.type), image.dtype)
    if isinstance(image, np.ndarray):
        return from_array(image), lambda result: to_array(result, image.dtype.type)
    raise TypeError(
        f"cannot upscale an object of type {type(image).__name__}; give a path, a Pillow image, an array, "
        "or call the upscaler with a list of these"
    )


def _to_pil(result: ImageData) -> Image.Image:
    return to_pil(result, result.bits)
