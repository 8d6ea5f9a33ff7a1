"""Apply a function to overlapping windows and blend the results with Gaussian weights."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Float


class Window(NamedTuple):
    """A rectangle: top row, left column, height, width."""

    y: int
    x: int
    height: int
    width: int


def window_grid(height: int, width: int, tile: int, overlap: int) -> list[Window]:
    """Return windows that cover height x width, row by row; their sides are `tile` or, if shorter, the array's.

    They start every tile - overlap; the last one along each axis is moved back to end at the border.

    Raises:
        ValueError: unless 0 <= overlap < tile.
    """
    if not 0 <= overlap < tile:
        raise ValueError(f"the overlap of tiles is at least 0 and less than the tile, not {overlap} with tile {tile}")
    rows, columns = (_starts(side, tile, overlap) for side in (height, width))
    return [Window(y, x, min(tile, height), min(tile, width)) for y in rows for x in columns]


def _starts(side: int, tile: int, overlap: int) -> list[int]:
    last = max(side - tile, 0)
    return [*range(0, last, tile - overlap), last]


def gaussian_weights(length: int) -> Float[np.ndarray, " length"]:
    """Return the blending weights along one axis of a window, as in the original PiSA-SR program.

    exp(-(k - (n - 1) / 2)^2 / (2 n^2 0.01)) / sqrt(2 pi 0.01) for k = 0 ... n - 1.
    """
    offset = np.arange(length) - (length - 1) / 2
    return np.exp(-(offset**2) / (2 * length**2 * 0.01)) / np.sqrt(2 * np.pi * 0.01)


def blend_windows(
    function: Callable[[Float[np.ndarray, "n h w c"]], Float[np.ndarray, "n h w d"]],
    array: Float[np.ndarray, "b height width c"],
    tile: int,
    overlap: int,
    batch_size: int,
) -> Float[np.ndarray, "b height width d"]:
    """Apply `function` to batches of windows and return the weighted mean of the results.

    The last batch is padded with copies of its last window, so `function` is compiled for a single shape.
    """
    batch, height, width, _ = array.shape
    grid = window_grid(height, width, tile, overlap)
    jobs = [(sample, window) for sample in range(batch) for window in grid]
    weight = np.outer(gaussian_weights(grid[0].height), gaussian_weights(grid[0].width))[..., None]
    total, weights = None, np.zeros((height, width, 1))
    for y, x, h, w in grid:
        weights[y : y + h, x : x + w] += weight
    for first in range(0, len(jobs), batch_size):
        current = jobs[first : first + batch_size]
        padded = current + [current[-1]] * (batch_size - len(current))
        out = function(np.stack([array[sample, y : y + h, x : x + w] for sample, (y, x, h, w) in padded]))
        if total is None:
            total = np.zeros((batch, height, width, out.shape[-1]))
        for (sample, (y, x, h, w)), values in zip(current, out, strict=False):
            total[sample, y : y + h, x : x + w] += values * weight
    return (total / weights).astype(np.float32)
