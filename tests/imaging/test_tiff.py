"""TIFF files of every layout, depth and compression: read exactly, or refused."""

import io
import itertools
import re
import struct

import numpy as np
import pytest
import tifffile
from PIL import Image
from raw_files import tiff16

from pisa_jax.imaging.image_data import ImageError, to_array
from pisa_jax.imaging.image_reading import from_pil, read_image, read_rgb8

HEIGHT, WIDTH = 20, 35
LARGEST = {"u1": 255, "u2": 65535, "f4": 1}
# tifffile's name of a color model: (channels with extra ones, color channels)
MODELS = {
    "minisblack": (1, 1),
    "miniswhite": (1, 1),
    "minisblack alpha": (2, 1),
    "rgb": (3, 3),
    "rgb alpha": (4, 3),
    "separated": (4, 4),
    "separated alpha": (5, 4),
}
EXACT = (None, "lzw", "deflate", "adobe_deflate", "packbits", "lzma", "zstd", "lerc", "png", "jpegxr", "webp")
WITH_PREDICTOR = ("lzw", "deflate", "adobe_deflate", "lzma", "zstd")
LAYOUTS = [
    {"planarconfig": planes, "tile": tile, "byteorder": order, "bigtiff": big}
    for planes, tile, (order, big) in itertools.product(
        ("contig", "separate"), (None, (16, 32)), (("<", False), (">", False), ("<", True))
    )
]


def make_samples(channels, dtype):
    values = np.random.default_rng(0).random((HEIGHT, WIDTH, channels))
    return (values * LARGEST[dtype]).astype(dtype)


def tiff(samples, photometric="rgb", **options):
    file = io.BytesIO()
    tifffile.imwrite(file, samples, photometric=photometric, metadata=None, **options)
    return file.getvalue()


def tiff_of_model(model, dtype, planarconfig=None, **options):
    """Encode random samples; return (file, samples in [0, 1])."""
    photometric, _, alpha = model.partition(" ")
    samples = make_samples(MODELS[model][0], dtype)
    stored = samples[..., 0] if samples.shape[-1] == 1 else samples
    if stored.ndim == 3:
        stored = np.moveaxis(stored, -1, 0) if planarconfig == "separate" else stored
        options["planarconfig"] = planarconfig
    if alpha:
        options["extrasamples"] = ["unassalpha"]
    return tiff(stored, photometric, **options), samples.astype(np.float32) / LARGEST[dtype]


def decode(data, tmp_path):
    (tmp_path / "a.tif").write_bytes(data)
    return read_image(tmp_path / "a.tif")


def check(image, model, values, dtype, tolerance=1e-6):
    color, alpha = values[..., : MODELS[model][1]], values[..., MODELS[model][1] :]
    if "separated" in model:
        color = (1 - color[..., :3]) * (1 - color[..., 3:])
        tolerance = 2 / 255 if dtype == "u1" else tolerance
    elif model == "miniswhite":
        color = 1 - color
    np.testing.assert_allclose(image.rgb, np.broadcast_to(color, image.rgb.shape), atol=tolerance)
    assert (image.alpha is not None) == bool(alpha.size)
    if alpha.size:
        np.testing.assert_allclose(image.alpha, alpha[..., 0], atol=tolerance)
    assert (image.gray, image.bits) == (color.shape[-1] == 1, 8 if dtype == "u1" else 16)


@pytest.mark.parametrize("dtype", LARGEST)
@pytest.mark.parametrize("model", MODELS)
def test_layouts(tmp_path, model, dtype):
    """Strips and tiles, both planar configurations, both byte orders, BigTIFF."""
    for layout in LAYOUTS:
        data, values = tiff_of_model(model, dtype, rowsperstrip=None if layout["tile"] else 7, **layout)
        check(decode(data, tmp_path), model, values, dtype)


@pytest.mark.parametrize("compression", EXACT)
def test_compressions_without_loss(tmp_path, compression):
    count = 0
    for dtype, model, predictor, layout in itertools.product(LARGEST, ("rgb", "miniswhite"), (False, True), LAYOUTS):
        if (predictor and compression not in WITH_PREDICTOR) or (compression, dtype) == ("jpegxr", "f4"):
            continue
        lossless = {"lossless": True} if compression == "webp" else None
        options = layout | {"compression": compression, "predictor": predictor or None, "compressionargs": lossless}
        try:
            data, values = tiff_of_model(model, dtype, **options)
        except (ValueError, TypeError, KeyError, NotImplementedError, RuntimeError):  # a type that the codec lacks
            continue
        check(decode(data, tmp_path), model, values, dtype, 1e-6)
        count += 1
    assert count >= 3, count


@pytest.mark.parametrize(
    ("compression", "planarconfig"),
    [("jpeg", "contig"), ("jpeg", "separate"), ("webp", "contig"), ("jpeg2000", "contig"), ("jpeg2000", "separate")],
)
def test_compressions_with_loss(tmp_path, compression, planarconfig):
    y, x = np.mgrid[:64, :96] / 96
    smooth = (np.stack([x, y, (x + y) / 2], -1) * 255).astype(np.uint8)
    stored = smooth if planarconfig == "contig" else np.moveaxis(smooth, -1, 0)
    for tile in (None, (32, 48)):
        image = decode(tiff(stored, planarconfig=planarconfig, compression=compression, tile=tile), tmp_path)
        assert np.abs(to_array(image).astype(int) - smooth).max() <= 6


@pytest.mark.parametrize("compression", [None, "tiff_lzw", "tiff_adobe_deflate", "packbits", "group3", "group4"])
@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LA"])
def test_files_of_libtiff(tmp_path, mode, compression):
    """Pixels of files that Pillow writes are those that it reads."""
    if compression and "group" in compression and mode != "1":
        return
    levels = np.random.default_rng(1).integers(0, 256, (HEIGHT, WIDTH, 3)).astype(np.uint8)
    source = Image.fromarray(levels).convert("L" if mode in ("1", "LA") else "RGB")
    written = source.convert(mode)
    written.save(tmp_path / "a.tif", compression=compression)
    # Pillow reads uncompressed YCbCr since version 13.
    expected = written.convert("RGB") if (mode, compression) == ("YCbCr", None) else pillow_rgb8(tmp_path / "a.tif")
    np.testing.assert_array_equal(read_rgb8(tmp_path / "a.tif"), expected)


def pillow_rgb8(path):
    with Image.open(path) as opened:
        return np.asarray(opened.convert("RGB"))


def packed(samples, bits):
    """Rows of big-endian bit fields, padded to bytes."""
    fields = samples[..., None] >> np.arange(bits)[::-1] & 1
    return np.packbits(fields.reshape(len(samples), -1).astype(np.uint8), axis=1).tobytes()


@pytest.mark.parametrize("bits", [1, 2, 4, 6, 8, 10, 12, 14, 16])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("photometric", [0, 1])
def test_white_depends_on_the_depth(tmp_path, bits, channels, photometric):
    if channels == 3 and photometric == 0:
        return
    samples = np.random.default_rng(bits).integers(0, 2**bits, (HEIGHT, WIDTH, channels))
    data = packed(samples, bits) if bits != 16 else samples.astype("<u2").tobytes()
    head = tiff16(samples[:0], 2 if channels == 3 else photometric, t256=WIDTH, t257=HEIGHT, t258=(bits,) * channels,
                  t278=HEIGHT, t279=len(data))  # fmt: skip
    image = decode(head + data, tmp_path)
    values = samples / (2**bits - 1)
    values = 1 - values if photometric == 0 and channels == 1 else values
    exact = bits in (1, 2, 4, 8)  # multiples of 1/255
    np.testing.assert_allclose(image.rgb, np.broadcast_to(values, image.rgb.shape), atol=1e-6)
    assert image.bits == (8 if exact or bits < 8 else 16)


@pytest.mark.parametrize("order", [1, 2])
def test_order_of_bits(tmp_path, order):
    samples = np.random.default_rng(0).integers(0, 16, (HEIGHT, WIDTH, 1))
    data = packed(samples, 4)
    if order == 2:
        data = bytes(int(f"{byte:08b}"[::-1], 2) for byte in data)
    head = tiff16(samples[:0], 1, t257=HEIGHT, t258=4, t266=order, t278=HEIGHT, t279=len(data))
    np.testing.assert_array_equal(to_array(decode(head + data, tmp_path)), samples[..., 0] * 17)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("compression", ["jpeg", None])
def test_orientations(tmp_path, orientation, compression):
    """JPEG streams in YCbCr and uncompressed YCbCr take other ways than RGB."""
    source = Image.fromarray((np.mgrid[:16, :32].sum(0)[..., None] * [5, 3, 1]).astype(np.uint8)).convert("YCbCr")
    source.save(tmp_path / "a.tif", compression=compression, tiffinfo={274: orientation})
    source.convert("RGB").save(tmp_path / "rgb.tif", tiffinfo={274: orientation})
    expected = pillow_rgb8(tmp_path / ("a.tif" if compression else "rgb.tif"))
    np.testing.assert_array_equal(read_rgb8(tmp_path / "a.tif"), expected)


@pytest.mark.parametrize("photometric", [0, 1])
def test_gray_that_pillow_opened_has_the_white_of_its_file(tmp_path, photometric):
    data = tiff16(make_samples(1, "u2"), photometric)
    image = decode(data, tmp_path)
    with Image.open(io.BytesIO(data)) as opened:
        np.testing.assert_allclose(from_pil(opened).rgb, image.rgb, atol=1e-6)


def test_premultiplied_alpha_and_unspecified_channels(tmp_path):
    samples = make_samples(5, "u1")
    samples[..., 3] = np.maximum(samples[..., 3], 100)
    premultiplied = samples.copy()
    premultiplied[..., :3] = np.rint(samples[..., :3] * (samples[..., 3:4] / 255))
    image = decode(tiff(premultiplied, extrasamples=["assocalpha", "unspecified"]), tmp_path)
    assert np.abs(image.rgb * 255 - samples[..., :3]).max() <= 2
    np.testing.assert_array_equal(np.rint(image.alpha * 255), samples[..., 3])
    assert image.notes == ("1 extra channel without a defined meaning dropped",)
    image = decode(tiff(samples, extrasamples=["unspecified", "unspecified"]), tmp_path)
    assert image.alpha is None
    assert image.notes == ("2 extra channels without a defined meaning dropped",)


@pytest.mark.parametrize("bits", [1, 4, 8])
def test_palettes(tmp_path, bits):
    indices = np.random.default_rng(0).integers(0, 2**bits, (HEIGHT, WIDTH)).astype(np.uint8)
    palette = np.random.default_rng(1).integers(0, 256, (3, 2**bits)).astype(np.uint16)
    palette[:, 0] = 255
    for stored in (palette * 257, palette):  # some writers store 8 bits
        data = packed(indices[..., None], bits)
        head = tiff16(np.zeros((0, WIDTH, 1), int), 3, t257=HEIGHT, t258=bits, t278=HEIGHT, t279=len(data),
                      t320=tuple(stored.ravel().tolist()))  # fmt: skip
        image = decode(head + data, tmp_path)
        np.testing.assert_array_equal(to_array(image), palette.T.astype(np.uint8)[indices])


def pages(*images, **options):
    """Encode (samples, options of the page); the pages behind the first are SubIFDs if `subifds` is given."""
    file = io.BytesIO()
    with tifffile.TiffWriter(file, **options) as writer:
        for samples, page in images:
            writer.write(samples, photometric="rgb", metadata=None, **page)
    return file.getvalue()


LARGE, SMALL, OTHER = (np.full(shape, level, np.uint8) for shape, level in [((60, 90, 3), 200), ((20, 30, 3), 90),
                                                                           ((20, 70, 3), 30)])  # fmt: skip


@pytest.mark.parametrize(
    ("images", "level", "note"),
    [
        ([(LARGE, {})], 200, None),
        ([(LARGE, {}), (LARGE // 2, {})], 200, "2 frames or pages; only the first is used"),
        ([(LARGE, {}), (SMALL, {"subfiletype": 1})], 200, None),
        ([(LARGE, {}), (SMALL, {})], 200, "only the first is used"),
        ([(SMALL, {"subfiletype": 1}), (LARGE, {})], 200, r"only page 2 \(90x60\) is used"),
        ([(SMALL, {}), (LARGE, {})], 200, r"only page 2 \(90x60\) is used"),
        ([(OTHER, {}), (LARGE, {})], 30, "only the first is used"),
        ([(SMALL, {"subifds": 1}), (LARGE, {})], 200, r"only page 2 \(90x60\) is used"),
        ([(LARGE, {"subifds": 1}), (SMALL, {"subfiletype": 1})], 200, None),
        ([(SMALL, {"subfiletype": 1})], 90, "the file holds only previews; the largest, 30x20, is used"),
        ([(OTHER, {"extratags": [(255, 3, 1, 2, True)]}), (LARGE, {})], 200, "only page 2"),
    ],
)
@pytest.mark.parametrize("bigtiff", [False, True])
def test_the_page_that_is_read(tmp_path, images, level, note, bigtiff):
    image = decode(pages(*images, bigtiff=bigtiff), tmp_path)
    np.testing.assert_array_equal(to_array(image), level)
    assert (len(image.notes) == 1 and re.search(note, image.notes[0])) if note else image.notes == ()


GRAY = np.zeros((4, 6, 1), np.uint16)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (tiff(np.zeros((4, 6), np.uint32), "minisblack"), "holds integers of 32 bits; save it with 8 or 16 bits"),
        (tiff(np.zeros((4, 6), np.int16), "minisblack"), "holds signed integers of 16 bits"),
        (tiff(np.zeros((4, 6), np.complex64), "minisblack"), "holds complex numbers of 64 bits"),
        (tiff(np.full((4, 6), 3, np.float32), "minisblack"), r"holds floats in \[3.0, 3.0\]; allowed are floats in"),
        (tiff(np.full((4, 6), np.nan, np.float32), "minisblack"), "holds floats in"),
        (tiff(np.zeros((4, 6), np.uint16), "cfa"), r"raw data of a camera \(color filter array\); convert it to TIFF"),
        (tiff(np.zeros((4, 6, 3), np.uint16), 34892), r"raw data of a camera \(linear raw\)"),
        (tiff16(np.zeros((4, 6, 3), int), 8), "holds CIELAB pixels; save it as gray, RGB or CMYK"),
        (tiff16(np.zeros((4, 6, 4), int), 5, t332=2), "holds SEPARATED pixels; save it as"),
        (tiff16(np.zeros((4, 6, 3), int), t258=(5, 6, 5)), "channels of different depths"),
        (tiff16(GRAY, 1, t278=2), "strips or tiles of the image are truncated or missing"),
        (tiff16(GRAY, 1, t279=10000), "strips or tiles of the image are truncated or missing"),
        (tiff16(GRAY, 1)[:-9], "strips or tiles of the image are truncated or missing"),
        (tiff16(GRAY, 1, t256=0), r"the image has no pixels \(0x4\)"),
        (tiff16(GRAY, 1, t256=90000, t257=90000), "exceeds limit of"),
        (tiff16(GRAY, 1, t322=65520, t323=65520, t324=0, t325=48), "tiles of 65520x65520 pixels for 6x4"),
        (tiff16(GRAY, 1, t259=1234), "damaged, or of a layout that is not supported"),
        (
            tiff(LARGE, compression="jpeg").replace(*[struct.pack("<HHII", 256, 4, 1, w) for w in (90, 9000)]),
            "damaged, or of a layout that is not supported: corrupted strip",
        ),
        (b"II*\0" + bytes(20), "is damaged: it has no pages"),
        (b"II*\0\x08\0\0\0" + bytes(2), "the image has no pixels"),
        (b"II+\0\x08\0\0\0" + struct.pack("<Q", 1 << 60), "is damaged: it has no pages"),
    ],
)
def test_refused_files(tmp_path, data, message):
    with pytest.raises(ImageError, match=message) as caught:
        decode(data, tmp_path)
    assert str(caught.value).startswith(f"{tmp_path}/a.tif")
    assert "\n" not in str(caught.value)
