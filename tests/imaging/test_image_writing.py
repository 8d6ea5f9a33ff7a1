"""Writing of image files: round trips, metadata, color, limits of the formats, atomic writes."""

import dataclasses
import io
import zlib

import cv2
import numpy as np
import pytest
from PIL import Image, ImageCms, JpegImagePlugin
from raw_files import ADOBE_RGB, DISPLAY_P3, SRGB_CURVE, chunk, gamma, gray_profile, png, profile, rgb_profile

from pisa_jax.imaging import image_writing, network_input
from pisa_jax.imaging.image_data import ImageData, ImageError, from_array, to_array
from pisa_jax.imaging.image_reading import from_pil, read_image
from pisa_jax.imaging.image_writing import write_image


@pytest.fixture
def samples():
    return np.random.default_rng(0).integers(0, 65536, (5, 7, 4)).astype(np.uint16)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".tif", ".tiff", ".JPEG"])
@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_round_trips(tmp_path, suffix, bits, channels):
    """A format returns what it can hold, and notes report the rest. Smooth alpha keeps JPEG's error small."""
    y, x = np.mgrid[:40, :56] / 64
    values = np.stack([x, (y + 1 - x) / 2, 0.3 + 0.5 * np.sin(6 * y) * x, 1 - y * x], -1).clip(0, 1)
    values = values[..., [0, 3] if channels == 2 else list(range(channels))]
    array = np.rint(values * (2**bits - 1)).astype(np.uint8 if bits == 8 else np.uint16)
    notes = write_image(tmp_path / f"a{suffix}", from_array(array))
    back = read_image(tmp_path / f"a{suffix}")
    exact, holds_alpha = suffix in (".png", ".tif", ".tiff"), suffix not in (".jpg", ".JPEG")
    assert back.bits == (bits if exact else 8)
    assert (back.alpha is not None) == (channels in (2, 4) and holds_alpha)
    assert back.gray == (channels < 3 and suffix != ".webp")
    assert any("from 16 to 8 bits" in note for note in notes) == (bits == 16 and not exact)
    assert any("composited onto white" in note for note in notes) == (channels in (2, 4) and not holds_alpha)
    expected = from_array(array)
    if not holds_alpha and expected.alpha is not None:
        alpha = expected.alpha[..., None]
        expected = dataclasses.replace(expected, rgb=expected.rgb * alpha + 1 - alpha)
    assert np.abs(back.rgb - expected.rgb).max() <= (1e-6 if exact else 0.08)
    assert np.abs(back.rgb - expected.rgb).mean() <= (1e-6 if exact else 0.01)
    if back.alpha is not None:
        assert np.abs(back.alpha - expected.alpha).max() <= (1e-6 if exact else 0.5 / 255 + 1e-6)
    if exact and channels > 2 and not (suffix != ".png" and bits == 8 and channels == 4):  # OpenCV premultiplies there
        raw = cv2.imread(str(tmp_path / f"a{suffix}"), cv2.IMREAD_UNCHANGED)
        np.testing.assert_array_equal(raw[..., [2, 1, 0, 3][:channels]], array)


def test_values_are_clipped_and_rounded(tmp_path):
    rgb = np.array([[-0.2, 0.49, 0.51], [99.6, 254.6, 300]], np.float32)[None].repeat(3, 0) / 255
    for name in ("a.png", "a.tif"):
        write_image(tmp_path / name, ImageData(rgb))
        with Image.open(tmp_path / name) as image:
            assert np.asarray(image)[0].tolist() == [[0, 0, 1], [100, 255, 255]]
    with pytest.raises(ImageError, match="not finite"):
        write_image(tmp_path / "b.png", ImageData(np.full((2, 2, 3), np.nan, np.float32)))
    assert not (tmp_path / "b.png").exists()


def test_jpeg_is_written_without_chroma_subsampling(tmp_path):
    write_image(tmp_path / "a.jpg", from_array(np.eye(32, dtype=np.uint8)[..., None] * np.uint8([255, 0, 0])))
    with Image.open(tmp_path / "a.jpg") as image:
        assert JpegImagePlugin.get_sampling(image) == 0  # 4:4:4


def photo_exif():
    exif = Image.Exif()
    exif[271], exif[272], exif[274], exif[0x132], exif[256] = "Maker", "Model", 6, "2020:01:02 03:04:05", 7
    exif.get_ifd(0x8769).update({0xA002: 7, 0xA003: 5, 0x829A: 0.01, 0x9286: b"ASCII\0\0\0said"})
    exif.get_ifd(0x8825).update({1: "N", 2: (47.0, 11.0, 3.5)})
    return exif


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".tif"])
@pytest.mark.parametrize("bits", [8, 16])
def test_exif_and_profile_are_kept(tmp_path, samples, suffix, bits):
    data = rgb_profile(DISPLAY_P3, SRGB_CURVE)
    image = Image.fromarray((samples[..., :3] >> 8).astype(np.uint8))
    image.save(tmp_path / "in.jpg", exif=photo_exif(), icc_profile=data, quality=95, subsampling=0)
    image = dataclasses.replace(read_image(tmp_path / "in.jpg"), bits=bits)
    array, plan = network_input.prepare_input(image, 2, 0)
    write_image(tmp_path / f"out{suffix}", network_input.finish_output(array, plan, image))
    with Image.open(tmp_path / f"out{suffix}") as written:
        written.load()
        exif = written.getexif()
        assert (exif[271], exif[272], exif.get(274, 1), exif[0x132]) == ("Maker", "Model", 1, "2020:01:02 03:04:05")
        details, gps = exif.get_ifd(0x8769), exif.get_ifd(0x8825)
        assert (details[0xA002], details[0xA003]) == written.size == (10, 14)
        assert (float(details[0x829A]), details[0x9286]) == (0.01, b"ASCII\0\0\0said")
        assert [float(v) for v in gps[2]] == [47, 11, 3.5]
        assert written.info["icc_profile"] == data
        assert suffix == ".tif" or 256 not in exif
    if suffix == ".png" and cv2.__version__ >= "5":  # older versions read the pixels only
        _, kinds, blocks = cv2.imreadWithMetadata(str(tmp_path / "out.png"), cv2.IMREAD_UNCHANGED)
        found = {kind: bytes(block.ravel()) for kind, block in zip(kinds, blocks, strict=True)}
        assert found[cv2.IMAGE_METADATA_ICCP] == data
        assert b"Maker" in found[cv2.IMAGE_METADATA_EXIF]


@pytest.mark.parametrize(
    ("colorants", "curve"), [(ADOBE_RGB, gamma(563 / 256)), (DISPLAY_P3, SRGB_CURVE)], ids=["adobe rgb", "display p3"]
)
@pytest.mark.parametrize("bits", [8, 16])
def test_colors_of_a_profile_survive_an_identity_network(tmp_path, colorants, curve, bits):
    """Flat patches, some of them outside sRGB, pass prepare_input, an identity network and finish_output."""
    data, top = rgb_profile(colorants, curve), 2**bits - 1
    grid = np.stack(np.meshgrid(*[np.linspace(0, 1, 5)] * 3), -1).reshape(5, 25, 3)
    native = np.rint(grid.repeat(4, 0).repeat(4, 1) * top).astype(np.uint8 if bits == 8 else np.uint16)
    block = chunk(b"iCCP", b"p\0\0" + zlib.compress(data))
    (tmp_path / "in.png").write_bytes(png(native, 2, block))
    image = read_image(tmp_path / "in.png")
    assert image.icc == data
    array, plan = network_input.prepare_input(image, 3, 0)
    assert np.abs(array).max() <= 1
    inside = to_array(image)[2::4, 2::4]
    source = ImageCms.ImageCmsProfile(io.BytesIO(data))
    patches = Image.fromarray(np.rint(grid * 255).astype(np.uint8))
    expected = np.asarray(ImageCms.profileToProfile(patches, source, ImageCms.createProfile("sRGB"), 1)).astype(int)
    assert np.abs(inside - expected).max() <= 2  # the network input is sRGB
    write_image(tmp_path / "out.png", network_input.finish_output(array, plan, image))
    out = cv2.imread(str(tmp_path / "out.png"), cv2.IMREAD_UNCHANGED)[..., ::-1]
    assert out.dtype == native.dtype
    difference = np.abs(out[6::12, 6::12] / top - native[2::4, 2::4] / top)
    assert difference.max() * 255 <= 2
    with Image.open(tmp_path / "out.png") as image:
        assert image.info["icc_profile"] == data


def test_gray_profiles_and_profiles_that_are_dropped(tmp_path):
    ramp = np.arange(256, dtype=np.uint8)[None].repeat(3, 0)
    Image.fromarray(ramp).save(tmp_path / "gray.png", icc_profile=gray_profile(gamma(1.8)))
    image = read_image(tmp_path / "gray.png")
    assert (image.gray, image.notes) == (True, ())
    linear = (np.arange(256) / 255) ** (461 / 256)
    srgb = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    np.testing.assert_allclose(image.rgb[0, :, 1], srgb, atol=1e-4)
    for suffix in (".png", ".jpg", ".tif"):
        write_image(tmp_path / f"out{suffix}", image)
        with Image.open(tmp_path / f"out{suffix}") as back:
            assert (back.mode, back.info["icc_profile"]) == ("L", image.icc)
            assert np.abs(np.asarray(back).astype(int) - ramp).max() <= (1 if suffix == ".jpg" else 0)
    write_image(tmp_path / "out.webp", image)  # WebP has no gray mode
    back = read_image(tmp_path / "out.webp")
    assert back.icc is None
    np.testing.assert_allclose(back.rgb[1], image.rgb[1], atol=2.5 / 255)
    cases = {
        "the ICC profile is for GRAY pixels, not for RGB": gray_profile(gamma(1.8)),
        "the ICC profile is damaged": rgb_profile(ADOBE_RGB, gamma(2))[:150],
        "the ICC profile is damaged and was dropped": profile(b"RGB ", {b"A2B0": b"mft2" + bytes(60)}),
    }
    for message, data in cases.items():
        image = from_pil(with_profile(Image.fromarray(ramp).convert("RGB"), data))
        assert image.icc is None
        assert message in image.notes[0]
        np.testing.assert_array_equal(to_array(image)[..., 0], ramp)


def with_profile(image, data):
    image.info["icc_profile"] = data
    return image


class TestAtomicWrite:
    def test_a_failing_encoder_keeps_the_old_file(self, tmp_path, monkeypatch):
        path = tmp_path / "a.png"
        path.write_bytes(b"old")

        def fails(*_):
            raise OSError("encoder error -2")

        monkeypatch.setattr(image_writing, "encode", fails)
        with pytest.raises(ImageError, match=r"cannot write .*a.png: encoder error -2"):
            write_image(path, from_array(np.zeros((2, 2), np.uint8)))
        assert path.read_bytes() == b"old"
        assert [p.name for p in tmp_path.iterdir()] == ["a.png"]

    def test_an_interrupted_write_leaves_no_files(self, tmp_path, monkeypatch):
        def interrupted(*_):
            raise KeyboardInterrupt

        monkeypatch.setattr(image_writing.os, "replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            write_image(tmp_path / "a.png", from_array(np.zeros((2, 2), np.uint8)))
        assert not list(tmp_path.iterdir())

    def test_a_missing_folder_raises_oserror(self, tmp_path):
        (tmp_path / "file").write_bytes(b"")
        for path in (tmp_path / "missing" / "a.png", tmp_path / "file" / "a.png"):
            with pytest.raises(OSError, match=r"missing|file"):
                write_image(path, from_array(np.zeros((2, 2), np.uint8)))
        assert [p.name for p in tmp_path.iterdir()] == ["file"]

    def test_limits_of_the_formats(self, tmp_path):
        with pytest.raises(ImageError, match=r"'.bmp' is none of .png, .jpg"):
            write_image(tmp_path / "a.bmp", from_array(np.zeros((2, 2), np.uint8)))
        with pytest.raises(ImageError, match="webp allows at most 16383 pixels per side, not 17000; use png or tiff"):
            write_image(tmp_path / "a.webp", from_array(np.zeros((1, 17000), np.uint8)))
        huge = dataclasses.replace(from_array(np.zeros((2, 2), np.uint8)), exif=b"Exif\0\0" + bytes(70000))
        assert "EXIF data was dropped" in write_image(tmp_path / "a.jpg", huge)[0]
