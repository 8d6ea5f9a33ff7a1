"""Network inputs and results: sizes, padding, small images, and agreement with the original program."""

import dataclasses

import numpy as np
import pytest
from conftest import DATA, golden
from PIL import Image

from pisa_jax.imaging import network_input
from pisa_jax.imaging.image_data import ImageData, ImageError, from_array, to_array, to_pil
from pisa_jax.imaging.image_reading import from_pil, read_image
from pisa_jax.imaging.image_writing import output_suffix
from pisa_jax.imaging.network_input import ResizePlan, finish_output, prepare_input

SCALES = (1, 1.5, 2, 2.37, 3, 4)


def noise(*shape):
    return np.random.default_rng(0).random(shape, np.float32)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", ["odd_37x211.png", "strip_900x20.png", "tiny_1x1.png"])
@pytest.mark.parametrize("min_size", [0, 64])
def test_results_have_exactly_the_scaled_size(name, scale, min_size):
    image = read_image(DATA / "formats" / name)
    height, width = image.rgb.shape[:2]
    array, plan = prepare_input(image, scale, min_size)
    assert array.dtype == np.float32
    assert array.shape[0] % 8 == array.shape[1] % 8 == 0
    assert array.shape[:2] == tuple(np.add(plan.working, plan.padding))
    assert max(plan.padding) < 8
    assert plan.target == (round(height * scale), round(width * scale))
    if min(height, width) >= int(min_size / scale):
        assert plan.working == plan.target
    else:
        assert min(plan.working) >= min_size - 2 * scale  # truncation, here and in the threshold
    result = finish_output(array, plan, image)
    assert result.rgb.shape == (*plan.target, 3)
    if name != "tiny_1x1.png":
        return
    np.testing.assert_allclose(result.rgb[0, 0], image.rgb[0, 0], atol=1e-6)


@pytest.mark.parametrize(
    ("size", "scale", "min_size", "working", "padding"),
    [
        ((101, 101), 4, 64, (404, 404), (4, 4)),  # the original program gives 400
        ((23, 29), 4, 128, (128, 160), (0, 0)),
        ((23, 29), 3, 100, (99, 123), (5, 5)),
        ((60, 49), 4, 256, (312, 252), (0, 4)),  # 64 / 49 * 49 is 63.99...: truncated as in the original program
        ((32, 40), 4, 128, (128, 160), (0, 0)),  # exactly the threshold is not small
        ((31, 40), 4, 128, (128, 164), (0, 4)),
        ((37, 20), 2.37, 100, (182, 100), (2, 4)),  # threshold int(100 / 2.37) = 42
        ((50, 42), 2.37, 101, (118, 100), (2, 4)),  # int(101 / 2.37) = 42: not small
        ((5, 4), 1, 0, (5, 4), (3, 4)),
        ((1, 1), 1, 0, (1, 1), (7, 7)),
    ],
)
def test_sizes_of_the_plan(size, scale, min_size, working, padding):
    array, plan = prepare_input(ImageData(noise(*size, 3)), scale, min_size)
    assert plan == ResizePlan((round(size[0] * scale), round(size[1] * scale)), working, padding)
    assert array.shape == (working[0] + padding[0], working[1] + padding[1], 3)


def test_padding_reflects_repeatedly_where_it_exceeds_the_side():
    array, _ = prepare_input(ImageData(noise(3, 9, 3), bits=16), 1, 0, multiple=16)
    rows, columns = [0, 1, 2, 1] * 4, [*range(9), *range(7, 0, -1)]
    np.testing.assert_array_equal(array, array[rows][:, columns])
    np.testing.assert_allclose((array[:3, :9] + 1) / 2, noise(3, 9, 3), atol=1e-6)


@pytest.mark.parametrize("scale", [0.99, 0, -4, float("nan"), float("inf")])
def test_invalid_upscale_factors(scale):
    with pytest.raises(ValueError, match=r"the upscale factor is .*; allowed are finite numbers of at least 1"):
        prepare_input(ImageData(noise(4, 4, 3)), scale)


# Cases whose upscaled sides are multiples of 8: in others the original program downscales the image.
@pytest.mark.parametrize(
    ("run", "scale", "min_size"),
    [("A_x2_p64", 2, 64), ("C_x4_p128", 4, 128), ("D_x4_p128", 4, 128)]
    + [(f"{name}_x4_p128", 4, 128) for name in "AEF"],
)
def test_network_inputs_equal_those_of_the_original_program(run, scale, min_size):
    image = read_image(golden(f"lr/{run[0]}.png"))
    expected = np.load(golden(f"infer/ct__{run}.npz"))["c_t_uint8"][0].transpose(1, 2, 0)
    array, plan = prepare_input(image, scale, min_size)
    assert plan.padding == (0, 0)
    difference = np.abs((array + 1) * 127.5 - expected)
    assert np.mean(difference <= 2) == 1  # the original program rounds to 8 bits between its steps
    assert np.mean(difference <= 1) > 0.95


@pytest.mark.parametrize("name", ["bicubic_x4", "bicubic_x3", "bicubic_down", "lanczos_mult8"])
def test_resize_equals_pillow_without_rounding(name):
    recorded = np.load(golden("comp/colorfix.npz"))
    source = recorded["pil_bicubic_x4" if "lanczos" in name else "pil_in"].astype(np.float32)
    expected = recorded[f"pil_{name}"]
    result = network_input.resize(source, expected.shape[:2], name.split("_")[0])
    assert np.abs(np.clip(result, 0, 255) - expected).max() < 1.2
    assert np.abs(np.clip(result, 0, 255) - expected).mean() < 0.35
    np.testing.assert_array_equal(
        network_input.resize(source[..., 1], expected.shape[:2], name.split("_")[0]), result[..., 1]
    )


def test_finish_output_crops_padding_and_keeps_alpha_and_metadata():
    image = dataclasses.replace(
        from_array((64 + noise(5, 7, 4) * 128).astype(np.uint8)), icc=b"i", format="png", notes=("note",)
    )
    array, plan = prepare_input(image, 4, 0)
    results = [finish_output(a, plan, image) for a in (array, array[: plan.working[0], : plan.working[1]])]
    np.testing.assert_array_equal(results[0].rgb, results[1].rgb)
    np.testing.assert_array_equal(results[0].rgb, ((array + 1) / 2)[:20, :28])
    expected = np.asarray(Image.fromarray(np.rint(image.alpha * 255).astype(np.uint8)).resize((28, 20), 3)) / 255
    assert np.abs(results[0].alpha - expected).max() < 2 / 255
    checks = dataclasses.replace(image, alpha=(image.alpha > 0.5).astype(np.float32))
    opacity = finish_output(array, plan, checks).alpha
    assert (opacity.min(), opacity.max()) == (0, 1)
    assert (results[0].icc, results[0].format, results[0].notes) == (b"i", "png", ("note",))


def test_gray_images_become_three_equal_channels_and_results_their_luma():
    image = from_array((noise(8, 8) * 255).astype(np.uint8))
    array, plan = prepare_input(image, 2, 0)
    assert np.ptp(array, axis=-1).max() == 0
    output = noise(16, 16, 3) * 2 - 1
    result = finish_output(output, plan, image)
    luma = 0.299 * output[..., 0] + 0.587 * output[..., 1] + 0.114 * output[..., 2]
    np.testing.assert_allclose(to_array(result, np.float32), (luma + 1) / 2, atol=1e-6)


def test_network_outputs_outside_the_range_are_clipped():
    image = from_array(np.eye(2, 3, dtype=np.uint8)[None].repeat(2, 0))
    result = finish_output(np.array([[[-3, 0, 3]] * 2] * 2, np.float32), ResizePlan((2, 2), (2, 2), (0, 0)), image)
    np.testing.assert_array_equal(result.rgb, np.broadcast_to([0, 0.5, 1], (2, 2, 3)))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
@pytest.mark.parametrize("shape", [(4, 6), (4, 6, 2), (4, 6, 3), (4, 6, 4)])
def test_array_and_pillow_round_trips(dtype, shape):
    top = 1 if dtype == np.float32 else np.iinfo(dtype).max
    array = (noise(*shape) * top).astype(dtype)
    image = from_array(array)
    assert image.rgb.shape == (4, 6, 3)
    assert (image.gray, image.alpha is None) == (shape[2:] in ((), (2,)), shape[2:] in ((), (3,)))
    back = to_array(image, dtype)
    assert back.dtype == dtype
    np.testing.assert_array_equal(back, array)
    pillow = to_pil(image)
    np.testing.assert_array_equal(np.asarray(pillow), to_array(image))
    np.testing.assert_array_equal(to_array(from_pil(pillow)), np.asarray(pillow))


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((4, 4, 5), np.uint8), r"shape \(4, 4, 5\) is not an image; expected \(h, w\)"),
        (np.zeros((0, 4, 3), np.uint8), r"shape \(0, 4, 3\)"),
        (np.zeros((1, 4, 4, 3), np.uint8), r"shape \(1, 4, 4, 3\)"),
        (np.zeros((4, 4), np.int64), r"unsupported array type int64; expected uint8, uint16"),
        (np.full((4, 4), 7.5), r"floats must be in \[0, 1\], not \[7.5, 7.5\]"),
        (np.full((4, 4), np.nan), r"floats must be in \[0, 1\]"),
    ],
)
def test_invalid_arrays(array, message):
    with pytest.raises(ImageError, match=message):
        from_array(array)


def test_unsupported_array_types():
    with pytest.raises(ImageError, match="unsupported array type int32; allowed: uint8"):
        to_array(from_array(np.zeros((2, 2), np.uint8)), np.int32)


@pytest.mark.parametrize(
    ("kind", "ext", "changes", "suffix"),
    [
        ("png", "auto", {}, ".png"),
        ("jpeg", "auto", {}, ".jpg"),
        ("webp", "auto", {"alpha": np.ones((2, 2), np.float32)}, ".webp"),
        ("tiff", "auto", {"bits": 16}, ".tiff"),
        ("gif", "auto", {}, ".png"),
        ("", "auto", {}, ".png"),
        ("jpeg", "auto", {"alpha": np.ones((2, 2), np.float32)}, ".png"),
        ("webp", "auto", {"bits": 16}, ".png"),
        ("png", "jpg", {"bits": 16}, ".jpg"),
        ("gif", "tiff", {}, ".tiff"),
    ],
)
def test_output_suffixes(kind, ext, changes, suffix):
    image = dataclasses.replace(from_array(np.zeros((2, 2, 3), np.uint8)), format=kind, **changes)
    assert output_suffix(image, ext) == suffix
    with pytest.raises(ImageError, match="cannot write 'bmp'; allowed: auto, png, jpg"):
        output_suffix(image, "bmp")
