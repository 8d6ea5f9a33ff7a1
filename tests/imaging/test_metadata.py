"""Metadata of files: every field survives in every format that can hold it, and a note names what is dropped."""

import dataclasses
import io
import re
import struct

import numpy as np
import pytest
import tifffile
from PIL import Image
from raw_files import DISPLAY_P3, SRGB_CURVE, rgb_profile, tiff16

from pisa_jax.imaging import exif, metadata, tiff_tags
from pisa_jax.imaging.image_data import ImageData, Metadata, from_array
from pisa_jax.imaging.image_reading import read_image
from pisa_jax.imaging.image_writing import write_image
from pisa_jax.imaging.network_input import finish_output, prepare_input
from pisa_jax.imaging.tiff_tags import EXIF_DIRECTORY, GPS_DIRECTORY, INTEROP_DIRECTORY, Value

PIXELS = np.arange(5 * 7 * 3, dtype=np.uint8).reshape(5, 7, 3)
XMP = (
    b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="1" dc:title="Troms\xc3\xb8"/></x:xmpmeta>'
)
IPTC = b"\x1c\x02\x50\x00\x09\xc3\x85lesund!"
TAGS = {
    270: Value(2, "Møte på Tromsø – 東京\0".encode()),
    315: Value(2, b"latin-1: \xc5lesund\0"),
    282: Value(5, struct.pack(">II", 300, 1)),
    283: Value(5, struct.pack(">II", 240, 1)),
    296: Value(3, struct.pack(">H", 2)),
    40091: Value(1, "Tittel æøå\0".encode("utf-16-le")),
    EXIF_DIRECTORY: {
        33434: Value(5, struct.pack(">II", 1, 250)),
        36867: Value(2, b"2024:02:29 11:22:33\0"),
        37386: Value(5, struct.pack(">II", 50, 1)),
        37500: Value(7, b"Maker note" + bytes(range(256)), 200),
        37510: Value(7, b"UNICODE\0" + "Ålesund".encode("utf-16-be")),
        INTEROP_DIRECTORY: {1: Value(2, b"R98\0")},
    },
    GPS_DIRECTORY: {
        1: Value(2, b"N\0"),
        2: Value(5, struct.pack(">6I", 47, 1, 11, 1, 7, 2)),
    },
}
EXIF = exif.PREFIX + tiff_tags.serialize(TAGS, ">")
EVERYTHING = Metadata(XMP, IPTC, b"comment: \xc5", (300.0, 240.0), ((b"tEXt", b"Author\0name"),))
PROFILE = rgb_profile(DISPLAY_P3, SRGB_CURVE)
# format -> fields of `Metadata` that it holds
HELD = {
    ".png": {"xmp", "comment", "dpi", "text"},
    ".jpg": {"xmp", "iptc", "comment", "dpi"},
    ".webp": {"xmp"},
    ".tif": {"xmp", "iptc", "dpi"},
}


def make_image(**changes):
    return dataclasses.replace(from_array(PIXELS), exif=EXIF, icc=PROFILE, metadata=EVERYTHING, **changes)


def values(directory):
    """Tags with their bytes, without offsets."""
    return {tag: values(value) if isinstance(value, dict) else value[:2] for tag, value in directory.items()}


@pytest.mark.parametrize("suffix", HELD)
@pytest.mark.parametrize("bits", [8, 16])
def test_every_field_survives_or_is_named(tmp_path, suffix, bits):
    notes = write_image(tmp_path / f"a{suffix}", make_image(bits=bits))
    image = read_image(tmp_path / f"a{suffix}")
    assert image.icc == PROFILE
    expected = {field: getattr(EVERYTHING, field) for field in HELD[suffix]}
    if suffix == ".png":  # in which a comment is a text
        comment = expected.pop("comment")
        expected["text"] = ((b"tEXt", b"Comment\0" + comment), *expected["text"])
    for field in Metadata._fields:
        found = getattr(image.metadata, field)
        if field == "dpi" and found:
            np.testing.assert_allclose(found, (300, 240), atol=0.02)
        elif field in expected:
            assert found == expected[field], field
    lost = {"iptc": "IPTC", "comment": "comment", "dpi": "resolution", "text": "PNG text", "xmp": "XMP"}
    dropped = [name for field, name in lost.items() if field not in HELD[suffix]]
    note = "".join(note for note in notes if note.startswith("dropped"))
    assert all(name in note for name in dropped)
    assert not any(name in note for name in lost.values() if name not in dropped)


@pytest.mark.parametrize("suffix", HELD)
def test_all_directories_of_exif_survive_byte_for_byte(tmp_path, suffix):
    image = make_image()
    for count in range(2):  # a second pass changes nothing
        write_image(tmp_path / f"{count}{suffix}", image)
        image = read_image(tmp_path / f"{count}{suffix}")
        found = exif.parse(image.exif)
        assert found.complete
        expected = TAGS if found.order == ">" else tiff_tags.little_endian(tiff_tags.Tags(">", TAGS))
        assert values(found.directory) == values(expected)
    with Image.open(tmp_path / f"0{suffix}") as opened:  # an independent reader
        other = opened.getexif()
        assert other.get_ifd(EXIF_DIRECTORY)[36867] == "2024:02:29 11:22:33"
        assert [float(number) for number in other.get_ifd(GPS_DIRECTORY)[2]] == [47, 11, 3.5]


def test_maker_notes_stay_at_their_offset():
    """Their own offsets count from the start of the block."""
    block = tiff_tags.serialize(TAGS, ">")
    note = tiff_tags.parse(block).directory[EXIF_DIRECTORY][37500]
    assert note.offset == 200
    assert block[200:].startswith(b"Maker note")


def test_exif_of_the_result_describes_the_result():
    directory = {
        256: tiff_tags.integers(tiff_tags.LONG, 7),
        274: tiff_tags.integers(tiff_tags.SHORT, 6),
        33550: Value(12, bytes(24)),
        EXIF_DIRECTORY: {40962: tiff_tags.integers(tiff_tags.LONG, 7), 40963: tiff_tags.integers(tiff_tags.SHORT, 5)},
    }
    block = exif.upright_block(tiff_tags.parse(tiff_tags.serialize(directory)))
    found = exif.parse(exif.with_size(block, 20, 28))
    assert found.directory.keys() == {274, EXIF_DIRECTORY}  # no layout of the old file, no georeference per pixel
    assert tiff_tags.number(found.directory[274], "<", 0) == 1
    details = found.directory[EXIF_DIRECTORY]
    assert [tiff_tags.number(details[tag], "<", 0) for tag in (40962, 40963)] == [28, 20]


def test_damaged_exif_is_kept_as_far_as_it_is_sound(tmp_path):
    write_image(tmp_path / "a.jpg", make_image())
    data = (tmp_path / "a.jpg").read_bytes()
    broken = data.replace(struct.pack(">HHI", 270, 2, len(TAGS[270].data)), struct.pack(">HHI", 270, 2, 1 << 31))
    assert broken != data
    (tmp_path / "b.jpg").write_bytes(broken)
    image = read_image(tmp_path / "b.jpg")
    assert image.notes == ("the EXIF data is damaged; what could not be read was dropped",)
    found = exif.parse(image.exif).directory
    assert values(found).keys() == TAGS.keys() - {270}
    np.testing.assert_array_equal(image.rgb, read_image(tmp_path / "a.jpg").rgb)


@pytest.mark.parametrize("kind", ["itself", "deep"])
def test_directories_in_circles(kind):
    entry = struct.pack("<HHHII", 1, EXIF_DIRECTORY if kind == "itself" else INTEROP_DIRECTORY, 4, 1, 8) + bytes(4)
    tags = tiff_tags.parse(b"II*\0\x08\0\0\0" + entry)
    assert len(tiff_tags.serialize(tags.directory)) < 200


def test_resolution_of_a_tiff_in_centimeters(tmp_path):
    file = io.BytesIO()
    tifffile.imwrite(file, PIXELS, photometric="rgb", resolution=(100, 50), resolutionunit="CENTIMETER", metadata=None)
    (tmp_path / "a.tif").write_bytes(file.getvalue())
    image = read_image(tmp_path / "a.tif")
    np.testing.assert_allclose(image.metadata.dpi, (254, 127))
    for suffix in (".png", ".jpg"):
        write_image(tmp_path / f"b{suffix}", image)
        with Image.open(tmp_path / f"b{suffix}") as opened:
            np.testing.assert_allclose(opened.info["dpi"], (254, 127), atol=0.02)


def test_tags_of_a_tiff_that_are_dropped_are_named(tmp_path):
    tags = {"t33550": (1.0, 1.0, 0.0), "t37724": b"layers", "t50706": b"\1\4\0\0"}
    (tmp_path / "a.tif").write_bytes(tiff16(np.zeros((2, 3, 3), int), **tags))
    assert read_image(tmp_path / "a.tif").notes == ("dropped TIFF tags: 33550, 37724, 50706 (DNGVersion)",)


@pytest.mark.parametrize("program", [{"imagej": True}, {"ome": True}, {}])
def test_descriptions_of_the_layout_are_dropped(tmp_path, program):
    """Otherwise readers would look for the old file's images in the new one."""
    tifffile.imwrite(tmp_path / "a.tif", PIXELS, photometric="rgb", **program)
    image = read_image(tmp_path / "a.tif")
    assert "the description was dropped" in " ".join(image.notes)
    array, plan = prepare_input(image, 2, 0)
    write_image(tmp_path / "b.tif", finish_output(array, plan, image))
    assert tifffile.imread(tmp_path / "b.tif").shape == (10, 14, 3)
    tifffile.imwrite(tmp_path / "c.tif", PIXELS, photometric="rgb", metadata=None, description="a description")
    assert b"a description" in read_image(tmp_path / "c.tif").exif


def jpeg(**options):
    file = io.BytesIO()
    Image.fromarray(PIXELS).save(file, "JPEG", **options)
    return file.getvalue()


def segment(marker, content):
    return bytes([0xFF, marker]) + (len(content) + 2).to_bytes(2, "big") + content


@pytest.mark.parametrize(
    ("data", "note"),
    [
        (segment(0xEB, b"JP\0\1content credentials"), "dropped JPEG segments: APP11"),
        (
            segment(0xE1, b"http://ns.adobe.com/xmp/extension/\0" + bytes(40)),
            "the extended part of the XMP was dropped",
        ),
        (segment(0xEC, b"Ducky\0\1\0\4\0\0\0\x3c\0\0"), None),
    ],
)
def test_segments_of_a_jpeg_that_are_dropped_are_named(tmp_path, data, note):
    (tmp_path / "a.jpg").write_bytes(jpeg()[:2] + data + jpeg()[2:])
    assert read_image(tmp_path / "a.jpg").notes == ((note,) if note else ())


@pytest.mark.parametrize("text", [b'hdrgm:Version="1.0"', b"<Container:Directory>"])
def test_xmp_of_images_and_videos_inside_the_source_is_dropped(tmp_path, text):
    (tmp_path / "a.jpg").write_bytes(jpeg(xmp=XMP + text))
    image = read_image(tmp_path / "a.jpg")
    assert image.metadata.xmp is None
    assert re.search("describes a gain map or a video", image.notes[0])


def test_xmp_of_an_upright_result_has_orientation_1(tmp_path):
    for text in (b'tiff:Orientation="6"', b"<tiff:Orientation>6</tiff:Orientation>", b"tiff:Orientation = '6'"):
        (tmp_path / "a.jpg").write_bytes(jpeg(xmp=XMP.replace(b'tiff:Orientation="1"', text)))
        assert read_image(tmp_path / "a.jpg").metadata.xmp == XMP.replace(
            b'tiff:Orientation="1"', text.replace(b"6", b"1")
        )


def test_xmp_of_the_result_has_its_size():
    packet = b"<a tiff:ImageWidth='7' exif:PixelYDimension = \"5\"><tiff:ImageLength>5</tiff:ImageLength></a>"
    image = dataclasses.replace(from_array(PIXELS), metadata=Metadata(packet))
    array, plan = prepare_input(image, 4, 0)
    result = finish_output(array, plan, image)
    assert result.metadata.xmp == packet.replace(b"7", b"28").replace(b"5", b"20")


def test_metadata_too_long_for_a_jpeg_is_dropped_with_a_note():
    long = Metadata(xmp=bytes(65505), iptc=bytes(65504), comment=bytes(65534))
    kept, notes = metadata.adapt(long, "jpeg")
    assert kept == Metadata()
    assert notes == ("dropped, because jpeg cannot hold it: XMP, IPTC, comment",)
    longest = Metadata(xmp=bytes(65504), iptc=bytes(65503), comment=bytes(65533))
    assert metadata.adapt(longest, "jpeg") == (longest, ())


def test_jpeg_without_a_resolution_gets_none(tmp_path):
    (tmp_path / "a.jpg").write_bytes(jpeg())
    assert read_image(tmp_path / "a.jpg").metadata == Metadata()
    write_image(tmp_path / "b.png", ImageData(np.zeros((2, 2, 3), np.float32)))
    assert b"pHYs" not in (tmp_path / "b.png").read_bytes()
