"""Metadata of image files: reading it, and what each format can hold of it."""

from collections.abc import Iterable
from typing import NamedTuple

from PIL import ExifTags, Image

from pisa_jax.imaging import exif, tiff_tags, xmp
from pisa_jax.imaging.image_data import NO_METADATA, Metadata
from pisa_jax.imaging.png_chunks import Png
from pisa_jax.imaging.tiff_tags import Tags, Value

XMP, IPTC = 700, 33723  # tags of TIFF
_DESCRIPTION, _RESOLUTION, _RESOLUTION_UNIT = 270, (282, 283), 296
_PHOTOSHOP_IPTC = 0x0404  # image resource
_EXTENDED_XMP = b"http://ns.adobe.com/xmp/extension/\0"
# Tags of a TIFF that describe how its pixels and pages are stored, as ranges, and its profile.
_LAYOUT_RANGES = ((254, 266), (273, 274), (277, 281), (284, 301), (317, 347), (512, 532), (559, 559), (34675, 34675))
_LAYOUT = {tag for first, last in _LAYOUT_RANGES for tag in range(first, last + 1)}
# Segments of a JPEG that are read, or that describe how its pixels are stored.
_KNOWN_SEGMENTS = {"APP0", "APP1", "APP2", "APP13", "APP14", "COM"}
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
    packet, iptc = (value.data if isinstance(value := tags.directory.get(tag), Value) else None for tag in (XMP, IPTC))
    packet, notes = _upright_xmp(packet)
    if not tags.complete:
        notes += (exif.DAMAGED,)
    description = tags.directory.get(_DESCRIPTION)
    if isinstance(description, Value) and _describes_layout(description.data):
        tags = tags._replace(directory={tag: value for tag, value in tags.directory.items() if tag != _DESCRIPTION})
        notes += ("the description was dropped: a program wrote the layout of the old file there",)
    if lost := sorted(tags.directory.keys() - exif.KEPT - _LAYOUT - {XMP, IPTC}):
        names = [f"{tag} ({ExifTags.TAGS[tag]})" if tag in ExifTags.TAGS else str(tag) for tag in lost]
        notes += (f"dropped TIFF tags: {', '.join(names)}",)
    return FileMetadata(exif.upright_block(tags), Metadata(packet, iptc, dpi=_resolution_of_tags(tags)), notes)


def _describes_layout(description: bytes) -> bool:
    """Return True for descriptions of ImageJ, tifffile and OME, by which programs read further images of a file."""
    return description.startswith((b"ImageJ=", b'{"shape"')) or b"<OME " in description[:4096]


def of_image(image: Image.Image, data: bytes, png: Png | None) -> FileMetadata:
    """Metadata of a loaded Pillow image, for an upright image; `data` is the content of its file, or b""."""
    info, (block, notes) = image.info, _exif(image)
    packet, xmp_notes = _upright_xmp(_as_bytes(info.get("xmp") or info.get("XML:com.adobe.xmp")))
    comment = _as_bytes(info.get("comment")) if image.format in ("JPEG", "MPO", "GIF", "JPEG2000") else None
    photoshop = info.get("photoshop")
    iptc = photoshop.get(_PHOTOSHOP_IPTC) if isinstance(photoshop, dict) else None
    other = Metadata(packet, iptc, comment, _resolution(image), png.text if png else ())
    return FileMetadata(block, other, notes + xmp_notes + _unread(image, data))


def _exif(image: Image.Image) -> tuple[bytes | None, tuple[str, ...]]:
    try:
        block = image.info.get("exif") or image.getexif().tobytes()
        tags = exif.parse(block)
        return exif.upright_block(tags), () if tags.complete else (exif.DAMAGED,)
    except Exception:  # Pillow's parser raises arbitrary exceptions on damaged data
        return None, (exif.DAMAGED,)


def _unread(image: Image.Image, data: bytes) -> tuple[str, ...]:
    """Notes on metadata of a file that Pillow does not decode."""
    notes = []
    if image.format in ("JPEG", "MPO"):
        segments = getattr(image, "applist", ())
        unknown = sorted({name for name, content in segments if not content.startswith(b"Ducky")} - _KNOWN_SEGMENTS)
        notes += [f"dropped JPEG segments: {', '.join(unknown)}"] if unknown else []
        notes += ["the extended part of the XMP was dropped"] if _EXTENDED_XMP in data else []
    elif image.format == "HEIF" and any(image.info.get(name) for name in ("aux", "depth_images")):
        notes.append("auxiliary images, such as a depth or gain map, were dropped")
    elif image.format == "JPEG2000" and b"uuid" in data[: data.find(b"jp2c")]:
        notes.append("the metadata in boxes of JPEG 2000 was dropped")
    return tuple(notes)


def _upright_xmp(packet: bytes | None) -> tuple[bytes | None, tuple[str, ...]]:
    if packet and xmp.describes_other_files(packet):
        return None, ("the XMP was dropped: it describes a gain map or a video inside the source",)
    return xmp.upright(packet) if packet else None, ()


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


def _resolution_of_tags(tags: Tags) -> tuple[float, float] | None:
    """Pixels per inch in the tags XResolution and YResolution."""
    per_inch = {2: 1.0, 3: 2.54}.get(tiff_tags.number(tags.directory.get(_RESOLUTION_UNIT), tags.order, 2))
    sides = [tiff_tags.fraction(tags.directory.get(tag), tags.order) for tag in _RESOLUTION]
    if not per_inch or not all(side and 0 < side < 1e6 for side in sides):
        return None
    return sides[0] * per_inch, sides[1] * per_inch


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
        for tag, number in zip(_RESOLUTION, metadata.dpi, strict=True):
            directory[tag] = tiff_tags.rational(number)
        directory[_RESOLUTION_UNIT] = tiff_tags.integers(tiff_tags.SHORT, 2)  # the unit of both is the inch
    return directory
