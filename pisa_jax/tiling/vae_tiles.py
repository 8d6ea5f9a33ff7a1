"""Run the encoder or the decoder of a VAE on an image of any size, tile by tile, in the memory of one tile.

Two kinds of layers of a VAE depend on the whole image: GroupNorm through its statistics, and attention through its keys
and values. `process_in_tiles` estimates both from samples, then computes all tiles with them. A sample consists of
small patches from all over the image that are computed in one call and normalized with their common statistics. The
statistics of several samples are pooled.

The pass over all tiles measures the statistics and keys of the image. One tile is then computed again with the measured
ones: if that hardly changes it, the tiles equal the result of the whole image to the tolerance. Otherwise, another pass
follows. Using the measured statistics in that pass would correct only one more layer, because the statistics of a layer
depend on all layers before it. Therefore a sample carries the change through all layers at once: it is normalized with
its own statistics, corrected by the shift between its statistics and those of the image in the previous pass. The shift
hardly depends on the statistics, so each further pass reduces the error to about a tenth.

This module knows neither a model nor jax: it takes functions. Positions and sizes are counted in latents.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

# With more latents than this, only every second (third, ...) row and column provides keys for the attention.
MAX_KEYS = 2**16
# Side of a sample's patches in latents. Small ones represent the image better, and their margins cost more.
PATCH = 16
# Area of all samples with their margins, relative to the image.
SAMPLED_AREA = 0.75
MAX_PASSES = 8
# Steps of the R2 sequence: 1 / g and 1 / g^2 with g^3 = g + 1.
R2_STEP = (0.7548776662466927, 0.5698402909980532)
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
    tolerance: float  # residual of `process_in_tiles` that ends the passes
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


def sample_shape(sides: Sequence[int], size: Sequence[int]) -> tuple[tuple[int, int], int, int]:
    """Return the size, the margin and the number of a sample's patches; their windows have the area of a tile.

    The margin is a quarter of a patch: the statistics may be inexact, but must not need more memory than a tile.
    """
    patch = min(PATCH, max(max(size) // 4, 1))
    margin = -(-patch // 4)
    lengths = tuple(min(patch, side) for side in sides)
    window = math.prod(window_length(length, side, margin) for length, side in zip(lengths, sides, strict=True))
    return lengths, margin, max(math.prod(size) // window, 1)


def sample_grid(
    sides: Sequence[int], patch: Sequence[int], margin: int, count: int, index: int = 0
) -> list[TilePlacement]:
    """Return the `count` patches of one sample; samples of successive indices complement each other.

    The patches are cells of a grid over the image, chosen by the R2 sequence, whose points are evenly spread.

    Reference: Roberts 2018, "The unreasonable effectiveness of quasirandom sequences".
    """
    points = (0.5 + np.outer(index * count + np.arange(count), R2_STEP)) % 1
    axes = []
    for side, length, point in zip(sides, patch, points.T, strict=True):
        starts = np.linspace(0, side - length, max(side // length, 1)).round().astype(int)
        axes.append([_place(start, start, start + length, length, side, margin)
                     for start in starts[(point * len(starts)).astype(int)]])  # fmt: skip
    return [TilePlacement(*np.transpose(pair).astype(np.int32)) for pair in zip(*axes, strict=True)]


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


def process_in_tiles(
    functions: TileFunctions, source: Float[np.ndarray, "h w c"], tile: int, fast: bool = False
) -> tuple[Float[np.ndarray, "y x d"], float]:
    """Run the encoder or decoder on one image with tiles of `tile` latents.

    Returns the output and the residual, an estimate of its error: the mean absolute change of one tile if the measured
    statistics and keys replace those that were used, in standard deviations of the tile. Above `functions.tolerance`,
    MAX_PASSES did not suffice. With `fast`, the statistics of one sample are used in one pass, and the residual is 0.
    """
    sides = _latent_sides(functions, source)
    size = tuple(min(tile, side) for side in sides)
    samples = 1 if fast else math.ceil(SAMPLED_AREA * math.prod(sides) / math.prod(size))
    no_shift = np.zeros(functions.statistics_shape, np.float32)
    statistics, keys = _pool_samples(
        [functions.measure_sample(*_sample(functions, source, size, index), no_shift, None) for index in range(samples)]
    )
    keys, residual = functions.transfer(keys), 0.0
    output = np.empty((*(side * functions.output_scale for side in sides), functions.output_channels), np.float32)
    for remaining in reversed(range(MAX_PASSES)):
        measured, new_keys = _run_pass(functions, source, size, statistics, keys, output)
        if fast:
            break
        keys = functions.transfer(new_keys)
        residual = _change_of_a_tile(functions, source, size, measured, keys, output)
        if residual < functions.tolerance or not remaining:
            break
        statistics = _propagate(functions, _sample(functions, source, size, 0), statistics, measured, keys)
    return output, residual


def statistics_shift(
    statistics: Float[np.ndarray, "n 2 g"], other: Float[np.ndarray, "n 2 g"]
) -> Float[np.ndarray, "n 2 g"]:
    """Return the shift from `statistics` to `other`: (m' - m) / sqrt(v) and log(v' / v), with EPSILON added to v."""
    variance = statistics[:, 1] + EPSILON
    return np.stack(
        [(other[:, 0] - statistics[:, 0]) / np.sqrt(variance), np.log((other[:, 1] + EPSILON) / variance)], axis=1
    )


def _latent_sides(functions, source) -> tuple[int, int]:
    return tuple(side // functions.input_scale for side in source.shape[:2])


def _sample(functions, source, size, index) -> tuple[tuple, np.ndarray, TilePlacement]:
    """Return the size, the windows and the placements of the patches of sample number `index`."""
    sides = _latent_sides(functions, source)
    patch, margin, count = sample_shape(sides, size)
    placements = sample_grid(sides, patch, margin, count, index)
    windows = extract_windows(source, placements, patch, margin, functions.input_scale)
    return patch, windows, _stack_placements(placements)


def _process(
    functions, source, size, placements, statistics, keys
) -> Iterator[tuple[TilePlacement, np.ndarray, TileMeasurements]]:
    """Compute tiles in batches; yield the placement, the output and the measurements of each tile."""
    for first in range(0, len(placements), functions.batch_size):
        current = placements[first : first + functions.batch_size]
        padded = current + [current[-1]] * (functions.batch_size - len(current))
        windows = extract_windows(source, padded, size, functions.margin, functions.input_scale)
        results, found = functions.process_tiles(size, windows, _stack_placements(padded), statistics, keys)
        rows = zip(current, np.asarray(results), *map(np.asarray, found), strict=False)
        yield from ((placement, result, TileMeasurements(*arrays)) for placement, result, *arrays in rows)


def _run_pass(functions, source, size, statistics, keys, output) -> tuple[np.ndarray, AttentionKeys]:
    """Compute all tiles once: write `output`, return the statistics and the keys of the image."""
    sides = _latent_sides(functions, source)
    moments, new_keys = np.zeros(functions.statistics_shape), _empty_keys(keys, sides)
    placements = tile_grid(sides, size, functions.margin)
    for placement, result, found in _process(functions, source, size, placements, statistics, keys):
        write_tile(output, placement, result, placement.output, functions.output_scale)
        moments += found.moments * (math.prod(placement.stop - placement.start) / math.prod(sides))
        _write_keys(new_keys, sides, placement, found.keys, found.values)
    return _combine_moments(statistics, moments), new_keys


def _change_of_a_tile(functions, source, size, statistics, keys, output) -> float:
    """Return the mean absolute change of the middle tile with other statistics and keys, in standard deviations."""
    placements = tile_grid(_latent_sides(functions, source), size, functions.margin)
    middle = placements[len(placements) // 2 : len(placements) // 2 + 1]
    placement, result, _ = next(_process(functions, source, size, middle, statistics, keys))
    before = own_area(output, placement, scale=functions.output_scale)
    change = np.abs(own_area(result, placement, placement.output, functions.output_scale) - before).mean()
    return float(change / (before.std() + EPSILON))


def _propagate(functions, sample, statistics, measured, keys) -> np.ndarray:
    """Return new statistics of the image, given those that were used in a pass and those `measured` in it."""
    patch, windows, placements = sample
    rest = (0, -len(windows) % functions.batch_size)
    padded = (np.pad(array, (rest, *[(0, 0)] * (array.ndim - 1)), "edge") for array in (windows, *placements))
    _, found = functions.process_tiles(patch, next(padded), TilePlacement(*padded), statistics, keys)
    of_sample = _combine_moments(statistics, np.asarray(found.moments)[: len(windows)].mean(0))
    return np.asarray(functions.measure_sample(*sample, statistics_shift(of_sample, measured), keys).applied)


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


def _pool_samples(samples: Sequence[SampleMeasurements]) -> tuple[np.ndarray, AttentionKeys]:
    """Return the mean and variance over all samples, and their keys.

    The keys are in arrays of MAX_KEYS, so that one compilation serves images of every size.
    """
    mean, variance = np.moveaxis([np.asarray(sample.measured) for sample in samples], 2, 0)
    statistics = np.stack([mean.mean(0), variance.mean(0) + mean.var(0)], axis=1)
    keys, values = (np.concatenate([np.asarray(sample[at]) for sample in samples]) for at in (2, 3))
    stride = -(-len(keys) // MAX_KEYS)
    count = len(keys[::stride])
    arrays = [np.zeros((MAX_KEYS, *array.shape[1:]), np.float32) for array in (keys, values)]
    for array, found in zip(arrays, (keys, values), strict=True):
        array[:count] = found[::stride]
    return statistics, AttentionKeys(*arrays, np.int32(count))


def _combine_moments(statistics, moments):
    """Return mean and variance of the image from its moments around the means in `statistics`."""
    mean, square = moments[:, 0], moments[:, 1]
    return np.stack([statistics[:, 0] + mean, np.maximum(square - mean**2, 0)], axis=1).astype(np.float32)
