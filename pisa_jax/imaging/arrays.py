"""Arrays of images and latents."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, UInt8

# An RGB image of 8 bits per channel.
RGB8 = UInt8[np.ndarray, "_ _ 3"]
# The latents of an image.
Latents = Float[np.ndarray, "_ _ _"]


def stack_images(images: Sequence[np.ndarray]) -> np.ndarray:
    """Stack images into a batch; a single image, which may be large, is not copied."""
    return np.stack(images) if len(images) > 1 else images[0][None]
