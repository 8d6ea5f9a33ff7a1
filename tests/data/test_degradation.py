"""The degradation against recordings of the original program: kernels, operations, traces, statistics."""

import dataclasses
import json

import cv2
import numpy as np
import pytest
import scipy.ndimage
import scipy.stats
from conftest import golden

from pisa_jax.data import degradation
from pisa_jax.data.blur_kernels import filter2d, gaussian_kernel, plateau_kernel, sinc_kernel
from pisa_jax.data.degradation import (
    PISA_SR,
    RESIZE_MODES,
    DegradationParams,
    degrade,
    degrade_and_downscale,
    gaussian_noise,
    jpeg,
    poisson_noise,
    random_kernel,
    resize,
)


def arrays(name):
    return dict(np.load(golden(f"degr/{name}.npz")))


def records(name):
    return json.loads(golden(f"degr/{name}.json").read_text())


def hwc(array):
    """Convert a recorded array (1, 3, h, w) of bytes or floats to an image."""
    image = np.ascontiguousarray(array[0].transpose(1, 2, 0))
    return image / np.float32(255) if image.dtype == np.uint8 else image


def photograph():
    bgr = cv2.imread(str(golden("degr/stats_gt.png")))
    return np.ascontiguousarray(bgr[..., ::-1]) / np.float32(255)


# Kernels


def recorded_kernel(entry):
    """The kernel that this package computes for a recorded entry."""
    kind, size = entry["kind"], entry["size"]
    if kind == "sinc":
        return sinc_kernel(size, entry["omega"])
    if kind == "random_mixed":
        # The order of the draws of the original program.
        rng, kind = np.random.RandomState(entry["numpy_seed"]), entry["type"]
        sigma_x = sigma_y = rng.uniform(*entry["sigma"])
        theta, beta = 0.0, 1.0
        if "aniso" in kind:
            sigma_y, theta = rng.uniform(*entry["sigma"]), rng.uniform(-np.pi, np.pi)
        if "_" in kind:
            low, high = entry["betag" if kind.startswith("generalized") else "betap"]
            beta = rng.uniform(low, 1) if rng.uniform() < 0.5 else rng.uniform(1, high)
    else:
        sigma_x, sigma_y, theta, beta = entry["sig_x"], entry["sig_y"], float(entry["theta"]), entry.get("beta", 1.0)
        if entry["isotropic"]:
            sigma_y, theta = sigma_x, 0.0
    return (plateau_kernel if kind.startswith("plateau") else gaussian_kernel)(size, sigma_x, sigma_y, theta, beta)


def test_kernels_match_the_recorded_ones():
    kernels, entries = arrays("kernels"), records("kernels")
    assert len(entries) == len(kernels) > 60
    for entry in entries:
        expected = kernels[entry["name"]]
        got = recorded_kernel(entry)
        got = np.pad(got, (len(expected) - len(got)) // 2)
        np.testing.assert_allclose(got, expected, atol=1e-12, err_msg=entry["name"])


def second_moment(kernel):
    axis = np.arange(len(kernel)) - len(kernel) // 2
    return (kernel * (axis**2 + axis[:, None] ** 2)).sum()


def assert_same_distribution(ours, theirs, name):
    error = np.hypot(ours.std() / len(ours) ** 0.5, theirs.std() / len(theirs) ** 0.5)
    assert abs(ours.mean() - theirs.mean()) < 4 * error, f"{name}: mean {ours.mean()}, recorded {theirs.mean()}"
    # The largest difference between the two distribution functions: tests all quantiles at once.
    assert scipy.stats.ks_2samp(ours, theirs).pvalue > 1e-4, name


def test_random_kernels_are_distributed_as_recorded():
    columns = dict(zip(records("kernel_stats")["columns"], arrays("kernel_stats")["rows"].T, strict=True))
    rng = np.random.default_rng(0)
    for number, step in enumerate((PISA_SR.first, PISA_SR.second), 1):
        kernels = [random_kernel(rng, step.blur_sigma) for _ in range(1500)]
        assert_same_distribution(np.array([k.max() for k in kernels]), columns[f"k{number}_max"], "max")
        moments = np.array([second_moment(k) for k in kernels])
        assert_same_distribution(moments, columns[f"k{number}_second_moment"], "second moment")
        if number == 1:
            negative = np.array([float(k.min() < 0) for k in kernels])
            assert_same_distribution(negative, columns["k1_has_negative"], "sinc share")


def test_last_sinc_filter_is_distributed_as_recorded(monkeypatch):
    columns = dict(zip(records("kernel_stats")["columns"], arrays("kernel_stats")["rows"].T, strict=True))
    drawn = []
    monkeypatch.setattr(degradation, "sinc_kernel", lambda *a: drawn.append(sinc_kernel(*a)) or drawn[-1])
    params, rng, gt = dataclasses.replace(PISA_SR, sinc_prob=0.0), np.random.default_rng(1), np.zeros((8, 8, 3), "f4")
    for _ in range(1500):
        degrade(gt, rng, params)
    absent = 1500 - len(drawn)
    centers = np.array([k.max() for k in drawn] + [1.0] * absent)
    assert_same_distribution(centers, columns["sinc_center"], "sinc center")


# Operations


@pytest.mark.parametrize("name", ["gauss2_aniso", "sinc2", "mixed_plateau_aniso_1"])
def test_filter2d_matches_the_recorded_ones(name):
    ops = arrays("ops")
    got = filter2d(hwc(ops["img"]), arrays("kernels")[name])
    np.testing.assert_allclose(got, hwc(ops[f"filter2d_{name}"]), atol=1e-5)


@pytest.mark.parametrize("shape", [(48, 64), (37, 53), (8, 3), (1, 2)])
def test_filter2d_is_a_correlation_within_its_tolerance(shape):
    rng = np.random.default_rng(2)
    image = rng.random((*shape, 3), np.float32)
    kernels = [random_kernel(rng, PISA_SR.first.blur_sigma) for _ in range(60)]
    # Neither symmetric nor with small taps: no simplification is allowed.
    kernels += [rng.random((21, 21)) / 220, np.outer(rng.random(9), rng.random(9)) / 20, np.eye(19)[::-1] / 19]
    for kernel in kernels:
        expected = scipy.ndimage.correlate(image.astype(np.float64), kernel[..., None], mode="mirror")
        np.testing.assert_allclose(filter2d(image, kernel), expected, atol=1e-4)


def recorded_resizes():
    factors = [f"{mode}_sf{f}" for mode in RESIZE_MODES for f in ("0p37", "0p5", "0p83", "1", "1p29", "1p5")]
    return factors + [
        f"{mode}_size{s}" for mode in RESIZE_MODES for s in ("12x16", "13x15", "48x64", "96x128", "61x50")
    ]


@pytest.mark.parametrize("name", recorded_resizes())
def test_resize_matches_the_recorded_ones(name):
    ops = arrays("ops")
    mode, how = name.split("_")
    size = float(how[2:].replace("p", ".")) if how.startswith("sf") else tuple(map(int, how[4:].split("x")))
    np.testing.assert_allclose(resize(hwc(ops["img"]), size, mode), hwc(ops[f"resize_{name}"]), atol=1e-5)


def test_an_unknown_resize_mode_raises_an_error():
    with pytest.raises(ValueError, match=r"lanczos.*area, bilinear, bicubic"):
        resize(np.zeros((8, 8, 3), np.float32), 2.0, "lanczos")


@pytest.mark.parametrize("quality", [30, 60, 95])
@pytest.mark.parametrize(
    ("name", "source", "fraction"), [("", "img", 0.0), ("odd_", "img_odd", 0.0), ("tensor", "img", 0.37)]
)
def test_jpeg_matches_the_recorded_ones(name, source, fraction, quality):
    ops = arrays("ops")
    got = jpeg(hwc(ops[source]), quality + fraction)
    np.testing.assert_allclose(got, hwc(ops[f"jpeg_{name}q{quality}"]), atol=2e-6)


def test_jpeg_of_quality_100_keeps_a_gray_image():
    image = np.random.default_rng(3).random((16, 48, 1), np.float32).repeat(3, 2)
    np.testing.assert_allclose(jpeg(image, 100.0), image, atol=1e-4)


@pytest.mark.parametrize("gray", [False, True])
def test_noise_has_the_recorded_moments(gray):
    moments, image, rng = records("noise_moments"), hwc(arrays("ops")["img"]), np.random.default_rng(4)
    # Pixels whose noise is never clipped.
    inside = (image.min(2) > 0.3) & (image.max(2) < 0.7)
    for name, add in (("gaussian", gaussian_noise), ("poisson", poisson_noise)):
        expected = moments[f"{name}_gray{int(gray)}"]
        strength = expected["strength"]
        noise = np.array([add(image, strength, gray, rng)[inside] - image[inside] for _ in range(300)])
        count = noise[..., 0].size if gray else noise.size
        assert abs(noise.mean()) < 4 * noise.std() / count**0.5
        correlation = np.corrcoef(noise[..., 0].ravel(), noise[..., 1].ravel())[0, 1]
        assert correlation == pytest.approx(expected["channel_corr_01"], abs=0.01)
        if name == "gaussian":
            assert noise.std() == pytest.approx(expected["std"], rel=0.01)
        else:
            # The variance is strength^2 x / 256 with x the channel or the luma; recorded as variance / intensity.
            brightness = image @ np.float32([[0.2989] * 3, [0.587] * 3, [0.114] * 3]) if gray else image
            ratio = (noise.var(0) / brightness[inside]).mean()
            assert ratio == pytest.approx(moments["poisson_gray0"]["var_over_intensity"], rel=0.01)


def test_poisson_noise_is_poisson():
    levels = np.arange(256, dtype=np.float32).repeat(3).reshape(16, 16, 3) / 255
    draws = np.array([poisson_noise(levels, 1.0, False, rng) for rng in map(np.random.default_rng, range(1500))])
    for level in (0, 1, 3, 10, 40, 120):
        counts = np.rint(draws.reshape(1500, 256, 3)[:, level].ravel() * 256).astype(int)
        expected = scipy.stats.poisson(level * 256 / 255)
        for quantile in (0.05, 0.25, 0.5, 0.75, 0.95):
            at = expected.ppf(quantile)
            assert (counts <= at).mean() == pytest.approx(expected.cdf(at), abs=0.03)


@pytest.mark.parametrize("trace", range(5))
def test_every_step_of_a_trace(trace):
    recorded = arrays("traces")
    image, checked = hwc(recorded[f"t{trace}_gt"]), 0
    for step in records("traces")[trace]["steps"]:
        expected = hwc(recorded[step["out"]])
        if step["op"] == "filter2d":
            np.testing.assert_allclose(filter2d(image, recorded[step["kernel"]]), expected, atol=1e-4)
        elif step["op"] == "resize":
            size = tuple(step["size"]) if step["size"] else float(step["scale_factor"])
            np.testing.assert_allclose(resize(image, size, step["mode"]), expected, atol=1e-5)
        elif step["op"] == "clamp01_then_jpeg":
            np.testing.assert_allclose(jpeg(np.clip(image, 0, 1), step["quality"][0]), expected, atol=2e-6)
        else:
            assert step["op"] in ("gaussian_noise", "poisson_noise")
            checked -= 1
        image, checked = expected, checked + 1
    assert checked == len(records("traces")[trace]["steps"]) - 2


# The whole pipeline


def statistics(lq, gt):
    gray = lq.mean(2)
    laplacian = gray[:-2, 1:-1] + gray[2:, 1:-1] + gray[1:-1, :-2] + gray[1:-1, 2:] - 4 * gray[1:-1, 1:-1]
    psnr = -10 * np.log10(np.square(lq - gt).mean())
    return psnr, lq.mean(), lq.std(), np.square(laplacian).mean(), (lq - gray[..., None]).std()


def sample_statistics(count, params=PISA_SR):
    """Statistics as recorded: half of the images are mirrored before the degradation."""
    images = [photograph(), np.ascontiguousarray(photograph()[:, ::-1])]
    return np.array(
        [statistics(degrade(images[i % 2], np.random.default_rng(i), params), images[i % 2]) for i in range(count)]
    )


@pytest.mark.parametrize("count", [600, pytest.param(6000, marks=pytest.mark.slow)])
def test_degraded_images_are_distributed_as_recorded(count):
    ours, theirs = sample_statistics(count), arrays("stats")["rows"]
    for i, name in enumerate(records("stats")["columns"]):
        assert_same_distribution(ours[:, i], theirs[:, i], name)


def test_the_statistics_detect_other_ranges():
    second = dataclasses.replace(PISA_SR.second, noise_sigma=(1.0, 25.0), poisson_scale=(0.05, 2.5))
    ours, theirs = sample_statistics(300, dataclasses.replace(PISA_SR, second=second)), arrays("stats")["rows"]
    assert min(scipy.stats.ks_2samp(a, b).pvalue for a, b in zip(ours.T, theirs.T, strict=True)) < 1e-4


@pytest.mark.parametrize("shape", [(8, 8), (9, 31), (61, 8), (37, 53), (128, 96)])
def test_results_have_the_same_size_and_8_bit_values(shape):
    rng = np.random.default_rng(5)
    gt = rng.random((*shape, 3), np.float32)
    before = gt.copy()
    for _ in range(40):
        lq = degrade(gt, rng)
        assert lq.shape == gt.shape
        assert lq.dtype == np.float32
        assert lq.min() >= 0
        assert lq.max() <= 1
        np.testing.assert_array_equal(lq, np.rint(lq * 255) / np.float32(255))
    np.testing.assert_array_equal(gt, before)


def test_degrade_upscales_the_image_of_degrade_and_downscale():
    # Far from black and white, where the rounding would also clip.
    gt = 0.35 + 0.3 * np.random.default_rng(8).random((62, 97, 3), np.float32)
    for seed in range(12):
        small, full = (function(gt, np.random.default_rng(seed)) for function in (degrade_and_downscale, degrade))
        assert (small.shape, small.dtype) == ((15, 24, 3), np.uint8)
        upscaled = [resize(small / np.float32(255), (62, 97), mode) for mode in RESIZE_MODES]
        assert min(np.abs(image - full).max() for image in upscaled) < 1.6 / 255


def test_results_depend_on_the_seed_and_not_on_the_number_of_threads():
    gt = np.random.default_rng(6).random((192, 260, 3), np.float32)
    threads = cv2.getNumThreads()
    try:
        runs = []
        for count in (1, 4):
            cv2.setNumThreads(count)
            runs.append([degrade(gt, np.random.default_rng(seed)) for seed in range(12)])
    finally:
        cv2.setNumThreads(threads)
    np.testing.assert_array_equal(*runs)
    assert (runs[0][0] != runs[0][1]).any()


def test_other_bit_generators_work():
    gt = photograph()
    means = [degrade(gt, np.random.Generator(bits(7))).mean() for bits in (np.random.Philox, np.random.MT19937)]
    assert np.abs(np.array(means) - gt.mean()).max() < 0.02


@pytest.mark.parametrize(
    "bad", [np.zeros((16, 16, 3), np.uint8), np.zeros((16, 16), np.float32), np.zeros((16, 7, 3), np.float32)]
)
def test_invalid_images_raise_an_error(bad):
    with pytest.raises(ValueError, match=r"cannot degrade .*float32 \(height, width, 3\)"):
        degrade(bad, np.random.default_rng(0))


def test_invalid_params_raise_an_error():
    with pytest.raises(ValueError, match=r"kernel_probs.*6 probabilities"):
        DegradationParams(kernel_probs=(0.5, 0.5))
    with pytest.raises(ValueError, match=r"kernel_sizes.*odd"):
        DegradationParams(kernel_sizes=(7, 8))
    with pytest.raises(ValueError, match=r"resize_probs.*sum to 1"):
        dataclasses.replace(PISA_SR.first, resize_probs=(0.5, 0.5, 0.5))
    with pytest.raises(ValueError, match=r"jpeg_quality.*smallest, largest"):
        dataclasses.replace(PISA_SR.first, jpeg_quality=(95.0, 60.0))
