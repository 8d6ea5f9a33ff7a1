"""Every kind of image file is read as what it is, or refused with the reason."""

import dataclasses
import io

import cv2
import numpy as np
import pytest
from conftest import DATA
from PIL import Image, ImageCms, ImageOps
from raw_files import chunk, lut_profile, png, tiff16

from pisa_jax.imaging import image_io
from pisa_jax.imaging.image_io import ImageError, read_picture, to_array

# name: height, width, grey, alpha, bits, format, part of its note or None
FORMATS = {
    "alpha_lossy.webp": (100, 100, False, True, 8, "webp", None),
    "alpha_rgba16.png": (256, 342, False, True, 16, "png", None),
    "alpha_rgba8.png": (350, 566, False, True, 8, "png", None),
    "animated.webp": (200, 200, False, True, 8, "webp", "first of 6"),
    "arithmetic_coding.jpg": (149, 227, False, False, 8, "jpeg", None),
    "bilevel.png": (200, 356, True, False, 8, "png", None),
    "bmp24.bmp": (200, 356, False, False, 8, "bmp", None),
    "cmyk.jpg": (200, 356, False, False, 8, "jpeg", "CMYK converted to sRGB without a profile"),
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
BROKEN = {"truncated.jpg": "is damaged: .*truncated", "not_an_image.png": "is not a picture that can be read here"}


def format_file(name):
    return DATA / "formats" / name


def levels(picture, bits=8):
    return to_array(dataclasses.replace(picture, alpha=None), np.uint8 if bits == 8 else np.uint16).astype(int)


def test_every_file_of_the_folder_is_tested():
    names = {path.name for path in format_file("tiny_1x1.png").parent.iterdir()}
    assert names <= FORMATS.keys() | BROKEN.keys()


@pytest.mark.parametrize("name", FORMATS)
def test_each_format_is_read(name):
    height, width, gray, alpha, bits, kind, note = FORMATS[name]
    path = format_file(name)
    picture = read_picture(path)
    assert picture.rgb.shape == (height, width, 3)
    assert (picture.gray, picture.alpha is not None, picture.bits, picture.format) == (gray, alpha, bits, kind)
    assert (len(picture.notes) == 1 and note in picture.notes[0]) if note else not picture.notes
    if name in ("cmyk.jpg", "alpha_rgba16.png"):  # tested below
        return
    # OpenCV turns pictures upright by itself when asked for colour, and gives alpha when asked for nothing
    colour = cv2.imread(str(path), cv2.IMREAD_COLOR_BGR)[..., ::-1].astype(int)
    difference = np.abs(levels(picture)[..., None] - colour if gray else levels(picture) - colour)
    if alpha:
        raw = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
        assert np.abs(picture.alpha - raw[..., 3] / np.iinfo(raw.dtype).max).max() < 1e-6
        difference = difference[picture.alpha > 0]  # what is under full transparency is not defined
    assert difference.max() <= 2


def test_the_landscapes_and_portraits_are_the_same_way_up():
    for one, two in (("exif_landscape_3", "exif_landscape_6"), ("exif_portrait_5", "exif_portrait_8")):
        first, second = (levels(read_picture(format_file(f"{name}.jpg"))) for name in (one, two))
        likeness = [
            np.corrcoef(first.ravel(), turned.ravel())[0, 1] for turned in (second, second[::-1], second[:, ::-1])
        ]
        assert likeness[0] > 0.9
        assert likeness[0] > max(likeness[1:]) + 0.05


def test_cmyk_shows_the_picture():
    reference = levels(read_picture(format_file("bmp24.bmp")))
    assert np.abs(levels(read_picture(format_file("cmyk.jpg"))) - reference).mean() < 6


def test_16_bit_adobe_rgb_with_alpha():
    path = format_file("alpha_rgba16.png")
    picture = read_picture(path)
    image = Image.open(path).convert("RGB")
    srgb = ImageCms.profileToProfile(
        image, ImageCms.ImageCmsProfile(io.BytesIO(image.info["icc_profile"])), ImageCms.createProfile("sRGB"), 1
    )
    difference = np.abs(levels(picture) - np.asarray(srgb))[picture.alpha > 0]
    assert difference.max() <= 6  # Pillow cuts the file to 8 bits, which shows in the dark
    assert np.mean(difference <= 1) > 0.98
    assert picture.icc == image.info["icc_profile"]
    assert len(np.unique(picture.rgb)) > 1000  # 8 bits would give 256 per channel


def test_profiles_that_are_tables_convert_for_good(tmp_path):
    """Inks and primaries with colours that nobody would guess: the table was used."""
    cyan_ink = Image.new("CMYK", (2, 2), (255, 0, 0, 0))
    pink = lut_profile(b"CMYK", 4, lambda c, m, y, k: (100 - 40 * c, 60 * c, 0))
    cyan_ink.save(tmp_path / "a.jpg", icc_profile=pink)
    Image.new("RGB", (2, 2), (0, 0, 255)).save(
        tmp_path / "a.png", icc_profile=lut_profile(b"RGB ", 3, lambda r, g, b: (100 - 40 * b, 60 * b, 0))
    )
    for name, note in (("a.jpg", "CMYK converted to sRGB through its"), ("a.png", "converted to sRGB with 8 bits")):
        picture = read_picture(tmp_path / name)
        assert np.abs(levels(picture) - [236, 92, 147]).max() <= 2  # Lab 60 60 0 by hand
        assert (picture.icc, len(picture.notes)) == (None, 1)
        assert note in picture.notes[0]


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_are_named_with_the_reason(name):
    with pytest.raises(ImageError, match=f"{name} {BROKEN[name]}") as caught:
        read_picture(format_file(name))
    assert "\n" not in str(caught.value)


NOISE = np.random.default_rng(1).integers(0, 65536, (40, 40, 3))


@pytest.fixture
def samples():
    return np.random.default_rng(0).integers(0, 65536, (5, 7, 4)).astype(np.uint16)


@pytest.mark.parametrize(
    ("color_type", "channels", "key"), [(0, 1, 0), (0, 1, 1), (2, 3, 0), (2, 3, 1), (4, 2, 0), (6, 4, 0)]
)
def test_all_bits_of_16_bit_png(tmp_path, samples, color_type, channels, key):
    samples = samples[..., :channels]
    extra = chunk(b"tRNS", samples[0, 0].astype(">u2").tobytes()) if key else b""
    (tmp_path / "a.png").write_bytes(png(samples, color_type, extra))
    picture = read_picture(tmp_path / "a.png")
    assert (picture.bits, picture.gray) == (16, channels < 3)
    colour = samples[..., :1] if channels < 3 else samples[..., :3]
    alpha = (samples != samples[0, 0]).any(-1) * 65535 if key else samples[..., -1] if channels in (2, 4) else None
    expected = colour if alpha is None else np.concatenate([colour, alpha[..., None]], -1)
    np.testing.assert_array_equal(to_array(picture, np.uint16).reshape(expected.shape), expected)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientations(tmp_path, samples, orientation):
    exif = Image.Exif()
    exif[274], exif[271] = orientation, "Maker"
    image = Image.fromarray((samples[..., :3] >> 8).astype(np.uint8))
    image.info["exif"] = exif.tobytes()
    upright = np.asarray(ImageOps.exif_transpose(image))
    image.save(tmp_path / "a.png", exif=exif)
    image.save(tmp_path / "b.webp", exif=exif, lossless=True)
    image.save(tmp_path / "c.tif", exif=exif)
    (tmp_path / "d.tif").write_bytes(tiff16(samples[..., :3], t274=orientation, t271="Maker"))
    (tmp_path / "e.png").write_bytes(png(samples[..., :3], 2, chunk(b"eXIf", exif.tobytes()[6:])))
    for path in sorted(tmp_path.iterdir()):
        picture = read_picture(path)
        values = to_array(picture, np.uint16) >> 8
        np.testing.assert_array_equal(values, upright, err_msg=path.name)
        block = Image.Exif()
        block.load(picture.exif)
        assert block.get(274, 1) == 1
        assert block[271] == "Maker"
    np.testing.assert_array_equal(to_array(image_io.from_pil(image)), upright)
    assert exif[274] == image.getexif()[274] == orientation  # the caller's image is left alone


def test_16_bit_tiff_with_multiplied_alpha_and_with_white_zero(tmp_path, samples):
    alpha = np.maximum(samples[..., 3:], 20000)
    multiplied = np.rint(samples[..., :3] / 65535 * alpha).astype(np.uint16)
    (tmp_path / "a.tif").write_bytes(tiff16(np.concatenate([multiplied, alpha], -1), t338=1))
    picture = read_picture(tmp_path / "a.tif")
    assert np.abs(levels(picture, 16) - samples[..., :3]).max() <= 2
    np.testing.assert_allclose(picture.alpha * 65535, alpha[..., 0], atol=0.01)
    (tmp_path / "b.tif").write_bytes(tiff16(samples[..., :1], photometric=0))
    np.testing.assert_array_equal(levels(read_picture(tmp_path / "b.tif"), 16), 65535 - samples[..., 0])


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.png", b"", r"a.png is empty \(0 bytes\)"),
        ("b.png", png(np.zeros((1, 0, 3), int), 2), "b.png is not a picture"),
        (
            "c.png",
            png(np.zeros((1, 1, 3), int), 2, size=(60000, 60000)),
            "c.png: .*exceeds limit of 178956970 pixels",
        ),
        ("d.png", png(NOISE, 2)[:-900], "d.png is damaged: .*truncated"),
        ("e.gif", b"GIF89a" + bytes(3), "e.gif is (damaged|not a picture)"),
        ("f.eps", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "f.eps is not a picture"),
    ],
)
def test_hostile_files(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ImageError, match=message):
        read_picture(tmp_path / name)


def test_pixels_without_a_meaning_and_missing_files(tmp_path):
    Image.fromarray(np.ones((2, 2), np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(ImageError, match=r"a.tif: holds F pixels; save it as grey, RGB or CMYK"):
        read_picture(tmp_path / "a.tif")
    with pytest.raises(ImageError, match="holds 32-bit integers"):
        image_io.from_pil(Image.fromarray(np.full((2, 2), 70000, np.int32)))
    with pytest.raises(ImageError, match="no pixels"):
        image_io.from_pil(Image.new("RGB", (0, 3)))
    with pytest.raises(FileNotFoundError):
        read_picture(tmp_path / "missing.png")


def test_the_preview_behind_a_phones_picture_is_no_animation(tmp_path):
    large, preview = Image.new("RGB", (60, 40), "red"), Image.new("RGB", (6, 4), "blue")
    large.save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=[preview])
    picture = read_picture(tmp_path / "a.jpg")
    assert (picture.rgb.shape, picture.format, picture.notes) == ((40, 60, 3), "jpeg", ())


def test_only_the_first_frame_of_an_animation(tmp_path):
    frames = [Image.fromarray(np.full((4, 6, 3), value, np.uint8)) for value in (250, 10, 90)]
    for name in ("a.gif", "a.png", "a.webp", "a.tif"):
        lossless = {"lossless": True} if name == "a.webp" else {}
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], **lossless)
        picture = read_picture(tmp_path / name)
        assert picture.notes == ("animated or of several pages: only the first of 3 is used",)
        np.testing.assert_array_equal(to_array(picture)[..., :3].reshape(4, 6, -1), 250)
