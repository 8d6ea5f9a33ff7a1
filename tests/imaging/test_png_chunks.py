"""Color spaces, transparency and text of PNG files, and ancillary chunks that decoders refuse."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms
from raw_files import DISPLAY_P3, SRGB_CURVE, chunk, png, rgb_profile

from pisa_jax.imaging import icc, png_chunks
from pisa_jax.imaging.image_data import ImageError, to_array
from pisa_jax.imaging.image_reading import from_pil, read_image
from pisa_jax.imaging.image_writing import write_image

PATCHES = np.random.default_rng(0).integers(0, 256, (6, 8, 3)).astype(np.uint8)
SRGB_POINTS = (31270, 32900, 64000, 33000, 30000, 60000, 15000, 6000)
P3_POINTS = (31270, 32900, 68000, 32000, 26500, 69000, 15000, 6000)


def gama(value):
    return chunk(b"gAMA", struct.pack(">I", value))


def chrm(points):
    return chunk(b"cHRM", struct.pack(">8I", *points))


def cicp(*values):
    return chunk(b"cICP", bytes(values))


def iccp(profile):
    return chunk(b"iCCP", b"name\0\0" + zlib.compress(profile))


def read(tmp_path, *chunks, samples=PATCHES, color_type=2):
    (tmp_path / "a.png").write_bytes(png(samples, color_type, b"".join(chunks)))
    return read_image(tmp_path / "a.png")


def encode_srgb(linear):
    return np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * np.maximum(linear, 0) ** (1 / 2.4) - 0.055)


P3 = rgb_profile(DISPLAY_P3, SRGB_CURVE)
SRGB_CHUNK = chunk(b"sRGB", b"\0")


@pytest.mark.parametrize(
    "chunks",
    [
        (),
        (SRGB_CHUNK, gama(100000)),
        (gama(45455), chrm(SRGB_POINTS)),
        (gama(45455),),
        (chrm(SRGB_POINTS),),
        (gama(0),),
        (gama(100000), SRGB_CHUNK),
        (cicp(1, 13, 0, 1), iccp(P3)),
        (chrm((0,) * 8), gama(45455)),
    ],
)
def test_srgb_in_all_its_names(tmp_path, chunks):
    """Pixels are those of the file; sRGB and cICP are stronger than gAMA and iCCP, and nonsense is ignored."""
    image = read(tmp_path, *chunks)
    assert (image.icc, image.notes) == (None, ())
    np.testing.assert_array_equal(to_array(image), PATCHES)


@pytest.mark.parametrize("bits", [8, 16])
def test_gamma(tmp_path, bits):
    samples = PATCHES if bits == 8 else PATCHES.astype(np.uint16) * 257
    image = read(tmp_path, gama(100000), samples=samples)
    np.testing.assert_allclose(image.rgb, encode_srgb(PATCHES / 255), atol=1e-3)
    image = read(tmp_path, gama(55556), samples=samples)
    np.testing.assert_allclose(image.rgb, encode_srgb((PATCHES / 255) ** 1.8), atol=2e-3)
    gray = read(tmp_path, gama(100000), samples=samples[..., :1], color_type=0)
    assert gray.gray
    np.testing.assert_allclose(gray.rgb[..., :1], encode_srgb(PATCHES[..., :1] / 255), atol=1e-4)


@pytest.mark.parametrize(
    "chunks", [(iccp(P3),), (cicp(12, 13, 0, 1),), (gama(45455), chrm(P3_POINTS)), (iccp(P3), gama(100000))]
)
def test_display_p3_in_all_its_names(tmp_path, chunks):
    """LittleCMS converts with Apple's profile to the same colors, and the result has a profile of the same colors."""
    expected = ImageCms.profileToProfile(
        Image.fromarray(PATCHES),
        ImageCms.ImageCmsProfile(io.BytesIO(P3)),
        ImageCms.createProfile("sRGB"),
    )
    image = read(tmp_path, *chunks)
    # gAMA states a power of 2.2, but it stands for the curve of sRGB
    assert np.abs(to_array(image).astype(int) - np.asarray(expected)).max() <= 2
    for suffix in (".png", ".jpg", ".webp", ".tif"):
        write_image(tmp_path / f"out{suffix}", image)
    back = read_image(tmp_path / "out.png")
    np.testing.assert_allclose(back.rgb, image.rgb, atol=2e-2)
    with Image.open(tmp_path / "out.png") as written:
        assert np.abs(np.asarray(written).astype(int) - PATCHES).max() <= 1
        assert ImageCms.ImageCmsProfile(io.BytesIO(written.info["icc_profile"])).profile.xcolor_space == "RGB "


def test_images_that_pillow_opened_have_the_colors_of_their_chunks(tmp_path):
    for chunks in ((gama(100000),), (gama(45455), chrm(P3_POINTS)), (SRGB_CHUNK, gama(100000))):
        image = read(tmp_path, *chunks)
        with Image.open(tmp_path / "a.png") as opened:
            np.testing.assert_allclose(from_pil(opened).rgb, image.rgb, atol=1e-6)


@pytest.mark.parametrize("values", [(9, 16, 0, 1), (9, 18, 0, 1), (99, 13, 0, 1), (1, 13, 1, 1), (1, 13, 0, 0), (1,)])
def test_hdr_and_ycbcr_are_refused(tmp_path, values):
    with pytest.raises(ImageError, match=r"\(ITU-T H.273\), such as HDR; convert it|\(cICP .*\); save it as RGB"):
        read(tmp_path, cicp(*values))


def test_code_points_of_recommendation_709():
    profile = png_chunks.profile_of_code_points(1, 1, gray=False)
    values = icc.to_srgb(np.array([[0.5, 0.5, 0.5]]), icc.parse(profile))
    light = ((0.5 + 0.099) / 1.099) ** (1 / 0.45)
    np.testing.assert_allclose(values, encode_srgb(np.full((1, 3), light)), atol=1e-3)
    assert png_chunks.profile_of_code_points(2, 2, gray=True) is None


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_one_gray_level_is_transparent(tmp_path, bits):
    levels = (np.arange(16).reshape(2, 8) % 2**bits).astype(np.uint8)
    fields = levels[..., None] >> np.arange(bits)[::-1] & 1
    rows = np.packbits(fields.reshape(2, -1), axis=1)
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 2, bits, 0, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows)))
    key = chunk(b"tRNS", b"\0\1")
    (tmp_path / "a.png").write_bytes(png_chunks.SIGNATURE + head + key + pixels + chunk(b"IEND", b""))
    image = read_image(tmp_path / "a.png")
    np.testing.assert_array_equal(image.alpha, levels != 1)
    np.testing.assert_allclose(image.rgb[..., 0], levels / (2**bits - 1), atol=1e-6)


LONG = b"A" * (1 << 21)


@pytest.mark.parametrize(
    ("data", "note"),
    [
        (chunk(b"zTXt", b"Comment\0\0" + zlib.compress(LONG)), "zTXt was dropped: it is damaged or longer than"),
        (chunk(b"iTXt", b"Comment\0\1\0\0\0" + zlib.compress(LONG)), "iTXt was dropped"),
        (chunk(b"iTXt", b"Comment\0\0\0\0\0" + LONG), "iTXt was dropped"),
        (chunk(b"tEXt", b"Comment\0" + LONG), "tEXt was dropped"),
        (chunk(b"zTXt", b"Comment\0\0not zlib"), "zTXt was dropped"),
        (chunk(b"zTXt", b""), "zTXt was dropped"),
        (chunk(b"tEXt", b"Comment\0text")[:-1] + b"?", "tEXt was dropped: its checksum is wrong"),
        (chunk(b"pHYs", struct.pack(">IIB", 1, 1, 1))[:-1] + b"?", "pHYs was dropped: its checksum is wrong"),
        (iccp(P3)[:-1] + b"?", "iCCP was dropped: its checksum is wrong"),
        (chunk(b"iCCP", b"name\0\0" + zlib.compress(P3)[:-30]), "the ICC profile is damaged and was dropped"),
        (chunk(b"iCCP", b"name\0\0" + zlib.compress(bytes(1 << 25))), "the ICC profile is damaged and was dropped"),
        (chunk(b"iCCP", b""), "the ICC profile is damaged and was dropped"),
        (gama(100000)[:-1] + b"?", "gAMA was dropped"),
        (chunk(b"sBIT", b"\5\6\5") + chunk(b"vpAg", bytes(9)) + chunk(b"hIST", bytes(3)), None),
    ],
)
@pytest.mark.parametrize("bits", [8, 16])
def test_sound_pixels_are_read_whatever_the_ancillary_chunks(tmp_path, data, note, bits):
    samples = PATCHES if bits == 8 else PATCHES.astype(np.uint16) * 257
    image = read(tmp_path, data, samples=samples)
    np.testing.assert_array_equal(to_array(image), PATCHES)
    assert (note in image.notes[0]) if note else image.notes == ()


def test_wrong_checksums_of_critical_chunks_are_refused(tmp_path):
    data = png(PATCHES, 2)
    for place in (data.index(b"IHDR") + 18, data.index(b"IDAT") + 20):
        (tmp_path / "a.png").write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        with pytest.raises(ImageError, match=r"a.png is (damaged|not an image)"):
            read_image(tmp_path / "a.png")


def test_text_is_kept_byte_for_byte(tmp_path):
    texts = [
        (b"tEXt", b"Author\0\xc5lesund"),
        (b"zTXt", b"Comment\0\0" + zlib.compress(b"a comment")),
        (b"iTXt", "Title\0\0\0no\0Tittel\0Møte på Tromsø".encode()),
    ]
    image = read(tmp_path, *(chunk(*text) for text in texts))
    write_image(tmp_path / "b.png", image)
    written = (tmp_path / "b.png").read_bytes()
    assert all(chunk(*text) in written for text in texts)
    assert write_image(tmp_path / "b.jpg", image) == ("dropped, because jpeg cannot hold it: PNG text",)
