"""Resampling of scale maps to the latents, and which scales are refused."""

import jax.numpy as jnp
import numpy as np
import pytest

from pisa_jax.imaging import scale_maps


def triangle_weights(cells, size, padded, grid):
    """Weights (grid, cells) of a triangle filter over a map that covers `size` of `padded` pixels, in closed form."""
    latent = padded / grid * cells / size  # cells per latent
    reach, beyond = max(latent, 1.0), 2 * cells
    centers, positions = (np.arange(grid) + 0.5) * latent, np.arange(cells + beyond) + 0.5
    inside = positions < np.ceil(padded * cells / size)
    weights = np.clip(1 - np.abs(positions - centers[:, None]) / reach, 0, None) * inside
    weights[:, cells - 1] += weights[:, cells:].sum(1)  # the last value continues beyond the image
    return weights[:, :cells] / weights[:, :cells].sum(1, keepdims=True)


@pytest.mark.parametrize(
    ("shape", "size", "padded", "grid"),
    [
        ((5, 3), (12, 16), (12, 16), (6, 8)),  # fewer values than latents
        ((48, 64), (12, 16), (12, 16), (6, 8)),  # more
        ((3, 50), (13, 21), (16, 24), (2, 3)),  # padding of less than one latent
        ((7, 9), (13, 21), (48, 40), (6, 5)),  # padding of several latents
    ],
    ids=str,
)
def test_resampling_is_a_triangle_filter_over_the_image(shape, size, padded, grid):
    values = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    rows, columns = (triangle_weights(*each) for each in zip(shape, size, padded, grid, strict=True))
    found = scale_maps.resample(values, size, padded, grid)
    assert (found.dtype, found.shape) == (np.float32, grid)
    np.testing.assert_allclose(found, rows @ values @ columns.T, rtol=0, atol=2e-6)


def test_constant_maps_stay_constant_exactly():
    rng = np.random.default_rng(1)
    for _ in range(200):
        shape, size, beyond, grid = rng.integers(1, 40, (4, 2))
        value = np.float32(rng.normal() * 10.0 ** rng.integers(-3, 4))
        sizes = (tuple(each.tolist()) for each in (size, size + beyond, grid))
        found = scale_maps.resample(np.full(shape, value), *sizes)
        assert (found == value).all(), (shape, size, beyond, grid, value)


def test_a_map_of_the_size_of_the_latents_stays_as_it_is():
    values = np.random.default_rng(2).normal(size=(6, 8)).astype(np.float32)
    assert np.array_equal(scale_maps.resample(values, (48, 64), (48, 64), (6, 8)), values)


def test_numbers_arrays_and_lists_of_them_are_scales():
    ramp = np.linspace(0, 1, 6).reshape(2, 3)
    pix, sem = scale_maps.check_scales_or_maps(
        (jnp.float32(0.5), [1, jnp.asarray(ramp, jnp.bfloat16)]), ["pix", "sem"], 2
    )
    assert (pix, sem[0]) == (0.5, 1.0)
    assert sem[1].dtype == np.float32
    np.testing.assert_allclose(sem[1], ramp, atol=2**-8)
    assert scale_maps.are_one([1.0, [1.0, np.ones((2, 2), np.float32)]])
    assert not scale_maps.are_one([1.0, sem])


@pytest.mark.parametrize(
    ("scales", "message"),
    [
        ((1.0, np.zeros(3)), r"the scale map of 'sem' has the shape \(3,\); expected \(h, w\), not empty"),
        ((1.0, np.zeros((2, 2, 3))), r"the scale map of 'sem' has the shape \(2, 2, 3\); expected \(h, w\)"),
        ((np.zeros((0, 4)), 1.0), r"the scale map of 'pix' has the shape \(0, 4\); expected \(h, w\), not empty"),
        ((1.0, np.array([[1, 2], [3, np.nan]])), "'sem' is nan at row 1, column 1; all values must be finite"),
        ((1.0, np.array([[1, 1e39]])), "'sem' is inf at row 0, column 1; all values must be finite"),
        ((np.array([["a"]]), 1.0), "the scale map of 'pix' is no array of numbers"),
        ((np.ones((2, 2)), float("inf")), "all must be finite"),
        ((np.ones((2, 2)), 1.0, 1.0), "3 scales for 2 adapters; the adapters are pix, sem"),
        ((1.0, [np.ones((2, 2)), 1.0]), "2 scales of 'sem' for 1 images; give one scale, or one for each image"),
        ((1.0, ["a"]), "scales is .'a'.; expected one number"),
    ],
    ids=str,
)
def test_wrong_scales_are_refused(scales, message):
    with pytest.raises(ValueError, match=message):
        scale_maps.check_scales_or_maps(scales, ["pix", "sem"])
