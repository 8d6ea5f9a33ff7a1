"""Tiles of an image: where they are, their windows with margins, and what of their results belongs to the image.

Positions and sizes are counted in latents; arrays can have several positions per latent (`scale`).
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int


class TilePlacement(NamedTuple):
    """Positions (row, column) of one tile or of a batch of tiles in the image."""

    window: Int[Any, "*b 2"]  # first position of the window, the input of the tile
    output: Int[Any, "*b 2"]  # first position of the output
    start: Int[Any, "*b 2"]  # the tile's own area: each position of the image belongs to exactly one tile
    stop: Int[Any, "*b 2"]


def tile_grid(sides: Sequence[int], size: Sequence[int], margin: int) -> list[TilePlacement]:
    """Return tiles of `size` that cover an image of `sides`, row by row.

    Tiles at the border are shifted inwards, so all have the same size.
    """
    rows, columns = (
        [place(start, start, min(start + length, side), length, side, margin) for start in range(0, side, length)]
        for side, length in zip(sides, size, strict=True)
    )
    return [TilePlacement(*np.transpose([row, column]).astype(np.int32)) for row in rows for column in columns]


def place(output: Any, start: Any, stop: Any, length: int, side: int, margin: int) -> tuple[Any, Any, Any, Any]:
    """Return (window, output, start, stop) along one axis."""
    output = min(output, side - length)
    return np.clip(output - margin, 0, side - window_length(length, side, margin)), output, start, stop


def window_length(length: int, side: int, margin: int) -> int:
    """Return the length of a window along an axis: the tile with its margins, or the whole side if it is shorter."""
    return min(length + 2 * margin, side)


def extract_windows(
    array: np.ndarray, placements: Sequence[TilePlacement], size: Sequence[int], margin: int, scale: int = 1
) -> np.ndarray:
    """Stack the windows of tiles of `size`, from an array with `scale` positions per latent."""
    lengths = [
        window_length(length, side // scale, margin) * scale for length, side in zip(size, array.shape[:2], strict=True)
    ]
    corners = [placement.window * scale for placement in placements]
    return np.stack([array[y : y + lengths[0], x : x + lengths[1]] for y, x in corners])


def write_tile(
    image: np.ndarray, placement: TilePlacement, result: np.ndarray, first: Int[np.ndarray, "2"], scale: int = 1
) -> None:
    """Copy a tile's own area into `image`, from an array `result` whose first element is at position `first`."""
    own_area(image, placement, scale=scale)[:] = own_area(result, placement, first, scale)


def own_area(array: np.ndarray, placement: TilePlacement, first: Any = 0, scale: int = 1) -> np.ndarray:
    """Return the view of a tile's own area in an array whose first element is at position `first`."""
    (top, left), (bottom, right) = (placement.start - first) * scale, (placement.stop - first) * scale
    return array[top:bottom, left:right]


def map_tiles(function: Callable, arrays: Sequence[np.ndarray], tile: int, margin: int) -> np.ndarray:
    """Apply a local function of (1, h, w, c) arrays tile by tile; its output depends on `margin` positions around."""
    sides = arrays[0].shape[:2]
    size = tuple(min(tile, side) for side in sides)
    image = np.empty_like(arrays[0])
    for placement in tile_grid(sides, size, margin):
        result = np.asarray(function(*(extract_windows(array, [placement], size, margin) for array in arrays)))
        write_tile(image, placement, result[0], placement.window)
    return image


def stack_placements(placements: Sequence[TilePlacement]) -> TilePlacement:
    """Return the placements of a batch."""
    return TilePlacement(*map(np.stack, zip(*placements, strict=True)))
