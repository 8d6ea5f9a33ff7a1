"""Scale maps in place of numbers, in a session of the toy model, whose decoder is local."""

import numpy as np
import pytest
from test_base_model import toy_model
from test_several_adapters import random_adapters

from pisa_jax import Settings, Upscaler
from pisa_jax.imaging.image_data import from_array
from pisa_jax.inference import make_weights


def toy_upscaler(adapters=("lora", "lora"), **options) -> Upscaler:
    model, found = toy_model(), random_adapters(adapters)
    settings = Settings(**({"min_size": 8, "color_fix": "none"} | options))
    return Upscaler(model.base, make_weights(model, found), found.specs, settings)


def random_image(height, width, seed=0):
    return np.random.default_rng(seed).uniform(0.3, 0.7, (height, width, 3)).astype(np.float32)


def decoded(latents, height, width):
    """Decode with the toy model, by hand."""
    _, y, x, _ = latents.shape
    image = latents.reshape(y, x, 2, 2, 3).transpose(0, 2, 1, 3, 4).reshape(2 * y, 2 * x, 3)
    return np.clip((image[:height, :width] + 1) / 2, 0, 1)


def test_a_map_is_the_blend_of_the_latents_by_hand():
    session = toy_upscaler(("lora", "lora", "lora")).open(random_image(6, 8), scale=2)
    rng = np.random.default_rng(1)
    l_pix, l_face = rng.choice([0.0, 0.4, 1.3], (6, 8)), rng.choice([-0.2, 1.0], (6, 8))
    z, first, second, third = (np.asarray(each, np.float64) for each in (session.latents, *session.eps))
    expected = z - l_pix[..., None] * first - 0.7 * (second - first) - l_face[..., None] * (third - second)
    found = session.render(l_pix, 0.7, face=l_face)
    np.testing.assert_allclose(found, decoded(expected, 12, 16), atol=1e-5)
    assert np.ptp(found - session.render(0.4, 0.7, 1.0)) > 0.01


def test_both_sides_of_an_edge_are_the_results_of_the_numbers():
    """Also for an odd size, whose network input is padded, and for maps of other resolutions than the latents."""
    session = toy_upscaler().open(random_image(9, 15), scale=3)
    none, full = (session.render(pix=0.6, sem=sem) for sem in (0.2, 1.4))
    assert np.abs(none - full).max() > 0.01
    for width in (2, 46, 450):
        mask = np.repeat([[0.2, 1.4]], width // 2, axis=1)
        found = session.render(pix=0.6, sem=mask)
        # Fewer values than latents are interpolated between their centers; more blend over two latents at the edge.
        left, right = (12, 34) if width == 2 else (20, 26)
        assert np.array_equal(found[:, :left], none[:, :left])
        assert np.array_equal(found[:, right:], full[:, right:])


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (200, 7)], ids=str)
def test_a_constant_map_equals_its_number_and_nothing_compiles(shape):
    compiled = []
    upscaler = toy_upscaler(color_fix="adain", tile=6, overlap=2)
    upscaler.pipeline.runner.on_compile = lambda what, seconds: compiled.append(what)
    for source in (random_image(9, 15), random_image(4, 3)):
        session = upscaler.open(source, scale=3)
        expected, count = session.render(0.3, -0.7), len(compiled)
        assert np.array_equal(session.render(np.full(shape, 0.3), np.full(shape, -0.7)), expected)
        assert np.array_equal(session.render(0.3, sem=np.full(shape, -0.7, np.float32)), expected)
        assert not np.array_equal(session.render(0.3, sem=np.full(shape, -0.6)), expected)
        assert len(compiled) == count


def test_images_of_a_batch_have_maps_of_their_own():
    upscaler = toy_upscaler()
    sources = [from_array(random_image(6, 8, seed)) for seed in range(2)]
    session = upscaler.open_all(sources, 2, None, adjustable=True)
    ramp = np.linspace(0, 1, 30).reshape(5, 6)
    together = session.render_all(0.5, sem=[ramp, 0.7])
    for index, sem in enumerate((ramp, 0.7)):
        assert np.array_equal(together[index].rgb, session.render_all(0.5, sem=sem)[index].rgb)
    with pytest.raises(ValueError, match="3 scales of 'sem' for 2 images"):
        session.render_all(sem=[ramp, 0.7, 1.0])


def test_a_session_of_one_prediction_takes_maps_of_ones():
    upscaler, source = toy_upscaler(), random_image(6, 8)
    session = upscaler.open(source, scale=2, adjustable=False)
    assert np.array_equal(session.render(sem=np.ones((2, 3))), session.render())
    with pytest.raises(ValueError, match="other than 1 need all predictions"):
        session.render(sem=np.array([[1, 0.5]]))


def test_the_call_of_an_upscaler_takes_maps():
    upscaler, source = toy_upscaler(), random_image(6, 8)
    ramp = np.linspace(0, 1, 12).reshape(3, 4)
    expected = upscaler.open(source, scale=2).render(0.5, ramp)
    assert np.array_equal(upscaler(source, scale=2, scales=(0.5, ramp)), expected)
    assert np.array_equal(upscaler(source, scale=2, scales=(1, np.ones((2, 2)))), upscaler(source, scale=2))
