"""AVIF, HEIC, BMP, JPEG 2000, PPM, icons and WebP: depth, color spaces, and what is reported."""

import io
import struct

import imagecodecs
import numpy as np
import pytest
from PIL import Image
from raw_files import DISPLAY_P3, SRGB_CURVE, chunk, png, rgb_profile

from pisa_jax.imaging import image_files
from pisa_jax.imaging.image_data import ImageError, to_array
from pisa_jax.imaging.image_reading import decode_rgb8, from_pil, read_image
from pisa_jax.imaging.image_writing import output_suffix, write_image

Y, X = np.mgrid[:40, :60] / 60
SMOOTH = np.stack([X, Y, (X + Y) / 2, 1 - X * Y], -1)
LEVELS = np.rint(SMOOTH * 255).astype(np.uint8)
P3 = rgb_profile(DISPLAY_P3, SRGB_CURVE)


def decode(data, tmp_path):
    (tmp_path / "a").write_bytes(data)  # the content decides, not the name
    return read_image(tmp_path / "a")


def encode(kind, samples=LEVELS[..., :3], **options):
    file = io.BytesIO()
    Image.fromarray(samples).save(file, kind, **options)
    return file.getvalue()


@pytest.mark.parametrize("bits", [10, 12])
@pytest.mark.parametrize("channels", [3, 4])
def test_deep_avif(tmp_path, bits, channels):
    samples = np.rint(SMOOTH[..., :channels] * (2**bits - 1)).astype(np.uint16)
    image = decode(imagecodecs.avif_encode(samples, bitspersample=bits, level=100), tmp_path)
    assert (image.bits, image.format, image.notes) == (16, "avif", ())
    np.testing.assert_allclose(image.rgb, SMOOTH[..., :3], atol=0.2 / 255)
    assert (image.alpha is not None) == (channels == 4)
    assert output_suffix(image) == ".png"


@pytest.mark.parametrize("bits", [10, 12, 16])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_deep_jpeg_2000(tmp_path, bits, channels):
    samples = np.rint(SMOOTH[..., :channels] * (2**bits - 1)).astype(np.uint16)
    samples[:9, :9] = 2**bits - 1  # white, of which Pillow makes black
    data = imagecodecs.jpeg2k_encode(samples if channels > 1 else samples[..., 0].copy(), bitspersample=bits, level=0)
    image = decode(data, tmp_path)
    assert (image.bits, image.gray, image.format, image.notes) == (16, channels == 1, "jpeg2000", ())
    expected = samples[..., :3] / (2**bits - 1)
    np.testing.assert_allclose(image.rgb, np.broadcast_to(expected, image.rgb.shape), atol=1e-6)
    assert (image.alpha is not None) == (channels == 4)


def test_jpeg_2000_that_only_pillow_converts_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(imagecodecs, "jpeg2k_decode", lambda data: np.zeros((40, 60, 3), np.uint16))
    with pytest.raises(ImageError, match="holds 12 bits per channel in an unusual color space"):
        decode(jpeg2000(12), tmp_path)


@pytest.mark.parametrize("gray", [False, True])
def test_deep_jpeg(tmp_path, gray):
    samples = np.rint(SMOOTH[..., :3] * 4095).astype(np.uint16)
    data = imagecodecs.jpeg_encode(
        np.ascontiguousarray(samples[..., 0]) if gray else samples, bitspersample=12, level=98
    )
    exif = b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<HHHIHH", 1, 274, 3, 1, 6, 0) + bytes(4)
    data = data[:2] + b"\xff\xe1" + (len(exif) + 2).to_bytes(2, "big") + exif + data[2:]
    image = decode(data, tmp_path)
    assert (image.bits, image.gray, image.format, image.notes) == (16, gray, "jpeg", ())
    expected = np.rot90(SMOOTH[..., :1] if gray else SMOOTH[..., :3], -1)
    np.testing.assert_allclose(image.rgb, np.broadcast_to(expected, image.rgb.shape), atol=0.02)
    assert output_suffix(image) == ".png"
    with pytest.raises(ImageError, match="is damaged: the image is truncated"):
        decode(data[:-40], tmp_path)
    with pytest.raises(ImageError, match=r"is (damaged|not an image)"):
        decode(data[:200], tmp_path)


def test_code_points_of_avif(tmp_path):
    data = encode("AVIF", quality=100, subsampling="4:4:4")
    srgb = decode(data, tmp_path)
    assert (srgb.icc, srgb.notes) == (None, ())
    points = data.index(b"colrnclx") + 8

    def with_points(primaries, transfer):
        return data[:points] + struct.pack(">HH", primaries, transfer) + data[points + 4 :]

    image = decode(with_points(12, 13), tmp_path)
    pixels = chunk(b"cICP", bytes([12, 13, 0, 1]))
    (tmp_path / "b.png").write_bytes(png(to_array(srgb), 2, pixels))
    np.testing.assert_allclose(image.rgb, read_image(tmp_path / "b.png").rgb, atol=1e-6)
    with pytest.raises(ImageError, match="such as HDR; convert it to a standard dynamic range"):
        decode(with_points(9, 16), tmp_path)
    image = decode(encode("AVIF", icc_profile=P3), tmp_path)
    assert image.icc == P3  # it is stronger than code points


def test_metadata_and_orientation_of_avif(tmp_path):
    exif = Image.Exif()
    exif[274], exif[271] = 6, "Maker"
    image = decode(encode("AVIF", exif=exif, xmp=b"<x/>"), tmp_path)
    assert image.rgb.shape == (60, 40, 3)
    assert b"Maker" in image.exif
    assert image.metadata.xmp == b"<x/>"


@pytest.mark.parametrize("bits", [8, 10])
def test_heic(tmp_path, bits):
    pillow_heif = pytest.importorskip("pillow_heif", reason="needs pip install pillow-heif")
    samples = LEVELS[..., :3] if bits == 8 else np.rint(SMOOTH[..., :3] * 65535).astype(np.uint16)
    file = pillow_heif.from_bytes("RGB" if bits == 8 else "RGB;16", (60, 40), samples.tobytes())
    exif = Image.Exif()
    exif[271] = "Maker"
    buffer = io.BytesIO()
    file.save(buffer, quality=95, exif=exif.tobytes(), xmp=b"<x/>")
    image = decode(buffer.getvalue(), tmp_path)
    assert (image.bits, image.format, image.notes, image.icc) == (8 if bits == 8 else 16, "heif", (), None)
    np.testing.assert_allclose(image.rgb, SMOOTH[..., :3], atol=0.04)
    assert b"Maker" in image.exif
    assert image.metadata.xmp == b"<x/>"
    assert len(np.unique(image.rgb)) > 300 or bits == 8


def test_auxiliary_images_of_heic_are_reported():
    image = Image.fromarray(LEVELS[..., :3])
    image.format, image.info["aux"] = "HEIF", {"urn:com:apple:photo:2020:aux:hdrgainmap": [49]}
    assert from_pil(image).notes == ("auxiliary images, such as a depth or gain map, were dropped",)


def test_heic_without_its_decoder(monkeypatch):
    monkeypatch.setattr(image_files.importlib.util, "find_spec", lambda name: None)
    image_files.readable_formats.cache_clear()
    try:
        with pytest.raises(ImageError, match=r"^a.heic is an HEIF image; to read it: pip install 'pisa_jax\[heif\]'"):
            decode_rgb8(b"\0\0\0\x18ftypheic" + bytes(40), "a.heic")
    finally:
        image_files.readable_formats.cache_clear()


def test_profile_of_a_bmp(tmp_path):
    plain = encode("BMP")
    pixels = plain[54:]
    head = struct.pack("<IiiHHIIiiII", 124, 60, 40, 1, 24, 0, len(pixels), 0, 0, 0, 0) + bytes(16) + b"DEBM" + bytes(48)
    head += struct.pack("<IIII", 4, 124 + len(pixels), len(P3), 0)
    data = b"BM" + struct.pack("<IHHI", 138 + len(pixels) + len(P3), 0, 0, 138) + head + pixels + P3
    image = decode(data, tmp_path)
    assert image.icc == P3
    expected = Image.fromarray(LEVELS[..., :3])
    expected.info["icc_profile"] = P3
    np.testing.assert_array_equal(image.rgb, from_pil(expected).rgb)


def jpeg2000(bits):
    samples = np.rint(SMOOTH[..., :3] * (2**bits - 1)).astype(np.uint8 if bits == 8 else np.uint16)
    return imagecodecs.jpeg2k_encode(samples, bitspersample=bits, level=0)


def ppm(largest):
    samples = np.rint(SMOOTH[..., :3] * largest).astype(np.uint8 if largest < 256 else ">u2")
    return b"P6\n# comment\n60 40\n%d\n" % largest + samples.tobytes()


@pytest.mark.parametrize(
    ("data", "note"),
    [
        (jpeg2000(8), None),
        (ppm(255), None),
        (ppm(65535), "reduced from 16 to 8 bits per channel: the decoder of PPM has no more"),
        (encode("ICO", LEVELS, sizes=[(16, 16), (32, 32)]), "the icon has 2 sizes; only the largest is used"),
        (encode("ICO", LEVELS, sizes=[(32, 32)]), None),
    ],
)
def test_what_is_reduced_is_reported(tmp_path, data, note):
    image = decode(data, tmp_path)
    assert image.notes == ((note,) if note else ())
    if image.format != "ico":
        np.testing.assert_allclose(image.rgb, SMOOTH[..., :3], atol=0.01)


@pytest.mark.parametrize("lossless", [False, True])
@pytest.mark.parametrize("kind", ["still", "alpha", "animated"])
def test_webp_without_loss_is_recognized(tmp_path, lossless, kind):
    samples = LEVELS if kind == "alpha" else LEVELS[..., :3]
    more = {"save_all": True, "append_images": [Image.fromarray(255 - samples)]} if kind == "animated" else {}
    image = decode(encode("WEBP", samples, lossless=lossless, exact=True, exif=b"Exif\0\0", **more), tmp_path)
    assert image.lossless == lossless
    if lossless:
        write_image(tmp_path / "b.webp", image)
        back = read_image(tmp_path / "b.webp")
        np.testing.assert_array_equal(back.rgb, image.rgb)
        assert back.lossless
