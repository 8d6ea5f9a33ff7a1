"""Reading of image files: formats, bit depths, color, orientation, and errors for unsupported files."""

import dataclasses
import io

import cv2
import numpy as np
import pytest
from conftest import DATA
from PIL import Image, ImageCms, ImageOps
from raw_files import DISPLAY_P3, SRGB_CURVE, chunk, lut_profile, png, rgb_profile, tiff16

from pisa_jax.imaging.image_data import ImageError, to_array
from pisa_jax.imaging.image_reading import decode_rgb8, from_pil, read_image, read_rgb8

# name: height, width, gray, alpha, bits, format, substring of its note or None
FORMATS = {
    "alpha_lossy.webp": (100, 100, False, True, 8, "webp", None),
    "alpha_rgba16.png": (256, 342, False, True, 16, "png", None),
    "alpha_rgba8.png": (350, 566, False, True, 8, "png", None),
    "animated.webp": (200, 200, False, True, 8, "webp", "6 frames or pages"),
    "arithmetic_coding.jpg": (149, 227, False, False, 8, "jpeg", None),
    "bilevel.png": (200, 356, True, False, 8, "png", None),
    "bmp24.bmp": (200, 356, False, False, 8, "bmp", None),
    "cmyk.jpg": (200, 356, False, False, 8, "jpeg", "CMYK was converted to sRGB without an ICC profile"),
    "exif_landscape_3.jpg": (300, 450, False, False, 8, "jpeg", None),
    "exif_landscape_6.jpg": (300, 450, False, False, 8, "jpeg", None),
    "exif_portrait_5.jpg": (450, 300, False, False, 8, "jpeg", None),
    "exif_portrait_8.jpg": (450, 300, False, False, 8, "jpeg", None),
    "gray16_interlaced.png": (32, 32, True, False, 16, "png", None),
    "gray_alpha.png": (200, 356, True, True, 8, "png", None),
    "odd_37x211.png": (211, 37, False, False, 8, "png", None),
    "palette64.png": (200, 356, False, False, 8, "png", None),
    "palette_trns.png": (32, 32, False, True, 8, "png", None),
    "progressive_q30.jpg": (200, 356, False, False, 8, "jpeg", None),
    "q8_420.jpg": (200, 356, False, False, 8, "jpeg", None),
    "rgb16.png": (32, 32, False, False, 16, "png", None),
    "rgb16.tiff": (151, 157, False, False, 16, "tiff", None),
    "rgba16_small.png": (32, 32, False, True, 16, "png", None),
    "still.gif": (200, 356, False, False, 8, "gif", None),
    "strip_900x20.png": (20, 900, False, False, 8, "png", None),
    "tiny_1x1.png": (1, 1, False, False, 8, "png", None),
}
# Files of linear light: their chunk gAMA is 1.
LINEAR = ("gray16_interlaced.png", "palette_trns.png", "rgb16.png", "rgba16_small.png")
BROKEN = {"truncated.jpg": "is damaged: .*truncated", "not_an_image.png": "is not an image in a supported format"}


def format_file(name):
    return DATA / "formats" / name


def levels(image, bits=8):
    return to_array(dataclasses.replace(image, alpha=None), np.uint8 if bits == 8 else np.uint16).astype(int)


def test_all_files_of_the_folder_are_covered():
    names = {path.name for path in format_file("tiny_1x1.png").parent.iterdir()}
    assert names <= FORMATS.keys() | BROKEN.keys()


@pytest.mark.parametrize("name", FORMATS)
def test_formats(name):
    height, width, gray, alpha, bits, kind, note = FORMATS[name]
    path = format_file(name)
    image = read_image(path)
    assert image.rgb.shape == (height, width, 3)
    assert (image.gray, image.alpha is not None, image.bits, image.format) == (gray, alpha, bits, kind)
    assert (len(image.notes) == 1 and note in image.notes[0]) if note else not image.notes
    if name in ("cmyk.jpg", "alpha_rgba16.png"):  # tested below
        return
    # OpenCV applies the orientation in its color mode and returns alpha in its unchanged mode
    color = cv2.imread(str(path), cv2.IMREAD_COLOR_BGR | cv2.IMREAD_ANYDEPTH)[..., ::-1]
    color = color / np.iinfo(color.dtype).max
    if name in LINEAR:
        color = np.where(color <= 0.0031308, 12.92 * color, 1.055 * color ** (1 / 2.4) - 0.055)
    color = np.rint(color * 255).astype(int)
    difference = np.abs(levels(image)[..., None] - color if gray else levels(image) - color)
    if alpha:
        raw = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
        assert np.abs(image.alpha - raw[..., 3] / np.iinfo(raw.dtype).max).max() < 1e-6
        difference = difference[image.alpha > 0]  # the color of fully transparent pixels is undefined
    assert difference.max() <= 2


def test_exif_orientations_of_photographs():
    for one, two in (("exif_landscape_3", "exif_landscape_6"), ("exif_portrait_5", "exif_portrait_8")):
        first, second = (levels(read_image(format_file(f"{name}.jpg"))) for name in (one, two))
        correlations = [
            np.corrcoef(first.ravel(), turned.ravel())[0, 1] for turned in (second, second[::-1], second[:, ::-1])
        ]
        assert correlations[0] > 0.9
        assert correlations[0] > max(correlations[1:]) + 0.05


def test_cmyk_is_close_to_rgb():
    reference = levels(read_image(format_file("bmp24.bmp")))
    assert np.abs(levels(read_image(format_file("cmyk.jpg"))) - reference).mean() < 6


def test_16_bit_adobe_rgb_with_alpha():
    path = format_file("alpha_rgba16.png")
    image, opened = read_image(path), Image.open(path).convert("RGB")
    profile = opened.info["icc_profile"]
    srgb = ImageCms.profileToProfile(
        opened, ImageCms.ImageCmsProfile(io.BytesIO(profile)), ImageCms.createProfile("sRGB"), 1
    )
    difference = np.abs(levels(image) - np.asarray(srgb))[image.alpha > 0]
    assert difference.max() <= 6  # Pillow reduces the file to 8 bits, which matters in dark colors
    assert np.mean(difference <= 1) > 0.98
    assert image.icc == profile
    assert len(np.unique(image.rgb)) > 1000  # 8 bits would give 256 per channel


def test_table_profiles_are_converted_permanently(tmp_path):
    """The profiles map inks and primaries to unusual colors, which proves that the table was applied."""
    cyan_ink = Image.new("CMYK", (2, 2), (255, 0, 0, 0))
    pink = lut_profile(b"CMYK", 4, lambda c, m, y, k: (100 - 40 * c, 60 * c, 0))
    cyan_ink.save(tmp_path / "a.jpg", icc_profile=pink)
    Image.new("RGB", (2, 2), (0, 0, 255)).save(
        tmp_path / "a.png", icc_profile=lut_profile(b"RGB ", 3, lambda r, g, b: (100 - 40 * b, 60 * b, 0))
    )
    for name, note in (("a.jpg", "CMYK was converted to sRGB with its"), ("a.png", "converted to sRGB with 8 bits")):
        image = read_image(tmp_path / name)
        assert np.abs(levels(image) - [236, 92, 147]).max() <= 2  # Lab 60 60 0 by hand
        assert (image.icc, len(image.notes)) == (None, 1)
        assert note in image.notes[0]


@pytest.mark.parametrize("name", BROKEN)
def test_errors_name_the_file_and_the_reason(name):
    with pytest.raises(ImageError, match=f"{name} {BROKEN[name]}") as caught:
        read_image(format_file(name))
    assert "\n" not in str(caught.value)


NOISE = np.random.default_rng(1).integers(0, 65536, (40, 40, 3))


@pytest.fixture
def samples():
    return np.random.default_rng(0).integers(0, 65536, (5, 7, 4)).astype(np.uint16)


@pytest.mark.parametrize(
    ("color_type", "channels", "key"), [(0, 1, 0), (0, 1, 1), (2, 3, 0), (2, 3, 1), (4, 2, 0), (6, 4, 0)]
)
def test_16_bit_png_keeps_all_bits(tmp_path, samples, color_type, channels, key):
    samples = samples[..., :channels]
    extra = chunk(b"tRNS", samples[0, 0].astype(">u2").tobytes()) if key else b""
    (tmp_path / "a.png").write_bytes(png(samples, color_type, extra))
    image = read_image(tmp_path / "a.png")
    assert (image.bits, image.gray) == (16, channels < 3)
    color = samples[..., :1] if channels < 3 else samples[..., :3]
    alpha = (samples != samples[0, 0]).any(-1) * 65535 if key else samples[..., -1] if channels in (2, 4) else None
    expected = color if alpha is None else np.concatenate([color, alpha[..., None]], -1)
    np.testing.assert_array_equal(to_array(image, np.uint16).reshape(expected.shape), expected)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_all_orientations_in_all_formats(tmp_path, samples, orientation):
    exif = Image.Exif()
    exif[274], exif[271] = orientation, "Maker"
    stored = Image.fromarray((samples[..., :3] >> 8).astype(np.uint8))
    stored.info["exif"] = exif.tobytes()
    upright = np.asarray(ImageOps.exif_transpose(stored))
    stored.save(tmp_path / "a.png", exif=exif)
    stored.save(tmp_path / "b.webp", exif=exif, lossless=True)
    stored.save(tmp_path / "c.tif", exif=exif)
    (tmp_path / "d.tif").write_bytes(tiff16(samples[..., :3], t274=orientation, t271="Maker"))
    (tmp_path / "e.png").write_bytes(png(samples[..., :3], 2, chunk(b"eXIf", exif.tobytes()[6:])))
    for path in sorted(tmp_path.iterdir()):
        image = read_image(path)
        values = to_array(image, np.uint16) >> 8
        np.testing.assert_array_equal(values, upright, err_msg=path.name)
        block = Image.Exif()
        block.load(image.exif)
        assert block.get(274, 1) == 1
        assert block[271] == "Maker"
    np.testing.assert_array_equal(to_array(from_pil(stored)), upright)
    assert exif[274] == stored.getexif()[274] == orientation  # the argument is not modified


def test_16_bit_tiff_with_premultiplied_alpha_and_with_white_zero(tmp_path, samples):
    alpha = np.maximum(samples[..., 3:], 20000)
    premultiplied = np.rint(samples[..., :3] / 65535 * alpha).astype(np.uint16)
    (tmp_path / "a.tif").write_bytes(tiff16(np.concatenate([premultiplied, alpha], -1), t338=1))
    image = read_image(tmp_path / "a.tif")
    assert np.abs(levels(image, 16) - samples[..., :3]).max() <= 2
    np.testing.assert_allclose(image.alpha * 65535, alpha[..., 0], atol=0.01)
    (tmp_path / "b.tif").write_bytes(tiff16(samples[..., :1], photometric=0))
    np.testing.assert_array_equal(levels(read_image(tmp_path / "b.tif"), 16), 65535 - samples[..., 0])


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.png", b"", r"a.png is empty \(0 bytes\)"),
        ("b.png", png(np.zeros((1, 0, 3), int), 2), "b.png is not an image"),
        (
            "c.png",
            png(np.zeros((1, 1, 3), int), 2, size=(60000, 60000)),
            "c.png: .*exceeds limit of 178956970 pixels",
        ),
        ("d.png", png(NOISE, 2)[:-900], "d.png is damaged: .*truncated"),
        ("e.gif", b"GIF89a" + bytes(3), "e.gif is (damaged|not an image)"),
        ("f.eps", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "f.eps is not an image"),
    ],
)
def test_malformed_files(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ImageError, match=message):
        read_image(tmp_path / name)


def test_unsupported_pixel_types_and_missing_files(tmp_path):
    with pytest.raises(ImageError, match=r"holds F pixels; save it as gray, RGB or CMYK"):
        from_pil(Image.fromarray(np.ones((2, 2), np.float32)))
    with pytest.raises(ImageError, match="holds 32-bit integers"):
        from_pil(Image.fromarray(np.full((2, 2), 70000, np.int32)))
    with pytest.raises(ImageError, match="no pixels"):
        from_pil(Image.new("RGB", (0, 3)))
    with pytest.raises(FileNotFoundError):
        read_image(tmp_path / "missing.png")


def test_mpo_previews_of_phones_are_ignored_without_a_note(tmp_path):
    photograph, preview = Image.new("RGB", (60, 40), "red"), Image.new("RGB", (6, 4), "blue")
    photograph.save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=[preview])
    image = read_image(tmp_path / "a.jpg")
    assert (image.rgb.shape, image.format, image.notes) == ((40, 60, 3), "jpeg", ())


def test_only_the_first_frame_of_an_animation_is_read(tmp_path):
    frames = [Image.fromarray(np.full((4, 6, 3), value, np.uint8)) for value in (250, 10, 90)]
    for name in ("a.gif", "a.png", "a.webp", "a.tif"):
        lossless = {"lossless": True} if name == "a.webp" else {}
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], **lossless)
        image = read_image(tmp_path / name)
        assert image.notes == ("the file has 3 frames or pages; only the first is used",)
        np.testing.assert_array_equal(to_array(image)[..., :3].reshape(4, 6, -1), 250)


def pillow_rgb8(path):
    """The 8-bit sRGB pixels of a file without a profile, by Pillow alone."""
    with Image.open(path) as opened:
        return np.asarray(ImageOps.exif_transpose(opened).convert("RGB"))


@pytest.mark.parametrize(
    "name", [name for name, (*_, bits, _, _) in FORMATS.items() if bits == 8 and name not in LINEAR]
)
def test_rgb8_of_8_bit_files_equals_pillow(name):
    np.testing.assert_array_equal(read_rgb8(format_file(name)), pillow_rgb8(format_file(name)))


def test_rgb8_of_photographs_equals_pillow():
    for path in sorted((DATA / "demo").iterdir()):
        np.testing.assert_array_equal(read_rgb8(path), pillow_rgb8(path))


@pytest.mark.parametrize("name", FORMATS)
def test_rgb8_is_the_rounded_image(name):
    expected = levels(read_image(format_file(name)))
    expected = expected if expected.ndim == 3 else np.repeat(expected[..., None], 3, -1)
    found = read_rgb8(format_file(name))
    assert (found.dtype, found.flags.c_contiguous) == (np.uint8, True)
    np.testing.assert_array_equal(found, expected)


def test_rgb8_applies_profiles(tmp_path):
    patches = np.stack(np.meshgrid(*[np.arange(0, 256, 51, np.uint8)] * 3), -1).reshape(12, 18, 3)
    for name, profile in (
        ("p3", rgb_profile(DISPLAY_P3, SRGB_CURVE)),
        ("table", lut_profile(b"RGB ", 3, lambda r, g, b: (100 - 40 * b, 60 * b, 0))),
    ):
        Image.fromarray(patches).save(tmp_path / f"{name}.png", icc_profile=profile)
        found = read_rgb8(tmp_path / f"{name}.png")
        assert np.abs(found.astype(int) - patches).max() > 20
        np.testing.assert_array_equal(found, levels(read_image(tmp_path / f"{name}.png")))
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    Image.fromarray(patches).save(tmp_path / "srgb.png", icc_profile=srgb)
    np.testing.assert_array_equal(read_rgb8(tmp_path / "srgb.png"), patches)


def test_rgb8_of_16_bit_gray_is_rounded(tmp_path, samples):
    (tmp_path / "a.png").write_bytes(png(samples[..., :1], 0))
    expected = np.rint(samples[..., :1].astype(np.float32) / 65535 * 255).repeat(3, -1)
    np.testing.assert_array_equal(read_rgb8(tmp_path / "a.png"), expected)


def test_errors_of_decode_rgb8_begin_with_the_given_name():
    with pytest.raises(ImageError, match=r"^shard 3, record 7 is not an image in a supported format"):
        decode_rgb8(b"not an image", "shard 3, record 7")
