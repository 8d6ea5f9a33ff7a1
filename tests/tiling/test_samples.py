"""Samples of an image, and the weights of their patches."""

import numpy as np
import pytest
from tiny import close

from pisa_jax.tiling import samples
from pisa_jax.tiling.placements import own_area


@pytest.mark.parametrize("sides", [(256, 256), (100, 300), (40, 200)])
def test_samples_cover_the_image_evenly(sides):
    """The borders, too: zero padding makes their statistics differ."""
    patch, margin, count = samples.sample_shape(sides, (64, 64))
    assert 0.7 * 64**2 < count * (patch[0] + 2 * margin) * (patch[1] + 2 * margin) <= 64**2
    cells, covered = samples.cell_grid(sides, patch, margin), np.zeros(sides)
    for index in range(40):
        for cell in samples.choose_cells(sides, patch, count, index):
            own_area(covered, cells[cell])[:] += 1
    borders = np.concatenate([covered[0], covered[-1], covered[:, 0], covered[:, -1]])
    assert 0.75 < borders.mean() / covered.mean() < 1.25


def test_a_sample_has_the_windows_and_weights_of_its_patches():
    source = np.random.default_rng(0).normal(size=(80, 120, 3)).astype(np.float32)
    sampler = samples.Sampler(source, (20, 20), scale=2)
    sample = sampler.sample(0)
    assert sample.size == (5, 5)
    assert sample.windows.shape == (sampler.count, 18, 18, 3)
    assert np.array_equal(
        sample.windows[0],
        source[2 * sample.placements.window[0, 0] :, :][:18, 2 * sample.placements.window[0, 1] :][:, :18],
    )
    close(sample.weights.sum(), 1, 1e-6)


def test_weights_reproduce_what_is_known_of_the_image():
    rng = np.random.default_rng(0)
    features = rng.normal(size=(400, 6)) + np.linspace(0, 2, 400)[:, None]
    chosen = rng.choice(200, 60, replace=False)  # the first half of the image only
    weights = samples.calibrated_weights(features, chosen)
    assert (weights >= 0).all()
    equal, calibrated = (np.abs(w @ features[chosen] - features.mean(0)).mean() for w in (np.full(60, 1 / 60), weights))
    assert calibrated < 0.3 * equal


def test_weights_of_a_uniform_image_are_equal():
    close(samples.calibrated_weights(np.ones((50, 7)), np.arange(9)), np.full(9, 1 / 9), 1e-6)


def test_calibrated_samples_estimate_unknown_statistics_better():
    """The mean of a nonlinear function of the input, which depends on brightness and detail, over 20 images."""
    rng, errors = np.random.default_rng(0), []
    for _ in range(20):
        y, x = np.mgrid[:64, :64] / 64
        detail = np.abs(np.sin(rng.uniform(1, 4) * x + rng.uniform(0, 3))) * y
        source = (rng.normal(size=(64, 64)) * detail + rng.normal() * x + rng.normal() * y)[..., None]
        unknown = np.log1p(np.square(source) + np.abs(source))
        sampler = samples.Sampler(source.astype(np.float32), (32, 32), scale=1)
        sample = sampler.sample(0)
        starts = zip(sample.placements.start, sample.placements.stop, strict=True)
        means = np.array([unknown[a[0] : b[0], a[1] : b[1]].mean() for a, b in starts])
        errors.append([abs(means.mean() - unknown.mean()), abs(sample.weights @ means - unknown.mean())])
    equal, calibrated = np.mean(errors, axis=0)
    assert calibrated < 0.6 * equal
