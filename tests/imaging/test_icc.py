"""ICC conversions in floating point against LittleCMS in 8 bits, and their round trips."""

import io

import numpy as np
import pytest
from PIL import Image, ImageCms
from raw_files import ADOBE_RGB, DISPLAY_P3, SRGB_CURVE, gamma, gray_profile, parametric, profile, rgb_profile, table

from pisa_jax.imaging import icc

GRID = np.stack(np.meshgrid(*[np.linspace(0, 255, 18).round()] * 3), -1).reshape(108, 54, 3) / 255
PROFILES = {
    "adobe rgb": rgb_profile(ADOBE_RGB, gamma(563 / 256)),
    "display p3": rgb_profile(DISPLAY_P3, SRGB_CURVE),
    "table": rgb_profile(DISPLAY_P3, table(np.linspace(0, 1, 700) ** 1.8)),
    "linear": rgb_profile(ADOBE_RGB, table([])),
    "para 0": rgb_profile(ADOBE_RGB, parametric(0, 2.0)),
    "para 1": rgb_profile(ADOBE_RGB, parametric(1, 2.0, 1.25, -0.25)),
    "para 2": rgb_profile(ADOBE_RGB, parametric(2, 2.0, 0.9, 0.05, 0.04)),
    "para 4": rgb_profile(ADOBE_RGB, parametric(4, 2.0, 0.88995, 0.1, 0.45, 0.2, 0.02, 0.0073)),
}


def little_cms(pixels, data):
    """Convert 8-bit pixels with LittleCMS to sRGB with the relative colorimetric intent."""
    source, srgb = ImageCms.ImageCmsProfile(io.BytesIO(data)), ImageCms.createProfile("sRGB")
    mode = "L" if pixels.ndim == 2 else "RGB"
    intent = ImageCms.Intent.RELATIVE_COLORIMETRIC
    return np.asarray(
        ImageCms.profileToProfile(Image.fromarray(pixels), source, srgb, intent, "RGB" if mode == "RGB" else "L")
    )


@pytest.mark.parametrize("name", PROFILES)
def test_conversion_to_srgb_agrees_with_little_cms(name):
    ours = icc.to_srgb(GRID, icc.parse(PROFILES[name]))
    theirs = little_cms((GRID * 255).astype(np.uint8), PROFILES[name])
    assert np.abs(np.clip(ours, 0, 1) * 255 - theirs).max() < 1.6  # its rounding, and its 16-bit curves near black


@pytest.mark.parametrize("name", ["adobe rgb", "display p3", "table", "linear"])
def test_round_trip_restores_all_colors_including_those_outside_srgb(name):
    parsed = icc.parse(PROFILES[name])
    srgb = icc.to_srgb(GRID, parsed)
    assert srgb.dtype == np.float32
    assert srgb.min() < -0.05  # the grid holds colors outside sRGB
    np.testing.assert_allclose(icc.from_srgb(srgb, parsed), GRID, atol=0.4 / 255)


def test_round_trip_keeps_16_bits():
    parsed = icc.parse(PROFILES["adobe rgb"])
    values = np.arange(8192, 65536)[:, None] * np.ones(3) / 65535
    back = icc.from_srgb(icc.to_srgb(values, parsed), parsed)
    assert np.abs(back - values).max() * 65535 < 1


@pytest.mark.parametrize("curve", [gamma(1.8), table(np.linspace(0, 1, 256) ** 2.6)])
def test_gray_profiles_follow_their_curve(curve):
    values = np.linspace(0, 1, 256)[:, None]
    parsed = icc.parse(gray_profile(curve))
    srgb = icc.to_srgb(values, parsed)
    exponent = 461 / 256 if curve == gamma(1.8) else 2.6
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    np.testing.assert_allclose(linear, values**exponent, atol=2e-5)
    np.testing.assert_allclose(
        icc.from_srgb(srgb, parsed), values, atol=2.01 / 255
    )  # the darkest values have equal light
    np.testing.assert_allclose(icc.from_srgb(srgb, parsed)[16:], values[16:], atol=1e-3)


def test_black_and_white_survive_curves_with_constant_ends():
    curve = table(np.clip(np.linspace(-0.1, 1.1, 500), 0, 1))
    parsed = icc.parse(gray_profile(curve))
    ends = np.array([[0.0], [1.0]])
    np.testing.assert_array_equal(icc.from_srgb(icc.to_srgb(ends, parsed), parsed), ends)


@pytest.mark.parametrize(
    ("data", "same"),
    [
        (ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(), True),
        (
            rgb_profile(
                [[0.43607, 0.22249, 0.01392], [0.38515, 0.71687, 0.09708], [0.14307, 0.06061, 0.7141]], SRGB_CURVE
            ),
            True,
        ),
        (PROFILES["display p3"], False),
        (PROFILES["adobe rgb"], False),
        (gray_profile(gamma(2.2)), False),
        (gray_profile(SRGB_CURVE), True),
    ],
)
def test_srgb_is_recognized_by_its_values(data, same):
    assert icc.is_srgb(icc.parse(data)) is same


def test_unsupported_and_damaged_profiles():
    assert icc.parse(profile(b"RGB ", {b"A2B0": b"mft2" + bytes(60)})) is None
    assert icc.parse(profile(b"CMYK", {b"A2B0": b"mft2" + bytes(60)})) is None
    assert icc.color_space(PROFILES["display p3"]) == "RGB"
    assert icc.color_space(gray_profile(gamma(2.2))) == "GRAY"
    complete = PROFILES["table"]
    for data in (
        b"",
        b"no profile",
        complete[:200],
        complete[:-100],
        rgb_profile(ADOBE_RGB, b"para" + bytes(4) + b"\xff" * 8),
    ):
        with pytest.raises(ValueError, match="the ICC profile is damaged"):
            icc.parse(data)
