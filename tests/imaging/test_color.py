"""Color correction against outputs of the original program and against closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import golden

from pisa_jax.imaging import color


@pytest.fixture(scope="module")
def recorded():
    return np.load(golden("comp/colorfix.npz"))


def nhwc(array):
    return jnp.asarray(array.transpose(0, 2, 3, 1))


@pytest.mark.parametrize("i", [0, 1])
def test_functions_equal_recorded_outputs_of_the_original(recorded, i):
    content, style = nhwc(recorded[f"content{i}"]), nhwc(recorded[f"style{i}"])
    high, low = color.wavelet_decompose(content)
    got = {
        "adain": color.adain(content, style),
        "wavelet": color.wavelet(content, style),
        "high": high,
        "low": low,
        **{f"blur{i}_r{r}": color.wavelet_blur(content, r) for r in (1, 2, 16)},
    }
    for name, value in got.items():
        key = name if name.startswith("blur") else f"{name}{i}"
        np.testing.assert_allclose(value, nhwc(recorded[key]), rtol=0, atol=1e-5, err_msg=key)


@pytest.mark.parametrize("i", [0, 1])
@pytest.mark.parametrize("name", ["adain", "wavelet"])
def test_8_bit_results_differ_from_the_original_only_by_its_truncation(recorded, name, i):
    content, style = (jnp.asarray(recorded[f"{kind}8_{i}"], jnp.float32)[None] / 255 for kind in ("content", "style"))
    result = np.clip(color.COLOR_FIXES[name](content, style)[0], 0, 1) * 255
    difference = result - recorded[f"{name}8_{i}"]
    assert difference.min() > -0.01
    assert difference.max() < 1.01
    assert np.abs(np.rint(result) - recorded[f"{name}8_{i}"]).max() <= 1


def test_adain_transfers_mean_and_standard_deviation_per_image():
    rng = np.random.default_rng(0)
    content = jnp.asarray(rng.random((2, 9, 14, 3)) * [0.5, 1, 0.2], jnp.float32)
    style = jnp.asarray(0.3 + 0.4 * rng.random((2, 5, 4, 3)) * np.array([1, 3])[:, None, None, None], jnp.float32)
    result = np.asarray(color.adain(content, style))
    np.testing.assert_allclose(result.mean((1, 2)), style.mean((1, 2)), atol=1e-6)
    np.testing.assert_allclose(
        result.std((1, 2), ddof=1), style.std((1, 2), ddof=1), rtol=2e-3
    )  # epsilon of 1e-5 in the variance
    np.testing.assert_allclose(result[1:], color.adain(content[1:], style[1:]), atol=1e-6)


def test_wavelet_combines_low_frequencies_of_style_and_high_frequencies_of_content():
    content = jnp.asarray(np.random.default_rng(1).random((1, 40, 30, 3)), jnp.float32)
    high, low = color.wavelet_decompose(content)
    np.testing.assert_allclose(high + low, content, atol=1e-6)
    np.testing.assert_allclose(color.wavelet(content, jnp.full_like(content, 0.25)), high + 0.25, atol=1e-6)
    np.testing.assert_allclose(color.wavelet(content, content + 0.1), content + 0.1, atol=1e-6)


def test_blur_of_an_impulse_is_the_dilated_binomial_kernel():
    point = jnp.zeros((1, 7, 9, 1)).at[0, 3, 4, 0].set(16)
    expected = np.zeros((7, 9))
    expected[1:6:2, 2:7:2] = [[1, 2, 1], [2, 4, 2], [1, 2, 1]]
    np.testing.assert_array_equal(color.wavelet_blur(point, 2)[0, ..., 0], expected)


@pytest.mark.parametrize("name", color.COLOR_FIXES)
@pytest.mark.parametrize("shape", [(1, 1, 1, 3), (2, 1, 37, 3), (1, 5, 3, 3)])
def test_tiny_and_constant_images_give_finite_results_under_jit(name, shape):
    content = jnp.full(shape, 0.5)
    result = jax.jit(color.COLOR_FIXES[name])(content, jnp.full(shape, 0.75))
    np.testing.assert_allclose(result, 0.5 if name == "none" else 0.75, atol=1e-6)
