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

from pisa_jax.tiling.placements import TilePlacement, extract_windows, own_area, stack_placements, tile_grid, write_tile
from pisa_jax.tiling.samples import Sample, Sampler

# With more latents than this, only every second (third, ...) row and column provides keys for the attention.
MAX_KEYS = 2**16
# Area of all samples with their margins, relative to the image.
SAMPLED_AREA = 0.5
MAX_PASSES = 8
# Added to variances before division, as the GroupNorms of the VAE do.
EPSILON = 1e-6


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
    # (size, windows, placements, weights of the patches, shift, keys) -> SampleMeasurements; without keys, the sample
    # attends to itself
    measure_sample: Callable[..., SampleMeasurements]
    process_whole: Callable[[np.ndarray], Any]  # (1, h, w, c) -> (1, y, x, d), without tiles
    # Transfer keys to the devices, once for all tiles of a pass.
    transfer: Callable[[AttentionKeys], AttentionKeys]
    margin: int  # latents that a tile needs around its output
    input_scale: int  # input positions per latent along each axis
    output_scale: int  # output positions per latent along each axis
    output_channels: int
    statistics_shape: tuple[int, int, int]  # norms, 2 (mean, variance), groups
    tolerance: float  # residual of `process_in_tiles` that ends the passes
    has_attention: bool  # without, keys are not used
    whole_tiles: int  # an image whose sides are at most this many tiles is computed without tiles
    batch_size: int = 1  # tiles per call


class TiledVae(NamedTuple):
    """The functions of a base model that run its VAE in tiles."""

    # Shape (b, h, w, c) of network inputs -> estimated memory (`memory.Footprint`).
    footprint: Callable
    # (vae params, mesh, run) -> `TileFunctions` of the parts: images to the mean and deviation of unscaled latents, and
    # scaled latents to images. `run(function, static, *arrays)` returns function(*static, weights, *arrays), compiled.
    encoder: Callable
    decoder: Callable
    # The UNet's latents are the encoder's multiplied by this (0.18215 for SD 2.1).
    latent_scale: float


def process_in_tiles(
    functions: TileFunctions, source: Float[np.ndarray, "h w c"], tile: int, fast: bool = False
) -> tuple[Float[np.ndarray, "y x d"], float]:
    """Run the encoder or decoder on one image with tiles of `tile` latents.

    Returns the output and the residual, an estimate of its error: the mean absolute change of one tile if the measured
    statistics and keys replace those that were used, in standard deviations of the tile. Above `functions.tolerance`,
    MAX_PASSES did not suffice. With `fast`, the statistics of one sample are used in one pass, and the residual is 0.
    """
    sides = _latent_sides(functions, source)
    if max(sides) <= functions.whole_tiles * tile:
        return np.asarray(functions.process_whole(source[None]))[0], 0.0
    size = tuple(min(tile * functions.whole_tiles, side) for side in sides)
    sampler, no_shift = Sampler(source, size, functions.input_scale), np.zeros(functions.statistics_shape, np.float32)
    samples = 1 if fast else math.ceil(SAMPLED_AREA * math.prod(sides) / math.prod(size))
    statistics, keys = _pool_samples(
        [functions.measure_sample(*sampler.sample(index), no_shift, None) for index in range(samples)]
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
        statistics = _propagate(functions, sampler.sample(0), statistics, measured, keys)
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


def _process(
    functions, source, size, placements, statistics, keys
) -> Iterator[tuple[TilePlacement, np.ndarray, TileMeasurements]]:
    """Compute tiles in batches; yield the placement, the output and the measurements of each tile."""
    for first in range(0, len(placements), functions.batch_size):
        current = placements[first : first + functions.batch_size]
        padded = current + [current[-1]] * (functions.batch_size - len(current))
        windows = extract_windows(source, padded, size, functions.margin, functions.input_scale)
        results, found = functions.process_tiles(size, windows, stack_placements(padded), statistics, keys)
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
    """Return the mean absolute change of a tile with other statistics and keys, in standard deviations of the tile.

    The tile is at the center of the image and has a quarter of the area of the others, which is enough for a mean.
    """
    size = tuple(-(-length // 2) for length in size)
    placements = tile_grid(_latent_sides(functions, source), size, functions.margin)
    middle = placements[len(placements) // 2 : len(placements) // 2 + 1]
    placement, result, _ = next(_process(functions, source, size, middle, statistics, keys))
    before = own_area(output, placement, scale=functions.output_scale)
    change = np.abs(own_area(result, placement, placement.output, functions.output_scale) - before).mean()
    return float(change / (before.std() + EPSILON))


def _propagate(functions, sample: Sample, statistics, measured, keys) -> np.ndarray:
    """Return new statistics of the image, given those that were used in a pass and those `measured` in it."""
    rest = (0, -len(sample.windows) % functions.batch_size)
    padded = (
        np.pad(array, (rest, *[(0, 0)] * (array.ndim - 1)), "edge") for array in (sample.windows, *sample.placements)
    )
    _, found = functions.process_tiles(sample.size, next(padded), TilePlacement(*padded), statistics, keys)
    moments = np.asarray(found.moments)[: len(sample.windows)]
    of_sample = _combine_moments(statistics, np.tensordot(sample.weights, moments, 1))
    keys = keys if functions.has_attention else None  # as for the first samples, so that nothing is compiled
    return np.asarray(functions.measure_sample(*sample, statistics_shift(of_sample, measured), keys).applied)


def key_stride(sides: Sequence[int]) -> int:
    """Return the smallest stride of rows and columns for which the image has at most MAX_KEYS keys."""
    return next(n for n in itertools.count(1) if math.prod(-(-side // n) for side in sides) <= MAX_KEYS)


def _empty_keys(like, sides) -> AttentionKeys:
    arrays = (np.zeros(array.shape, np.float32) for array in like[:2])
    return AttentionKeys(*arrays, np.int32(math.prod(-(-side // key_stride(sides)) for side in sides)))


def _write_keys(new_keys, sides, placement, *measured):
    """Write the keys and values of a tile's own area to their places in those of the image, which are row by row."""
    stride = key_stride(sides)
    y, x = (
        np.arange(-(-start // stride) * stride, stop, stride)
        for start, stop in zip(placement.start, placement.stop, strict=True)
    )
    target = (y[:, None] // stride * -(-sides[1] // stride) + x // stride).ravel()
    for array, found in zip(new_keys, measured, strict=False):
        own = found[np.ix_(y - placement.output[0], x - placement.output[1])]
        array[target] = own.reshape(-1, *array.shape[1:])


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
