"""Grids of windows, and blending, against recordings of the original and closed forms."""

import numpy as np
import pytest
from conftest import golden
from tiny import read_json

from pisa_jax.tiling.windows import blend_windows, gaussian_weights, window_grid


def test_grids_equal_those_of_the_original():
    for case in read_json(golden("comp/latent_tile_grids.json")):
        found = window_grid(case["h"], case["w"], case["tile"], case["overlap"])
        assert sorted(map(list, found)) == sorted(case["order_y0x0hw"])  # these are ordered row by row


def test_weights_equal_those_of_the_original():
    weights = np.load(golden("comp/gaussian_weights.npz"))
    for name in weights.files:
        side = int(name[1:])
        np.testing.assert_allclose(np.outer(gaussian_weights(side), gaussian_weights(side)), weights[name], rtol=1e-12)


@pytest.mark.parametrize(("height", "width"), [(5, 40), (40, 5), (16, 16), (17, 16), (3, 3), (33, 50)])
def test_windows_cover_everything_and_stay_inside(height, width):
    # With a side shorter than the tile or the overlap, the original crashes or does not terminate.
    covered = np.zeros((height, width), int)
    for y, x, h, w in window_grid(height, width, tile=16, overlap=6):
        assert (h, w) == (min(16, height), min(16, width))
        assert y + h <= height
        assert x + w <= width
        covered[y : y + h, x : x + w] += 1
    assert covered.min() >= 1


@pytest.mark.parametrize("overlap", [16, 20, -1])
def test_an_overlap_of_at_least_the_tile_is_refused(overlap):
    with pytest.raises(ValueError, match=f"not {overlap} with tile 16"):
        window_grid(64, 64, 16, overlap)


def test_blending_a_pointwise_function_equals_the_function():
    array = np.random.default_rng(0).normal(size=(2, 37, 21, 3)).astype(np.float32)
    shapes = set()

    def function(tiles):
        shapes.add(tiles.shape)
        return tiles[..., :2] * 3

    out = blend_windows(function, array, tile=16, overlap=6, batch_size=4)
    np.testing.assert_allclose(out, array[..., :2] * 3, atol=1e-5)
    assert shapes == {(4, 16, 16, 3)}  # one shape, and so one compilation, for any number of windows


def test_windows_are_weighted_by_their_gaussians():
    array = np.zeros((1, 1, 6, 1), np.float32)
    starts = iter([1.0, 5.0])
    out = blend_windows(lambda tiles: np.full_like(tiles, next(starts)), array, tile=4, overlap=2, batch_size=1)
    w = gaussian_weights(4)
    expected = [1, 1, (w[2] + 5 * w[0]) / (w[2] + w[0]), (w[3] + 5 * w[1]) / (w[3] + w[1]), 5, 5]
    np.testing.assert_allclose(out[0, 0, :, 0], expected, rtol=1e-6)
