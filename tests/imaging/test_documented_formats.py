"""The tables of docs/inference.md on inputs and results: every row is tried with a file."""

import dataclasses
import io
import re
import struct
import zlib

import imagecodecs
import numpy as np
import pytest
import tifffile
from conftest import ROOT
from PIL import Image
from raw_files import DISPLAY_P3, SRGB_CURVE, chunk, lut_profile, png, rgb_profile, tiff16

from pisa_jax.imaging.image_data import ImageData, ImageError, Metadata, from_array
from pisa_jax.imaging.image_reading import read_image
from pisa_jax.imaging.image_writing import write_image

TEXT = (ROOT / "docs" / "inference.md").read_text(encoding="utf-8")
COLOR = np.random.default_rng(0).integers(0, 256, (8, 9, 3)).astype(np.uint8)
DEEP = COLOR.astype(np.uint16) * 257
P3 = rgb_profile(DISPLAY_P3, SRGB_CURVE)


def rows(head):
    """Rows of the table whose head begins with `head`, without the head, as lists of cells."""
    [body] = re.findall(rf"^\| {head} \|.*\n\|[-|]+\n((?:\|.*\n)+)", TEXT, re.MULTILINE)
    return [[cell.strip() for cell in line.strip("|\n").split("|")] for line in body.splitlines()]


def pillow(kind, samples=COLOR, mode=None, **options):
    file = io.BytesIO()
    image = Image.fromarray(samples)
    (image.convert(mode) if mode else image).save(file, kind, **options)
    return file.getvalue()


def tiff(samples, photometric="rgb", **options):
    file = io.BytesIO()
    tifffile.imwrite(file, samples, photometric=photometric, metadata=None, **options)
    return file.getvalue()


def pages(*images):
    file = io.BytesIO()
    with tifffile.TiffWriter(file) as writer:
        for samples, kind in images:
            writer.write(samples, photometric="rgb", subfiletype=kind, metadata=None)
    return file.getvalue()


def jpeg_with(marker, content):
    data = pillow("JPEG")
    return data[:2] + bytes([0xFF, marker]) + (len(content) + 2).to_bytes(2, "big") + content + data[2:]


def exif_block():
    exif = Image.Exif()
    exif[270], exif[274], exif[256] = "description", 6, 9
    return exif.tobytes()


def avif_with(primaries, transfer):
    data = pillow("AVIF")
    place = data.index(b"colrnclx") + 8
    return data[:place] + struct.pack(">HH", primaries, transfer) + data[place + 4 :]


def damaged_exif():
    block = exif_block()
    assert block.count(struct.pack(">HHI", 270, 2, 12)) == 1
    return pillow("JPEG", exif=block.replace(struct.pack(">HHI", 270, 2, 12), struct.pack(">HHI", 270, 2, 99999)))


def metadata_of_jpeg_2000():
    data = pillow("JPEG2000")
    place = data.index(b"jp2c") - 4
    return data[:place] + struct.pack(">I", 40) + b"uuid" + bytes(32) + data[place:]


def iptc_of(image):
    return image.metadata.iptc


WHOLE_METADATA = Metadata(b"<x/>", b"\x1c\x02\x50\x00\x01a", b"comment", (300.0, 300.0))


def jpeg_with_metadata(tmp_path):
    write_image(tmp_path / "source.jpg", dataclasses.replace(from_array(COLOR), metadata=WHOLE_METADATA))
    return (tmp_path / "source.jpg").read_bytes()


def rgb_with_alpha():
    return np.concatenate([COLOR, COLOR[..., :1]], -1)


# beginning of a row -> files, and what is true of the image that is read if the row says "kept"
INPUTS = {
    "16 bits per channel": (
        [
            png(DEEP, 2),
            tiff(DEEP),
            *(imagecodecs.avif_encode(DEEP >> (16 - bits), bitspersample=bits) for bits in (10, 12)),
            tiff16(DEEP),
            imagecodecs.jpeg_encode(DEEP >> 4, bitspersample=12),
            imagecodecs.jpeg2k_encode(DEEP),
        ],
        lambda image: image.bits == 16,
    ),
    "more than 8 bits in color": (
        [b"P6 9 8 65535\n" + DEEP.astype(">u2").tobytes()],
        lambda image: image.bits == 8,
    ),
    "floats in": ([tiff(COLOR.astype(np.float32) / 255)], lambda image: image.bits == 16),
    "integers of 32 bits": ([tiff(DEEP.astype(np.uint32)), tiff(DEEP.astype(np.float32))], None),
    "gray, bilevel": ([pillow("PNG", mode="L"), pillow("PNG", mode="1")], lambda image: image.gray),
    "palette": (
        [pillow("PNG", mode="P"), pillow("TIFF", mode="P"), pillow("GIF", mode="P")],
        lambda image: not image.gray,
    ),
    "CMYK": ([pillow("JPEG", mode="CMYK"), pillow("TIFF", mode="CMYK")], lambda image: image.icc is None),
    "Lab": ([tiff16(DEEP, 8), tiff16(np.concatenate([DEEP, DEEP], -1)[..., :4], 5, t332=2)], None),
    "raw data": ([tiff(DEEP[..., 0], "cfa")], None),
    "HDR": ([png(COLOR, 2, chunk(b"cICP", bytes([9, 16, 0, 1]))), avif_with(9, 18)], None),
    "ICC profile of curves": (
        [pillow(kind, icc_profile=P3) for kind in ("PNG", "JPEG", "WEBP", "TIFF", "AVIF")],
        lambda image: image.icc == P3,
    ),
    "color space in chunks": (
        [
            png(COLOR, 2, chunk(b"cICP", bytes([12, 13, 0, 1]))),
            png(COLOR, 2, chunk(b"gAMA", struct.pack(">I", 100000))),
            avif_with(12, 13),
        ],
        lambda image: image.icc,
    ),
    "ICC profile of tables": (
        [pillow("PNG", icc_profile=lut_profile(b"RGB ", 3, lambda r, g, b: (100 - 40 * b, 60 * b, 0)))],
        lambda image: image.icc is None and image.bits == 8,
    ),
    "damaged ICC profile": ([pillow("PNG", icc_profile=P3[:150])], lambda image: image.icc is None),
    "alpha channel": (
        [pillow(kind, rgb_with_alpha()) for kind in ("PNG", "WEBP", "TIFF", "AVIF")]
        + [png(COLOR, 2, chunk(b"tRNS", bytes(6)))],
        lambda image: image.alpha is not None,
    ),
    "extra channels": (
        [tiff(rgb_with_alpha(), extrasamples=["unspecified"])],
        lambda image: image.alpha is None,
    ),
    "EXIF": (
        [pillow(kind, exif=exif_block()) for kind in ("PNG", "JPEG", "WEBP", "TIFF", "AVIF")],
        lambda image: b"description" in image.exif and image.rgb.shape == (9, 8, 3),
    ),
    "damaged parts": ([damaged_exif()], lambda image: b"description" not in image.exif),
    "XMP, IPTC": ([jpeg_with_metadata], lambda image: image.metadata == WHOLE_METADATA),
    "XMP that describes": ([pillow("JPEG", xmp=b"hdrgm:Version")], lambda image: image.metadata.xmp is None),
    "extended XMP": (
        [jpeg_with(0xEB, b"JP"), jpeg_with(0xE1, b"http://ns.adobe.com/xmp/extension/\0")],
        lambda image: image.metadata.xmp is None,
    ),
    "text chunks": (
        [png(COLOR, 2, chunk(b"tEXt", b"Author\0name"))],
        lambda image: image.metadata.text == ((b"tEXt", b"Author\0name"),),
    ),
    "text of a PNG over": (
        [
            png(COLOR, 2, chunk(b"zTXt", b"Author\0\0" + zlib.compress(bytes(1 << 21)))),
            png(COLOR, 2, chunk(b"tEXt", b"Author\0name")[:-1] + b"?"),
        ],
        lambda image: image.metadata.text == (),
    ),
    "tags of a TIFF": ([tiff16(DEEP, t33550=(1.0, 1.0, 0.0))], lambda image: image.exif is None),
    "metadata in boxes": ([metadata_of_jpeg_2000()], lambda image: image.metadata == Metadata()),
    "frames, pages": (
        [
            pages((COLOR, 0), (COLOR, 0)),
            pillow("GIF", save_all=True, append_images=[Image.fromarray(255 - COLOR)]),
            pillow("ICO", np.zeros((32, 32, 4), np.uint8), sizes=[(16, 16), (32, 32)]),
        ],
        lambda image: image.rgb.shape[1] in (9, 32),
    ),
    "TIFF with a thumbnail": ([pages((COLOR[:3, :3], 1), (COLOR, 0))], lambda image: image.rgb.shape == (8, 9, 3)),
    "TIFF of previews": ([pages((COLOR, 1))], lambda image: image.rgb.shape == (8, 9, 3)),
    "damaged or truncated": ([pillow("JPEG")[:300], png(DEEP, 2)[:-30], tiff(DEEP)[:-9]], None),
}


def test_all_inputs_of_the_table_are_tried():
    for row, _ in rows("input"):
        assert sum(row.startswith(start) for start in INPUTS) == 1, row
    assert len(rows("input")) == len(INPUTS)


@pytest.mark.parametrize(("row", "result"), rows("input"), ids=lambda text: text[:24])
def test_inputs(tmp_path, row, result):
    [(files, check)] = [value for start, value in INPUTS.items() if row.startswith(start)]
    outcome = re.match(r"kept|converted|dropped|refused", result).group()
    for data in files:
        (tmp_path / "a").write_bytes(data(tmp_path) if callable(data) else data)
        if outcome == "refused":
            with pytest.raises(ImageError):
                read_image(tmp_path / "a")
            continue
        image = read_image(tmp_path / "a")
        assert check(image)
        if "with a message" in result:
            assert image.notes
        else:
            assert image.notes == ()


RESULTS = {
    "16 bits": ({"bits": 16}, lambda image: image.bits == 16),
    "gray": ({"gray": True, "rgb": np.full((8, 9, 3), 0.5, np.float32)}, lambda image: image.gray),
    "alpha": ({"alpha": np.full((8, 9), 0.5, np.float32)}, lambda image: image.alpha is not None),
    "ICC profile": ({"icc": P3}, lambda image: image.icc == P3),
    "EXIF": ({"exif": exif_block()}, lambda image: image.exif),
    "XMP": ({"metadata": Metadata(xmp=b"<x/>")}, lambda image: image.metadata.xmp == b"<x/>"),
    "IPTC": ({"metadata": WHOLE_METADATA._replace(xmp=None, comment=None, dpi=None)}, iptc_of),
    "resolution": ({"metadata": Metadata(dpi=(300.0, 300.0))}, lambda image: image.metadata.dpi),
    "comment": (
        {"metadata": Metadata(comment=b"comment")},
        lambda image: image.metadata.comment or image.metadata.text,
    ),
    "PNG text": ({"metadata": Metadata(text=((b"tEXt", b"Author\0name"),))}, lambda image: image.metadata.text),
}


@pytest.mark.parametrize("row", rows("content"), ids=lambda row: row[0])
def test_results(tmp_path, row):
    assert len(rows("content")) == len(RESULTS)
    content, *outcomes = row
    changes, check = RESULTS[content]
    source = ImageData(**({"rgb": COLOR.astype(np.float32) / 255} | changes))
    for suffix, outcome in zip((".png", ".jpg", ".webp", ".tif"), outcomes, strict=True):
        notes = write_image(tmp_path / f"a{suffix}", source)
        assert bool(check(read_image(tmp_path / f"a{suffix}"))) == (outcome == "kept"), suffix
        assert bool(notes) == (outcome != "kept" and content != "gray"), notes
