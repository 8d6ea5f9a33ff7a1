"""A picture of any size through the VAE, tile by tile, in memory that grows with the tile; functions of functions.

Two things in a VAE reach over the whole picture: the statistics of its GroupNorms, and the keys and values of its
attention. `walk` finds them in passes over all tiles. In every pass the tiles take both as given and report what they
themselves find, until the two agree; then the tiles fit together as if they had been computed at once.

Taking the reported statistics for the next pass would get one layer further per pass, because every layer changes what
the next ones see. So a *sample*, pieces from all over the picture small enough to be computed at once, carries the
change through all layers: its own statistics are live, shifted by as much as they differed from the picture's in the
pass before. The shift hardly depends on the statistics, so each pass leaves about a tenth of the error before it.
Positions are counted in latents.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

# With more latents than this the attention's keys are those of every second row and column (third, ...).
MOST_KEYS = 2**16
# Pieces of the sample along each axis; together they have the area of a tile.
PIECES = 4
# Statistics have been found when none is further off than this, in standard deviations or relative; so have the keys.
TOLERANCE = 5e-3
MOST_PASSES = 8
# Added to variances in ratios, as the VAE's GroupNorms do.
EPSILON = 1e-6


class Place(NamedTuple):
    """Where tiles lie in the picture: row and column."""

    window: Int[Any, "*b 2"]  # first position that the tile sees
    output: Int[Any, "*b 2"]  # first position of its result
    start: Int[Any, "*b 2"]  # its own part: every position of the picture is one tile's own
    stop: Int[Any, "*b 2"]


class Keys(NamedTuple):
    """What the attention looks at."""

    keys: Float[Any, "m heads d"]  # the first `count` are valid
    values: Float[Any, "m heads d"]
    count: Int[Any, ""]


class Report(NamedTuple):
    """What tiles find."""

    moments: Float[Any, "b norms 2 groups"]  # means over the own part of x - mean and (x - mean)^2
    keys: Float[Any, "b y x heads d"]  # of the positions of the result
    values: Float[Any, "b y x heads d"]


class Sampled(NamedTuple):
    """What a sample finds."""

    live: Float[Any, "norms 2 groups"]  # its statistics
    used: Float[Any, "norms 2 groups"]  # the shifted ones, with which it was normalised
    keys: Float[Any, "n heads d"]
    values: Float[Any, "n heads d"]


class Direction(NamedTuple):
    """The encoder or the decoder."""

    # (size, windows of the source, places, statistics, keys) -> (results of that size, Report)
    tiles: Callable[[tuple, np.ndarray, Place, np.ndarray, Keys], tuple[Any, Report]]
    # (size, windows of the source, places, shift, keys; None: its own) -> Sampled
    sample: Callable[[tuple, np.ndarray, Place, np.ndarray, Keys | None], Sampled]
    # Keys to where the two want them: once for all tiles of a pass.
    put: Callable[[Keys], Keys]
    margin: int  # latents that a tile has to see around its result
    source: int  # positions per latent of what goes in, along each axis
    result: int  # and of what comes out
    channels: int  # of what comes out
    stats: tuple[int, int, int]  # shape of the statistics: layers, (mean, variance), groups
    together: int = 1  # tiles in one call


class TiledVae(NamedTuple):
    """The functions of a base model that run its VAE in tiles."""

    # Shape (b, h, w, c) of network inputs -> estimated memory (`memory.Footprint`).
    footprint: Callable
    # (vae params, mesh, run) -> `Direction`: images to the mean and deviation of unscaled latents, and scaled latents
    # to images. `run(function, static, *arrays)` returns function(*static, weights, *arrays), compiled.
    encoder: Callable
    decoder: Callable


def lay(sides: Sequence[int], size: Sequence[int], margin: int) -> list[Place]:
    """Tiles of `size` that cover `sides`, row by row; at the border they are moved inwards, none is smaller."""
    rows, columns = (
        [_along(start, start, min(start + length, side), length, side, margin) for start in range(0, side, length)]
        for side, length in zip(sides, size, strict=True)
    )
    return [Place(*np.transpose([row, column]).astype(np.int32)) for row in rows for column in columns]


def _along(output, start, stop, length, side, margin):
    output = min(output, side - length)
    return np.clip(output - margin, 0, side - seen(length, side, margin)), output, start, stop


def seen(length: int, side: int, margin: int) -> int:
    """What a tile sees along an axis."""
    return min(length + 2 * margin, side)


def pieces(sides: Sequence[int], size: Sequence[int], margin: int) -> tuple[tuple[int, int], int, list[Place]]:
    """The sample's size and margin and the places of its pieces, spread evenly.

    The margin is a quarter of a piece or less: a sample need not be exact, but must not need more memory than a tile.
    """
    small = tuple(max(length // PIECES, 1) for length in size)
    margin = min(margin, -(-max(small) // 4))
    rows, columns = (
        [_along(start, start, start + length, length, side, margin)
         for start in np.linspace(0, side - length, PIECES).round().astype(int)]
        for side, length in zip(sides, small, strict=True)
    )  # fmt: skip
    return small, margin, [Place(*np.transpose([row, column]).astype(np.int32)) for row in rows for column in columns]


def cut(array: np.ndarray, places: Sequence[Place], size: Sequence[int], margin: int, scale: int = 1) -> np.ndarray:
    """The windows that tiles of `size` see, stacked; the array has `scale` positions per latent."""
    lengths = [seen(length, side // scale, margin) * scale for length, side in zip(size, array.shape[:2], strict=True)]
    corners = [place.window * scale for place in places]
    return np.stack([array[y : y + lengths[0], x : x + lengths[1]] for y, x in corners])


def paste(whole: np.ndarray, place: Place, part: np.ndarray, first: Int[np.ndarray, "2"], scale: int = 1) -> None:
    """Write a tile's own part of the picture, out of an array that begins at position `first` of it."""
    (top, left), (bottom, right) = place.start * scale, place.stop * scale
    y, x = (place.start - first) * scale
    whole[top:bottom, left:right] = part[y : y + bottom - top, x : x + right - left]


def over_windows(function: Callable, arrays: Sequence[np.ndarray], tile: int, reach: int) -> np.ndarray:
    """A local function of (1, h, w, c) arrays, which sees `reach` positions around each, tile by tile."""
    sides = arrays[0].shape[:2]
    size = tuple(min(tile, side) for side in sides)
    whole = np.empty_like(arrays[0])
    for place in lay(sides, size, reach):
        result = np.asarray(function(*(cut(array, [place], size, reach) for array in arrays)))
        paste(whole, place, result[0], place.window)
    return whole


def walk(
    direction: Direction, source: Float[np.ndarray, "h w c"], tile: int
) -> tuple[Float[np.ndarray, "y x d"], float]:
    """What a direction makes of a whole array, by tiles of `tile` latents, and how far the statistics are off."""
    sides = tuple(side // direction.source for side in source.shape[:2])
    size = tuple(min(tile, side) for side in sides)
    small, margin, places = pieces(sides, size, direction.margin)
    sample = small, cut(source, places, small, margin, direction.source), _stacked(places)
    shift, keys = np.zeros(direction.stats, np.float32), None
    whole = np.empty((*(side * direction.result for side in sides), direction.channels), np.float32)
    for index in range(MOST_PASSES):
        placed = None if keys is None else direction.put(keys)
        sampled = Sampled(*map(np.asarray, direction.sample(*sample, shift, placed)))
        if keys is None:
            keys = _of_sample(sampled)
            placed = direction.put(keys)
        moments, found = _over_tiles(direction, source, size, sampled.used, placed, whole)
        stats = _pooled(sampled.used, moments)
        # The keys of the first pass are the sample's: nothing to compare with.
        off = max(float(np.abs(shift_between(sampled.used, stats)).max()), _between(keys, found) if index else np.inf)
        if off < TOLERANCE:
            break
        shift, keys = shift_between(sampled.live, stats), found
    return whole, off


def shift_between(stats: Float[np.ndarray, "n 2 g"], other: Float[np.ndarray, "n 2 g"]) -> Float[np.ndarray, "n 2 g"]:
    """How far `other` is from `stats`: its means in deviations, and the logarithm of the ratio of variances."""
    wide = stats[:, 1] + EPSILON
    return np.stack([(other[:, 0] - stats[:, 0]) / np.sqrt(wide), np.log((other[:, 1] + EPSILON) / wide)], axis=1)


def _over_tiles(direction, source, size, stats, keys, whole) -> tuple[np.ndarray, Keys]:
    """One pass: results into `whole`; the picture's moments and keys."""
    sides = tuple(side // direction.source for side in source.shape[:2])
    moments, found = np.zeros(direction.stats), _empty_keys(keys, sides)
    places = lay(sides, size, direction.margin)
    for first in range(0, len(places), direction.together):
        now = places[first : first + direction.together]
        filled = now + [now[-1]] * (direction.together - len(now))
        windows = cut(source, filled, size, direction.margin, direction.source)
        results, report = direction.tiles(size, windows, _stacked(filled), stats, keys)
        report = Report(*map(np.asarray, report))
        for index, (place, result) in enumerate(zip(now, np.asarray(results), strict=False)):
            paste(whole, place, result, place.output, direction.result)
            moments += report.moments[index] * (math.prod(place.stop - place.start) / math.prod(sides))
            _put_keys(found, sides, place, report.keys[index], report.values[index])
    return moments, found


def _stride(sides):
    """Every how many rows and columns there is a key."""
    return next(n for n in itertools.count(1) if math.prod(-(-side // n) for side in sides) <= MOST_KEYS)


def _empty_keys(like, sides) -> Keys:
    arrays = (np.zeros(array.shape, np.float32) for array in like[:2])
    return Keys(*arrays, np.int32(math.prod(-(-side // _stride(sides)) for side in sides)))


def _put_keys(found, sides, place, *parts):
    """Write the keys and values of a tile's own positions to where they are in the whole picture's, row by row."""
    step = _stride(sides)
    y, x = (np.arange(-(-a // step) * step, b, step) for a, b in zip(place.start, place.stop, strict=True))
    target = (y[:, None] // step * -(-sides[1] // step) + x // step).ravel()
    for array, part in zip(found, parts, strict=False):
        own = part[np.ix_(y - place.output[0], x - place.output[1])]
        array[target] = own.reshape(-1, *array.shape[1:])


def _stacked(places: Sequence[Place]) -> Place:
    return Place(*map(np.stack, zip(*places, strict=True)))


def _of_sample(sampled: Sampled) -> Keys:
    """The sample's keys, in arrays of the size that holds any picture's: a single shape to compile for."""
    step = -(-len(sampled.keys) // MOST_KEYS)
    count = len(sampled.keys[::step])
    arrays = [np.zeros((MOST_KEYS, *array.shape[1:]), np.float32) for array in (sampled.keys, sampled.values)]
    for array, own in zip(arrays, (sampled.keys, sampled.values), strict=True):
        array[:count] = own[::step]
    return Keys(*arrays, np.int32(count))


def _pooled(stats, moments):
    """The statistics of the whole picture from moments around the means of `stats`."""
    mean, square = moments[:, 0], moments[:, 1]
    return np.stack([stats[:, 0] + mean, np.maximum(square - mean**2, 0)], axis=1).astype(np.float32)


def _between(keys: Keys, other: Keys) -> float:
    """Relative difference (root mean square) of two sets of keys of the same picture."""
    count = other.count
    return float(np.linalg.norm(keys.keys[:count] - other.keys[:count]) / np.linalg.norm(other.keys[:count]))
