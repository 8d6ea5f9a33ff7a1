"""Run the encoder or the decoder of a VAE on an image of any size, tile by tile, in the memory of one tile.

Two kinds of layers of a VAE depend on the whole image: GroupNorm through its statistics, and attention through its keys
and values. `process_in_tiles` determines both iteratively. In each pass, all tiles are computed with given statistics
and keys, and their own are measured. Once the given and the measured ones agree, the tiles equal the result of the
whole image.

Using the measured statistics in the next pass would correct only one more layer per pass, because the statistics of a
layer depend on all layers before it. Therefore a sample, small patches from all over the image that are computed in one
call, carries a change through all layers at once: it is normalized with its own statistics, corrected by the shift
between its statistics and those of the image in the previous pass. The shift hardly depends on the statistics, so each
pass reduces the error to about a tenth.

This module knows neither a model nor jax: it takes functions. Positions and sizes are counted in latents.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

# With more latents than this, only every second (third, ...) row and column provides keys for the attention.
MAX_KEYS = 2**16
# Patches of the sample along each axis; together they have the area of a tile.
SAMPLE_PATCHES = 4
# Convergence: largest difference of means in standard deviations, of variances and of keys in relative terms.
TOLERANCE = 5e-3
MAX_PASSES = 8
# Added to variances before division, as the GroupNorms of the VAE do.
EPSILON = 1e-6


class TilePlacement(NamedTuple):
    """Positions (row, column) of one tile or of a batch of tiles in the image."""

    window: Int[Any, "*b 2"]  # first position of the window, the input of the tile
    output: Int[Any, "*b 2"]  # first position of the output
    start: Int[Any, "*b 2"]  # the tile's own area: each position of the image belongs to exactly one tile
    stop: Int[Any, "*b 2"]


class AttentionKeys(NamedTuple):
    """Keys and values of the attention layer, of which the first `count` are valid."""

    keys: Float[Any, "m heads d"]
    values: Float[Any, "m heads d"]
    count: Int[Any, ""]


class TileMeasurements(NamedTuple):
    """Statistics, keys and values that a batch of tiles measures."""

    moments: Float[Any, "b norms 2 groups"]  # means over the tile's own area of x - mean and (x - mean)^2
    keys: Float[Any, "b y x heads d"]  # at the positions of the output
    values: Float[Any, "b y x heads d"]


class SampleMeasurements(NamedTuple):
    """Statistics, keys and values that the sample measures."""

    measured: Float[Any, "norms 2 groups"]  # means and variances of the sample
    applied: Float[Any, "norms 2 groups"]  # the shifted ones that normalized it
    keys: Float[Any, "n heads d"]
    values: Float[Any, "n heads d"]


class TileFunctions(NamedTuple):
    """The encoder or the decoder, as functions over tiles, and its geometry."""

    # (size, windows, placements, statistics, keys) -> (outputs of that size, TileMeasurements)
    process_tiles: Callable[[tuple, np.ndarray, TilePlacement, np.ndarray, AttentionKeys], tuple[Any, TileMeasurements]]
    # (size, windows, placements, shift, keys) -> SampleMeasurements; without keys, the sample attends to itself
    measure_sample: Callable[[tuple, np.ndarray, TilePlacement, np.ndarray, AttentionKeys | None], SampleMeasurements]
    # Transfer keys to the devices, once for all tiles of a pass.
    transfer: Callable[[AttentionKeys], AttentionKeys]
    margin: int  # latents that a tile needs around its output
    input_scale: int  # input positions per latent along each axis
    output_scale: int  # output positions per latent along each axis
    output_channels: int
    statistics_shape: tuple[int, int, int]  # norms, 2 (mean, variance), groups
    batch_size: int = 1  # tiles per call


class TiledVae(NamedTuple):
    """The functions of a base model that run its VAE in tiles."""

    # Shape (b, h, w, c) of network inputs -> estimated memory (`memory.Footprint`).
    footprint: Callable
    # (vae params, mesh, run) -> `TileFunctions`: images to the mean and deviation of unscaled latents, and scaled
    # latents to images. `run(function, static, *arrays)` returns function(*static, weights, *arrays), compiled.
    encoder: Callable
    decoder: Callable
    # The UNet's latents are the encoder's multiplied by this (0.18215 for SD 2.1).
    latent_scale: float


def tile_grid(sides: Sequence[int], size: Sequence[int], margin: int) -> list[TilePlacement]:
    """Return tiles of `size` that cover an image of `sides`, row by row.

    Tiles at the border are shifted inwards, so all have the same size.
    """
    rows, columns = (
        [_place(start, start, min(start + length, side), length, side, margin) for start in range(0, side, length)]
        for side, length in zip(sides, size, strict=True)
    )
    return [TilePlacement(*np.transpose([row, column]).astype(np.int32)) for row in rows for column in columns]


def _place(output, start, stop, length, side, margin):
    """Return (window, output, start, stop) along one axis."""
    output = min(output, side - length)
    return np.clip(output - margin, 0, side - window_length(length, side, margin)), output, start, stop


def window_length(length: int, side: int, margin: int) -> int:
    """Return the length of a window along an axis: the tile with its margins, or the whole side if it is shorter."""
    return min(length + 2 * margin, side)


def sample_grid(
    sides: Sequence[int], size: Sequence[int], margin: int
) -> tuple[tuple[int, int], int, list[TilePlacement]]:
    """Return the size, the margin and the placements of the sample's patches, evenly spaced over the image.

    The margin is at most a quarter of a patch: the sample may be inexact, but must not need more memory than a tile.
    """
    patch = tuple(max(length // SAMPLE_PATCHES, 1) for length in size)
    margin = min(margin, -(-max(patch) // 4))
    rows, columns = (
        [_place(start, start, start + length, length, side, margin)
         for start in np.linspace(0, side - length, SAMPLE_PATCHES).round().astype(int)]
        for side, length in zip(sides, patch, strict=True)
    )  # fmt: skip
    placements = [TilePlacement(*np.transpose([row, column]).astype(np.int32)) for row in rows for column in columns]
    return patch, margin, placements


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
    (top, left), (bottom, right) = placement.start * scale, placement.stop * scale
    y, x = (placement.start - first) * scale
    image[top:bottom, left:right] = result[y : y + bottom - top, x : x + right - left]


def map_tiles(function: Callable, arrays: Sequence[np.ndarray], tile: int, margin: int) -> np.ndarray:
    """Apply a local function of (1, h, w, c) arrays tile by tile; its output depends on `margin` positions around."""
    sides = arrays[0].shape[:2]
    size = tuple(min(tile, side) for side in sides)
    image = np.empty_like(arrays[0])
    for placement in tile_grid(sides, size, margin):
        result = np.asarray(function(*(extract_windows(array, [placement], size, margin) for array in arrays)))
        write_tile(image, placement, result[0], placement.window)
    return image


def process_in_tiles(
    functions: TileFunctions, source: Float[np.ndarray, "h w c"], tile: int
) -> tuple[Float[np.ndarray, "y x d"], float]:
    """Run the encoder or decoder on one image with tiles of `tile` latents.

    Returns the output and the residual: the largest difference between the statistics (or keys) that were used and
    those that were measured. Above TOLERANCE, the iteration stopped after MAX_PASSES without convergence.
    """
    sides = tuple(side // functions.input_scale for side in source.shape[:2])
    size = tuple(min(tile, side) for side in sides)
    patch, margin, placements = sample_grid(sides, size, functions.margin)
    windows = extract_windows(source, placements, patch, margin, functions.input_scale)
    sample = patch, windows, _stack_placements(placements)
    shift, keys = np.zeros(functions.statistics_shape, np.float32), None
    output = np.empty((*(side * functions.output_scale for side in sides), functions.output_channels), np.float32)
    for index in range(MAX_PASSES):
        on_device = None if keys is None else functions.transfer(keys)
        found = SampleMeasurements(*map(np.asarray, functions.measure_sample(*sample, shift, on_device)))
        if keys is None:
            keys = _keys_of_sample(found)
            on_device = functions.transfer(keys)
        moments, new_keys = _run_pass(functions, source, size, found.applied, on_device, output)
        statistics = _combine_moments(found.applied, moments)
        residual = float(np.abs(statistics_shift(found.applied, statistics)).max())
        # The keys of the first pass are those of the sample: there is nothing to compare the measured ones with.
        residual = max(residual, _key_difference(keys, new_keys) if index else np.inf)
        if residual < TOLERANCE:
            break
        shift, keys = statistics_shift(found.measured, statistics), new_keys
    return output, residual


def statistics_shift(
    statistics: Float[np.ndarray, "n 2 g"], other: Float[np.ndarray, "n 2 g"]
) -> Float[np.ndarray, "n 2 g"]:
    """Return the shift from `statistics` to `other`: (m' - m) / sqrt(v) and log(v' / v), with EPSILON added to v."""
    variance = statistics[:, 1] + EPSILON
    return np.stack(
        [(other[:, 0] - statistics[:, 0]) / np.sqrt(variance), np.log((other[:, 1] + EPSILON) / variance)], axis=1
    )


def _run_pass(functions, source, size, statistics, keys, output) -> tuple[np.ndarray, AttentionKeys]:
    """Compute all tiles once: write `output`, return the moments and the keys of the image."""
    sides = tuple(side // functions.input_scale for side in source.shape[:2])
    moments, new_keys = np.zeros(functions.statistics_shape), _empty_keys(keys, sides)
    placements = tile_grid(sides, size, functions.margin)
    for first in range(0, len(placements), functions.batch_size):
        current = placements[first : first + functions.batch_size]
        padded = current + [current[-1]] * (functions.batch_size - len(current))
        windows = extract_windows(source, padded, size, functions.margin, functions.input_scale)
        results, found = functions.process_tiles(size, windows, _stack_placements(padded), statistics, keys)
        found = TileMeasurements(*map(np.asarray, found))
        for index, (placement, result) in enumerate(zip(current, np.asarray(results), strict=False)):
            write_tile(output, placement, result, placement.output, functions.output_scale)
            moments += found.moments[index] * (math.prod(placement.stop - placement.start) / math.prod(sides))
            _write_keys(new_keys, sides, placement, found.keys[index], found.values[index])
    return moments, new_keys


def _key_stride(sides) -> int:
    """Return the smallest stride of rows and columns for which the image has at most MAX_KEYS keys."""
    return next(n for n in itertools.count(1) if math.prod(-(-side // n) for side in sides) <= MAX_KEYS)


def _empty_keys(like, sides) -> AttentionKeys:
    arrays = (np.zeros(array.shape, np.float32) for array in like[:2])
    return AttentionKeys(*arrays, np.int32(math.prod(-(-side // _key_stride(sides)) for side in sides)))


def _write_keys(new_keys, sides, placement, *measured):
    """Write the keys and values of a tile's own area to their places in those of the image, which are row by row."""
    stride = _key_stride(sides)
    y, x = (
        np.arange(-(-start // stride) * stride, stop, stride)
        for start, stop in zip(placement.start, placement.stop, strict=True)
    )
    target = (y[:, None] // stride * -(-sides[1] // stride) + x // stride).ravel()
    for array, found in zip(new_keys, measured, strict=False):
        own = found[np.ix_(y - placement.output[0], x - placement.output[1])]
        array[target] = own.reshape(-1, *array.shape[1:])


def _stack_placements(placements: Sequence[TilePlacement]) -> TilePlacement:
    return TilePlacement(*map(np.stack, zip(*placements, strict=True)))


def _keys_of_sample(sample: SampleMeasurements) -> AttentionKeys:
    """Return the keys of the sample in arrays of MAX_KEYS, so that one compilation serves images of every size."""
    stride = -(-len(sample.keys) // MAX_KEYS)
    count = len(sample.keys[::stride])
    arrays = [np.zeros((MAX_KEYS, *array.shape[1:]), np.float32) for array in (sample.keys, sample.values)]
    for array, own in zip(arrays, (sample.keys, sample.values), strict=True):
        array[:count] = own[::stride]
    return AttentionKeys(*arrays, np.int32(count))


def _combine_moments(statistics, moments):
    """Return mean and variance of the image from its moments around the means in `statistics`."""
    mean, square = moments[:, 0], moments[:, 1]
    return np.stack([statistics[:, 0] + mean, np.maximum(square - mean**2, 0)], axis=1).astype(np.float32)


def _key_difference(keys: AttentionKeys, other: AttentionKeys) -> float:
    """Return the relative root mean square difference between two sets of keys of the same image."""
    count = other.count
    return float(np.linalg.norm(keys.keys[:count] - other.keys[:count]) / np.linalg.norm(other.keys[:count]))
