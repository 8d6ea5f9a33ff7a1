"""Samples: small patches from all over an image whose statistics estimate those of the image.

A weighted mean over patches estimates the mean over the image. The weights are those nearest to equal ones for which
the sample reproduces what is known of the whole image: the means and mean squares of the input, and the share of its
border. Statistics of layers that depend on these are then estimated with a smaller error.

References: Deville and Sarndal 1992, "Calibration estimators in survey sampling", equation 2.4 with q = 1, for the
weights; Roberts 2018, "The unreasonable effectiveness of quasirandom sequences", for the choice of the patches.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from pisa_jax.tiling.placements import (
    TilePlacement,
    extract_windows,
    own_area,
    place,
    stack_placements,
    window_length,
)

# Side of a patch in latents. Small ones represent the image better, and their margins cost more.
PATCH = 8
# Steps of the R2 sequence: 1 / g and 1 / g^2 with g^3 = g + 1.
R2_STEP = (0.7548776662466927, 0.5698402909980532)
# Directions of the features that the weights reproduce, at most, and per patch.
MOST_DIRECTIONS, DIRECTIONS_PER_PATCH = 32, 0.25
# Added to the covariance of the features of the sample, relative to its mean, for directions that hardly vary in it.
RIDGE = 0.02
# Added to divisors that can be 0.
TINY = 1e-12


class Sample(NamedTuple):
    """Patches of an image."""

    size: tuple[int, int]  # of a patch in latents
    windows: Float[np.ndarray, "b h w c"]
    placements: TilePlacement
    weights: Float[np.ndarray, " b"]  # of sum 1


def sample_shape(sides: Sequence[int], size: Sequence[int]) -> tuple[tuple[int, int], int, int]:
    """Return the size, the margin and the number of a sample's patches; their windows have the area of a tile.

    The margin is a quarter of a patch: the statistics may be inexact, but must not need more memory than a tile.
    """
    patch = min(PATCH, max(max(size) // 4, 1))
    margin = -(-patch // 4)
    lengths = tuple(min(patch, side) for side in sides)
    window = math.prod(window_length(length, side, margin) for length, side in zip(lengths, sides, strict=True))
    return lengths, margin, max(math.prod(size) // window, 1)


def cell_grid(sides: Sequence[int], patch: Sequence[int], margin: int) -> list[TilePlacement]:
    """Return the cells of a grid over the image, row by row: all patches that a sample may contain."""
    rows, columns = (
        [place(start, start, start + length, length, side, margin)
         for start in np.linspace(0, side - length, max(side // length, 1)).round().astype(int)]
        for side, length in zip(sides, patch, strict=True)
    )  # fmt: skip
    return [TilePlacement(*np.transpose([row, column]).astype(np.int32)) for row in rows for column in columns]


def choose_cells(sides: Sequence[int], patch: Sequence[int], count: int, index: int = 0) -> Int[np.ndarray, " count"]:
    """Return the `count` cells of one sample, by the R2 sequence, whose points are evenly spread over the image.

    Samples of successive indices complement each other.
    """
    points = (0.5 + np.outer(index * count + np.arange(count), R2_STEP)) % 1
    cells = [max(side // length, 1) for side, length in zip(sides, patch, strict=True)]
    row, column = (points * cells).astype(int).T
    return row * cells[1] + column


class Sampler:
    """Samples of one image; the windows of a sample have the area of a tile of `size`."""

    def __init__(self, source: Float[np.ndarray, "h w c"], size: Sequence[int], scale: int):
        self.source, self.scale = source, scale
        self.sides = [side // scale for side in source.shape[:2]]
        self.patch, self.margin, self.count = sample_shape(self.sides, size)
        self.cells = cell_grid(self.sides, self.patch, self.margin)
        self.features = np.stack([self._features(cell) for cell in self.cells])

    def sample(self, index: int) -> Sample:
        """Return sample number `index`."""
        chosen = choose_cells(self.sides, self.patch, self.count, index)
        placements = [self.cells[cell] for cell in chosen]
        windows = extract_windows(self.source, placements, self.patch, self.margin, self.scale)
        return Sample(self.patch, windows, stack_placements(placements), calibrated_weights(self.features, chosen))

    def _features(self, cell: TilePlacement) -> Float[np.ndarray, " n"]:
        """Return means and mean squares of the channels and of their differences, and the number of image borders."""
        patch = own_area(self.source, cell, scale=self.scale)
        moments = [patch.mean((0, 1)), np.square(patch).mean((0, 1))]
        differences = [np.square(np.diff(patch, axis=axis)).sum((0, 1)) / patch[..., 0].size for axis in (0, 1)]
        borders = np.count_nonzero(cell.start == 0) + np.count_nonzero(cell.stop == self.sides)
        return np.concatenate([*moments, sum(differences), [borders]])


def calibrated_weights(features: Float[np.ndarray, "m n"], chosen: Int[np.ndarray, " p"]) -> Float[np.ndarray, " p"]:
    """Return weights of sum 1 for the chosen patches, given the features of all m patches of an image."""
    known = _standardized(features)
    directions = np.linalg.svd(known.T @ known, hermitian=True)[0]  # the principal ones first
    number = max(min(MOST_DIRECTIONS, features.shape[1], int(len(chosen) * DIRECTIONS_PER_PATCH)), 1)
    sample = _standardized(known @ directions[:, :number])[chosen]
    covariance = sample.T @ sample / len(chosen)
    covariance += (RIDGE * np.trace(covariance) / number + TINY) * np.eye(number)
    # In each direction, the mean over the image is 0.
    weights = np.maximum(1 - sample @ np.linalg.solve(covariance, sample.mean(0)), 0)
    return np.float32(weights / weights.sum())


def _standardized(features):
    """Return features with mean 0 and standard deviation 1, or 0 for those that are constant up to rounding."""
    rounding = 1e-6 * np.abs(features).max(0) + TINY
    return (features - features.mean(0)) / (features.std(0) + rounding)
