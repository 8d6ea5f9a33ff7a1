"""Masks of images in arrays that are padded at the bottom and at the right."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


def image_mask(sizes: Int[Array, "b 2"], padded: tuple[int, ...]) -> Bool[Array, "b h w 1"]:
    """Return True for the first `sizes` (height, width) of the `padded` positions of each image."""
    rows, columns = (jnp.arange(length) < sizes[:, axis, None] for axis, length in enumerate(padded))
    return (rows[:, :, None] & columns[:, None])[..., None]
