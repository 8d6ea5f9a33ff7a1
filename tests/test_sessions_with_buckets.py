"""Sessions with buckets give the results that they give without, and compile less."""

import numpy as np
import pytest
from tiny import close, random_image, random_upscaler

from pisa_jax.imaging.image_data import from_array, to_array

SIZES = [(17, 25), (26, 18), (20, 21)]
SCALES = [(1.0, 1.0), (0.4, 1.3)]


def opened(images, seed, **settings):
    """Open images as one batch with buckets, and one by one without."""
    exact = random_upscaler(**settings)
    off = random_upscaler(buckets="off", **settings)
    batch = exact.open_all(list(map(from_array, images)), 4, seed, True)
    return batch, [off.open_all([from_array(image)], 4, seed, True) for image in images]


def check_equal(batch, alone, *scales):
    for results, each in zip(batch.render_all(*scales), alone, strict=True):
        [expected] = each.render_all(*scales)
        found, expected = (to_array(image).astype(int) for image in (results, expected))
        assert found.shape == expected.shape
        assert np.abs(found - expected).max() <= 1  # rounding to 8 bits


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"color_fix": "wavelet"},
        {"color_fix": "none"},
        {"tile": 6, "overlap": 2},
        {"tile": 6, "overlap": 2, "tile_batch": 3},
        {"vae_tile": 64},
    ],
    ids=str,
)
def test_images_of_one_batch_are_those_of_batches_of_their_own(settings):
    batch, alone = opened([random_image(*size, seed) for seed, size in enumerate(SIZES)], None, **settings)
    for scales in SCALES:
        check_equal(batch, alone, *scales)


def test_sampled_latents_do_not_depend_on_the_bucket():
    batch, alone = opened([random_image(*size) for size in SIZES], 5)
    for index, each in enumerate(alone):
        height, width = each.latents.shape[1:3]
        close(batch.latents[index : index + 1, :height, :width], each.latents, 1e-5 * np.abs(each.latents).max())
    check_equal(batch, alone, 1.0, 0.5)


def test_scale_maps():
    batch, alone = opened([random_image(*size) for size in SIZES], None)
    check_equal(batch, alone, 1.0, np.linspace(0, 2, 12).reshape(3, 4))


def test_sizes_of_a_bucket_compile_once():
    compiled = []
    upscaler = random_upscaler(on_compile=lambda what, seconds: compiled.append(what))
    for width in range(17, 19):
        upscaler.open(random_image(18, width), 4).render(1.0, 0.5)
        assert len(compiled) == 3
    with_off = random_upscaler(on_compile=lambda what, seconds: compiled.append(what), buckets="off")
    for width in range(17, 19):
        with_off.open(random_image(18, width), 4).render(1.0, 0.5)
    assert len(compiled) == 3 + 6


def test_unknown_mode():
    with pytest.raises(ValueError, match="buckets is 'on'; use one of 'exact', 'off'"):
        random_upscaler(buckets="on")


@pytest.mark.parametrize(
    "settings", [{}, {"tile": 6, "overlap": 2, "tile_batch": 3}, {"vae_tile": 64}, {"buckets": "off"}], ids=str
)
def test_compiling_in_advance_leaves_nothing_to_compile(settings):
    compiled = []
    upscaler = random_upscaler(lambda what, seconds: compiled.append(what), **settings)
    images = [from_array(random_image(20, 26))] * 2
    upscaler.compile((20, 26), 4, adjustable=True, count=2)
    assert compiled
    expected, compiled[:] = list(compiled), []
    upscaler.open_all(images, 4, None, True).render_all(0.5, 1.2)
    assert not compiled, f"{compiled} were not among {expected}"
