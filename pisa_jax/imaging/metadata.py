"""Metadata of image files: reading it, and what each format can hold of it."""

import re
from collections.abc import Iterable
from typing import NamedTuple

from PIL import Image

from pisa_jax.imaging import exif, tiff_tags
from pisa_jax.imaging.image_data import NO_METADATA, Metadata
from pisa_jax.imaging.png_chunks import Png
from pisa_jax.imaging.tiff_tags import Tags, Value

XMP, IPTC = 700, 33723  # tags of TIFF
_PHOTOSHOP_IPTC = 0x0404  # image resource
_XMP_ORIENTATION = re.compile(rb"(tiff:Orientation(?:\s*=\s*[\"']|>))[1-8]")
_EXTENDED_XMP = b"http://ns.adobe.com/xmp/extension/\0"
_SEGMENT = 65533  # largest content of a JPEG segment
_XMP_HEAD, _PHOTOSHOP_HEAD = 29, 30  # what precedes the data in its segment

# Fields of `Metadata`, in words.
_NAMES = {"xmp": "XMP", "iptc": "IPTC", "comment": "comment", "dpi": "resolution", "text": "PNG text"}
_HELD = {
    "png": {"xmp", "comment", "dpi", "text"},
    "jpeg": {"xmp", "iptc", "comment", "dpi"},
    "webp": {"xmp"},
    "tiff": {"xmp", "iptc", "dpi"},
}


class FileMetadata(NamedTuple):
    """Metadata of a source, and notes on what could not be read."""

    exif: bytes | None
    other: Metadata
    notes: tuple[str, ...]


def of_tiff(tags: Tags) -> FileMetadata:
    """Metadata in the tags of a TIFF file, for an upright image."""
    xmp, iptc = (value.data if isinstance(value := tags.directory.get(tag), Value) else None for tag in (XMP, IPTC))
    notes = () if tags.complete else (exif.DAMAGED,)
    return FileMetadata(exif.upright_block(tags), Metadata(xmp=_upright_xmp(xmp), iptc=iptc), notes)


def of_image(image: Image.Image, data: bytes, png: Png | None) -> FileMetadata:
    """Metadata of a loaded Pillow image, for an upright image; `data` is the content of its file, or b""."""
    block, notes = _exif(image)
    info = image.info
    xmp = _as_bytes(info.get("xmp") or info.get("XML:com.adobe.xmp"))
    comment = _as_bytes(info.get("comment")) if image.format in ("JPEG", "MPO", "GIF", "JPEG2000") else None
    photoshop = info.get("photoshop")
    iptc = photoshop.get(_PHOTOSHOP_IPTC) if isinstance(photoshop, dict) else None
    if _EXTENDED_XMP in data and image.format in ("JPEG", "MPO"):
        notes += ("the extended part of the XMP was dropped",)
    text = png.text if png else ()
    return FileMetadata(block, Metadata(_upright_xmp(xmp), iptc, comment, _resolution(image), text), notes)


def _exif(image: Image.Image) -> tuple[bytes | None, tuple[str, ...]]:
    try:
        block = image.info.get("exif") or image.getexif().tobytes()
        tags = exif.parse(block)
        return exif.upright_block(tags), () if tags.complete else (exif.DAMAGED,)
    except Exception:  # Pillow's parser raises arbitrary exceptions on damaged data
        return None, (exif.DAMAGED,)


def _upright_xmp(xmp: bytes | None) -> bytes | None:
    return _XMP_ORIENTATION.sub(rb"\g<1>1", xmp) if xmp else None


def _as_bytes(value: str | bytes | None) -> bytes | None:
    return value.encode() if isinstance(value, str) else value or None


def _resolution(image: Image.Image) -> tuple[float, float] | None:
    """Pixels per inch, where the file has them; Pillow invents 72 for JPEG files that have none."""
    if image.format in ("JPEG", "MPO") and image.info.get("jfif_unit") not in (1, 2):
        return None
    try:
        x, y = (float(number) for number in image.info.get("dpi", ()))
    except (TypeError, ValueError):
        return None
    return (x, y) if 0 < x < 1e6 and 0 < y < 1e6 else None


def adapt(metadata: Metadata, kind: str) -> tuple[Metadata, tuple[str, ...]]:
    """Reduce metadata to what the format `kind` can hold; also return a note on what was dropped."""
    lost = [field for field in _NAMES if getattr(metadata, field) and field not in _HELD[kind]]
    if kind == "jpeg":
        lost += [field for field, size in _jpeg_sizes(metadata) if size > _SEGMENT]
    if not lost:
        return metadata, ()
    note = f"dropped, because {kind} cannot hold it: {', '.join(_NAMES[field] for field in lost)}"
    return metadata._replace(**{field: getattr(NO_METADATA, field) for field in lost}), (note,)


def _jpeg_sizes(metadata: Metadata) -> Iterable[tuple[str, int]]:
    yield "xmp", len(metadata.xmp or b"") + _XMP_HEAD
    yield "iptc", len(metadata.iptc or b"") + _PHOTOSHOP_HEAD
    yield "comment", len(metadata.comment or b"")


def photoshop_segment(iptc: bytes) -> bytes:
    """Encode IPTC data as the APP13 segment of a JPEG file."""
    resource = b"8BIM" + _PHOTOSHOP_IPTC.to_bytes(2, "big") + bytes(2) + len(iptc).to_bytes(4, "big") + iptc
    content = b"Photoshop 3.0\0" + resource + bytes(len(iptc) % 2)
    return b"\xff\xed" + (len(content) + 2).to_bytes(2, "big") + content


def tiff_directory(metadata: Metadata) -> dict[int, Value]:
    """Encode XMP, IPTC and the resolution as little-endian tags of a TIFF file."""
    values = {XMP: (tiff_tags.BYTE, metadata.xmp), IPTC: (tiff_tags.UNDEFINED, metadata.iptc)}
    directory = {tag: Value(kind, data) for tag, (kind, data) in values.items() if data}
    if metadata.dpi:
        for tag, number in zip((282, 283), metadata.dpi, strict=True):
            directory[tag] = tiff_tags.rational(number)
        directory[296] = tiff_tags.integers(tiff_tags.SHORT, 2)  # the unit of both is the inch
    return directory
