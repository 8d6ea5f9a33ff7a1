"""Scale maps: arrays (h, w) that cover an image and hold the scale of an adapter at every place of it."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float32
from PIL import Image

from pisa_jax.config import check_scales

# Of any resolution.
Map = Float32[np.ndarray, "_ _"]
# A number, a map, or a list with one of these for each image of a batch.
ScaleOrMap = float | Map | list[float | Map]


def check_scales_or_maps(scales: Any, names: Sequence[str], images: int = 1) -> tuple[ScaleOrMap, ...]:
    """Return the scales of the adapters `names`, in order: numbers as floats, arrays (h, w) as float32 maps.

    In place of a scale, a list or tuple has one number or map for each of the `images` of a batch.

    Raises:
        ValueError: another number of scales; NaN and infinite values; arrays that are empty or not (h, w).
    """
    if not isinstance(scales, list | tuple) or all(map(_is_number, scales)):
        return check_scales(scales, names)
    if len(scales) != len(names):
        raise ValueError(f"{len(scales)} scales for {len(names)} adapters; the adapters are {', '.join(names)}")
    return tuple(
        _check_each(scale, name, images) if isinstance(scale, list | tuple) else _check_one(scale, name)
        for scale, name in zip(scales, names, strict=True)
    )


def are_one(scales: Sequence[ScaleOrMap]) -> bool:
    """Return True if all scales are 1, everywhere."""
    return all(are_one(scale) if isinstance(scale, list) else bool(np.all(scale == 1)) for scale in scales)


def scale_at_latents(
    scale: ScaleOrMap, size: tuple[int, int], padded: tuple[int, int], grid: tuple[int, int]
) -> float | Float32[np.ndarray, "#b y x 1"]:
    """Return a number as it is, and maps as the scale of every latent.

    The maps cover the first `size` (h, w) of the `padded` pixels of a network input, which has a `grid` of latents.
    """
    if isinstance(scale, float):
        return scale
    maps = [
        np.full(grid, each, np.float32) if isinstance(each, float) else resample(each, size, padded, grid)
        for each in (scale if isinstance(scale, list) else [scale])
    ]
    return np.stack(maps)[..., None]


def resample(
    values: Float32[np.ndarray, "h w"], size: tuple[int, int], padded: tuple[int, int], grid: tuple[int, int]
) -> Float32[np.ndarray, "y x"]:
    """Resample a map that covers the first `size` of `padded` pixels to a `grid` over all of them.

    The filter is Pillow's bilinear one: interpolation where the map has fewer values than the grid, and an average
    under a triangle of two latents where it has more. Outside the image, the map continues with the values at its
    border. A map of the grid's size is returned as it is if there is no padding, and a constant stays constant exactly,
    because Pillow computes in float64 and rounds to float32.
    """
    cells = [length * whole / part for length, whole, part in zip(values.shape, padded, size, strict=True)]
    beyond = [(0, math.ceil(count) - length) for count, length in zip(cells, values.shape, strict=True)]
    image = Image.fromarray(np.pad(values, beyond, mode="edge"))
    return np.asarray(image.resize(grid[::-1], Image.Resampling.BILINEAR, box=(0, 0, *cells[::-1])))


def _is_number(scale: Any) -> bool:
    return not isinstance(scale, list | tuple) and np.ndim(scale) == 0


def _check_each(scales: Sequence[Any], name: str, images: int) -> list[float | Map]:
    if len(scales) != images:
        raise ValueError(f"{len(scales)} scales of {name!r} for {images} images; give one scale, or one for each image")
    return [_check_one(scale, name) for scale in scales]


def _check_one(scale: Any, name: str) -> float | Map:
    if _is_number(scale):
        return check_scales([scale], [name])[0]
    try:
        with np.errstate(over="ignore"):  # the check below refuses what float32 does not hold
            values = np.asarray(scale, np.float32)
    except (TypeError, ValueError) as error:
        raise ValueError(f"the scale map of {name!r} is no array of numbers: {error}") from None
    if values.ndim != 2 or not values.size:
        raise ValueError(f"the scale map of {name!r} has the shape {values.shape}; expected (h, w), not empty")
    if not np.isfinite(values).all():
        row, column = np.argwhere(~np.isfinite(values))[0]
        raise ValueError(
            f"the scale map of {name!r} is {values[row, column]} at row {row}, column {column}; all values must be "
            "finite and in the range of float32"
        )
    return values
