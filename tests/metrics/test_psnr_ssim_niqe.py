"""PSNR, SSIM, NIQE and bicubic against published values of the same files, closed forms and naive computations."""

import json
import math

import numpy as np
import pytest
from conftest import DATA, shared_data
from PIL import Image
from scipy import stats

from pisa_jax.imaging.matlab_resize import matlab_bicubic
from pisa_jax.metrics import niqe, psnr_ssim


def read(path):
    return np.asarray(Image.open(path).convert("RGB"))


def flat(value, height=16, width=20):
    return np.full((height, width, 3), value, np.uint8)


def noise(seed, height=23, width=31):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


# --- published values -------------------------------------------------------------------------------------------------


def test_psnr_and_ssim_agree_with_pyiqa():
    folder = DATA / "pyiqa"
    for name, row in json.loads((folder / "metrics.json").read_text()).items():
        sr, hr = read(folder / "SR" / name), read(folder / "HR" / name)
        assert psnr_ssim.psnr(sr, hr) == pytest.approx(row["PSNR"], abs=1e-3)
        assert psnr_ssim.ssim(sr, hr) == pytest.approx(row["SSIM"], abs=1e-4)


# Recorded from this implementation, which agrees with the published figures of the next test.
NIQE = {"oakland_zoo_otters.png": 8.044, "perched_osprey.png": 9.171, "roman_colosseum.png": 7.165}


@pytest.mark.parametrize("name", NIQE)
def test_niqe_of_photographs(name):
    assert niqe.niqe(read(DATA / "pyiqa" / "SR" / name)) == pytest.approx(NIQE[name], abs=0.05)


@pytest.mark.external
@pytest.mark.parametrize("benchmark", ["realsr", "drealsr"])
def test_psnr_ssim_and_niqe_agree_with_the_published_values_of_every_file(benchmark):
    folder = shared_data(f"eval/published_metrics/{benchmark}")
    published = json.loads((folder / "metrics.json").read_text())
    assert len(published) in (8, 10)
    niqe_errors = []
    for name, row in published.items():
        sr, gt = read(folder / "SR" / name), read(folder / "HR" / name)
        assert psnr_ssim.psnr(sr, gt) == pytest.approx(row["PSNR"], abs=1e-3)
        assert psnr_ssim.ssim(sr, gt) == pytest.approx(row["SSIM"], abs=1e-4)
        niqe_errors.append(niqe.niqe(sr) - row["NIQE"])
    # In flat regions NIQE depends on the signs of rounding errors, so independent implementations differ this much.
    assert np.abs(niqe_errors).max() < 0.05
    assert abs(np.mean(niqe_errors)) < 0.01


SETS = {"Set5/x4": 28.43, "Set5/x2": 33.68, "Set14/x4": 25.81, "BSD100_sub10/x4": 23.68}


@pytest.mark.external
@pytest.mark.parametrize("name", SETS)
def test_bicubic_psnr_and_low_resolution_files_of_the_classic_sets(name):
    folder, scale = shared_data(f"eval/{name}"), int(name[-1])
    values = []
    for path in sorted((folder / "HR").iterdir()):
        gt, lq = read(path), read(folder / "LR" / path.name)
        np.testing.assert_array_equal(matlab_bicubic(gt, 1 / scale, border="replicate"), lq)
        inner = np.s_[2:-2, 2:-2]
        np.testing.assert_array_equal(matlab_bicubic(gt, 1 / scale)[inner], lq[inner])
        values.append(psnr_ssim.psnr(matlab_bicubic(lq, scale), gt, crop_border=scale))
    assert np.mean(values) == pytest.approx(SETS[name], abs=0.01)


# --- luma, PSNR -------------------------------------------------------------------------------------------------------


def test_luma_of_black_white_and_the_primaries():
    corners = np.array([[[0, 0, 0], [255, 255, 255], [255, 0, 0], [0, 255, 0], [0, 0, 255]]], np.uint8)
    np.testing.assert_allclose(psnr_ssim.rgb_to_y(corners)[0], [16, 235, 81.481, 144.553, 40.966])


@pytest.mark.parametrize(("color", "error"), [("rgb", 8.0), ("y", 8 * 219 / 255)])
def test_psnr_of_a_constant_difference(color, error):
    assert psnr_ssim.psnr(flat(100), flat(108), color) == pytest.approx(20 * math.log10(255 / error))


def test_psnr_of_equal_images_is_infinite():
    assert psnr_ssim.psnr(noise(0), noise(0)) == math.inf


def test_the_border_is_cropped_before_measuring():
    sr, gt = flat(100), flat(100)
    sr[:2], sr[-2:], sr[:, :2], sr[:, -2:] = 0, 0, 0, 0
    assert psnr_ssim.psnr(sr, gt, crop_border=2) == math.inf
    assert psnr_ssim.psnr(sr, gt, crop_border=1) < 20
    assert psnr_ssim.ssim(sr, gt, crop_border=2) == pytest.approx(1)
    assert psnr_ssim.ssim(sr, gt, crop_border=1) < 0.99


# --- SSIM -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("color", ["y", "rgb"])
def test_ssim_of_flat_images_is_the_luminance_term(color):
    a, b = (round(16 + v * 219 / 255) if color == "y" else v for v in (40, 200))
    c1 = (0.01 * 255) ** 2
    expected = (2 * a * b + c1) / (a * a + b * b + c1)
    assert psnr_ssim.ssim(flat(40), flat(200), color) == pytest.approx(expected)


def test_ssim_equals_a_window_by_window_computation():
    a, b = noise(1), noise(2)
    offset = np.arange(11) - 5
    window = np.exp(-(offset[:, None] ** 2 + offset**2) / (2 * 1.5**2))
    window /= window.sum()
    c1, c2 = 6.5025, 58.5225
    values = []
    x, y = np.round(psnr_ssim.rgb_to_y(a)), np.round(psnr_ssim.rgb_to_y(b))
    for i in range(x.shape[0] - 10):
        for j in range(x.shape[1] - 10):
            p, q = x[i : i + 11, j : j + 11], y[i : i + 11, j : j + 11]
            mp, mq = (window * p).sum(), (window * q).sum()
            vp, vq = (window * (p - mp) ** 2).sum(), (window * (q - mq) ** 2).sum()
            covariance = (window * (p - mp) * (q - mq)).sum()
            structure = max((2 * covariance + c2) / (vp + vq + c2), 0)
            values.append(structure * (2 * mp * mq + c1) / (mp**2 + mq**2 + c1))
    assert psnr_ssim.ssim(a, b) == pytest.approx(np.mean(values), abs=1e-12)
    assert psnr_ssim.ssim(a, a) == pytest.approx(1)


def test_rgb_ssim_is_the_mean_over_channels():
    a = noise(3)
    b = a.copy()
    b[..., 1] = noise(4)[..., 1]
    gray_a, gray_b = (np.repeat(x[..., 1:2], 3, axis=2) for x in (a, b))
    assert psnr_ssim.ssim(a, b, "rgb") == pytest.approx((2 + psnr_ssim.ssim(gray_a, gray_b, "rgb")) / 3)


# --- bicubic ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [4, 2, 1.5, 0.5, 0.25, 0.3])
@pytest.mark.parametrize("border", ["mirror", "replicate"])
def test_bicubic_keeps_flat_images_and_rounds_sizes_up(scale, border):
    out = matlab_bicubic(flat(77, 21, 30), scale, border)
    assert out.shape == (math.ceil(21 * scale), math.ceil(30 * scale), 3)
    assert (out == 77).all()


def test_bicubic_keeps_a_ramp_and_aligns_pixel_centers():
    ramp = np.tile(np.arange(40.0), (8, 1))
    up, down = matlab_bicubic(ramp, 2)[8], matlab_bicubic(ramp, 0.5)[2]
    np.testing.assert_allclose(up[6:-6], (np.arange(80) / 2 - 0.25)[6:-6], atol=1e-12)
    np.testing.assert_allclose(down[4:-4], (np.arange(20) * 2 + 0.5)[4:-4], atol=1e-12)


def test_bicubic_by_one_is_the_identity_and_commutes_with_transposition():
    image = noise(5)
    np.testing.assert_array_equal(matlab_bicubic(image, 1), image)
    smooth = image.astype(float)
    turned = matlab_bicubic(smooth.transpose(1, 0, 2), 0.4).transpose(1, 0, 2)
    np.testing.assert_allclose(matlab_bicubic(smooth, 0.4), turned, atol=1e-9)


def test_mirror_borders_equal_explicit_mirror_padding():
    image = noise(6, 8, 8).astype(float)
    around = np.pad(image, ((8, 8), (8, 8), (0, 0)), mode="symmetric")
    whole = matlab_bicubic(around, 2)[16:-16, 16:-16]
    np.testing.assert_allclose(matlab_bicubic(image, 2), whole, atol=1e-9)


# --- NIQE -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("beta", "name"), [(2.0, "Gaussian"), (1.0, "Laplace"), (0.7, "peaked")])
def test_aggd_fit_recovers_shape_and_scales_of_a_sample(beta, name):
    magnitude = np.abs(stats.gennorm.rvs(beta, size=(2, 200_000), random_state=1))
    # For a density that is continuous at 0, the probability of each side is proportional to its scale.
    left = np.random.default_rng(2).random(magnitude.shape) < 3 / 8
    shape, scale_left, scale_right = niqe._aggd(np.where(left, -3 * magnitude, 5 * magnitude))
    np.testing.assert_allclose(shape, beta, rtol=0.03)
    np.testing.assert_allclose(scale_left, 3, rtol=0.05)
    np.testing.assert_allclose(scale_right, 5, rtol=0.05)


def natural_texture():
    """An image with the 1/f amplitude spectrum of photographs."""
    rng = np.random.default_rng(0)
    frequency = np.hypot(np.fft.fftfreq(288)[:, None], np.fft.rfftfreq(288))
    frequency[0, 0] = 1
    spectrum = np.fft.rfft2(rng.standard_normal((288, 288))) / frequency
    gray = np.fft.irfft2(spectrum, s=(288, 288))
    gray = np.clip(128 + 40 * gray / gray.std(), 0, 255).astype(np.uint8)
    return np.repeat(gray[..., None], 3, axis=2)


def test_niqe_of_natural_texture_is_lower_than_of_noise_and_blocks():
    natural = natural_texture()
    blocky = np.repeat(np.repeat(natural[::8, ::8], 8, axis=0), 8, axis=1)
    assert niqe.niqe(natural) < niqe.niqe(noise(7, 288, 288))
    assert niqe.niqe(natural) < niqe.niqe(blocky)


def test_niqe_ignores_pixels_outside_whole_blocks():
    natural = natural_texture()
    inner = natural[:200, :290]
    assert niqe.niqe(inner) == pytest.approx(niqe.niqe(inner[:192, :288]), abs=1e-9)


# --- errors -----------------------------------------------------------------------------------------------------------


def test_errors_contain_the_invalid_values():
    with pytest.raises(ValueError, match=r"differ in size: \(16, 20\) and \(16, 21\)"):
        psnr_ssim.psnr(flat(0), flat(0, 16, 21))
    with pytest.raises(ValueError, match="unknown color 'luma'"):
        psnr_ssim._crop_and_convert(flat(0), flat(0), "luma", 0)
    with pytest.raises(ValueError, match="crop_border 8 leaves nothing of a 16x20"):
        psnr_ssim.ssim(flat(0), flat(0), crop_border=8)
    with pytest.raises(ValueError, match="11x11 pixels or more after cropping, got 10x14"):
        psnr_ssim.ssim(flat(0), flat(0), crop_border=3)
    with pytest.raises(ValueError, match="scale must be above 0"):
        matlab_bicubic(flat(0), 0)
    with pytest.raises(ValueError, match="two blocks of 96x96 pixels, got 100x100"):
        niqe.niqe(noise(0, 100, 100))
    with pytest.raises(ValueError, match="texture"):
        niqe.niqe(flat(9, 192, 192))
