"""Pixels and metadata of the content of an image file."""

import contextlib
import io
import struct
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from PIL import Image
from PIL.ExifTags import Base

from pisa_jax.imaging import decode_deep, metadata, png_chunks
from pisa_jax.imaging.decode_tiff import decode_tiff, is_tiff
from pisa_jax.imaging.image_data import ImageError
from pisa_jax.imaging.image_files import readable_formats
from pisa_jax.imaging.metadata import FileMetadata
from pisa_jax.imaging.pixels import Channels, Pixels, Values, inks_to_srgb, pillow_channels, to_srgb
from pisa_jax.imaging.png_chunks import Png


class Decoded(NamedTuple):
    """Content of an image file, or of a Pillow image."""

    pixels: Pixels
    metadata: FileMetadata
    # Pillow's name of the format, in lower case
    format: str
    # the file is a WebP without loss
    lossless: bool = False
    notes: tuple[str, ...] = ()


def decode_file(data: bytes) -> Decoded:
    """Decode the first frame, or the main page, of the content of an image file.

    Raises:
        ImageError: pixels without defined colors.
        Exception: of arbitrary type, if the file is damaged or of an unknown format.
    """
    if is_tiff(data):
        tiff = decode_tiff(data)
        return Decoded(tiff.pixels, metadata.of_tiff(tiff.tags), "tiff")
    if (precision := decode_deep.find_jpeg_precision(data)) is not None:
        return _decode_deep_jpeg(data, precision)
    png = png_chunks.parse(data) if data.startswith(png_chunks.SIGNATURE) else None
    data = png.data if png else data
    with Image.open(io.BytesIO(data), formats=readable_formats()) as image:
        return decode_image(image, data, png)


def _decode_deep_jpeg(data: bytes, precision: int) -> Decoded:
    """Decode a JPEG of 12 bits, whose header Pillow reads only with 8 at the offset `precision`."""
    header = data[:precision] + b"\x08" + data[precision + 1 :]
    with Image.open(io.BytesIO(header), formats=("JPEG",)) as image:
        pixels = to_srgb(decode_deep.jpeg_channels(data), image.info.get("icc_profile"))
        pixels = pixels._replace(orientation=_orientation(image))
        return Decoded(pixels, metadata.of_image(image, data, None), "jpeg")


def decode_image(image: Image.Image, data: bytes = b"", png: Png | None = None) -> Decoded:
    """Decode the first frame of an opened image; `data` is the content of its file, and `png` its chunks."""
    image.load()  # detects truncation
    if 0 in image.size:
        raise ImageError(f"the image has no pixels ({image.width}x{image.height})")
    notes, frames, image_format = (), getattr(image, "n_frames", 1), image.format or ""
    if frames > 1 and image_format != "MPO":  # in which phones put previews behind the photograph
        notes = (f"the file has {frames} frames or pages; only the first is used",)
    elif len(image.info.get("sizes", ())) > 1:
        notes = (f"the icon has {len(image.info['sizes'])} sizes; only the largest is used",)
    pixels = _decode_png(image, png) if png else _decode_other(image, data)
    return Decoded(
        pixels._replace(orientation=_orientation(image)),
        metadata.of_image(image, data, png),
        "jpeg" if image_format == "MPO" else image_format.lower(),
        lossless=image_format == "WEBP" and _is_lossless_webp(data),
        notes=notes + (png.notes if png else ()),
    )


def _orientation(image: Image.Image) -> int:
    """EXIF orientation that remains to be applied to a loaded image; 1 where the EXIF data is damaged.

    Pillow itself applies the orientation of a TIFF when it loads the pixels.
    """
    with contextlib.suppress(Exception):  # Pillow's parser raises arbitrary exceptions on damaged data
        return image.getexif().get(Base.Orientation, 1)
    return 1


def _decode_other(image: Image.Image, data: bytes) -> Pixels:
    profile = image.info.get("icc_profile")
    if image.mode == "CMYK":
        return inks_to_srgb(np.asarray(image), None, 8, profile)
    bits, notes = _depth(image, data), ()
    if bits > 8 and image.format == "AVIF":
        channels = decode_deep.avif_channels(data, bits)
    elif bits > 8 and image.format == "HEIF" and data:
        channels = decode_deep.heif_channels(data)
    else:
        channels = pillow_channels(image)
        if channels.bits == 16 and image.format == "TIFF":
            channels = channels._replace(values=_tiff_gray(channels.values, image.tag_v2))
        if bits > 8 and image.format == "JPEG2000":
            channels = decode_deep.jpeg2000_channels(data, bits, channels)
        if bits > channels.bits:
            notes = (f"reduced from {bits} to 8 bits per channel: the decoder of {image.format} has no more",)
    profile = profile or _profile_of_format(image, data, gray=channels.values.shape[-1] == 1)
    return to_srgb(channels, profile, notes)


def _tiff_gray(values: Values, tags: Mapping) -> Values:
    """Apply depth and white of a TIFF that Pillow opened, which leaves more than 8 bits of gray as they are stored."""
    (bits,) = tags.get(Base.BitsPerSample, (16,))
    values = values * np.float32(65535 / (2**bits - 1))
    return 1 - values if tags.get(Base.PhotometricInterpretation) == 0 else values


def _profile_of_format(image: Image.Image, data: bytes, gray: bool) -> bytes | None:
    """Return the profile that a format states in its own way, which Pillow ignores."""
    if image.format == "PNG":
        return png_chunks.color_profile(png_chunks.header_of_pillow(image.info), gray)[0]
    if image.format == "AVIF" and (place := data.find(b"colrnclx")) > 0:
        return png_chunks.profile_of_code_points(*struct.unpack_from(">HH", data, place + 8), gray)
    if image.format == "HEIF" and (nclx := image.info.get("nclx_profile")):
        points = nclx["color_primaries"], nclx["transfer_characteristics"]
        return png_chunks.profile_of_code_points(*points, gray)
    if image.format == "BMP" and data[70:74] == b"DEBM" and len(data) > 134:  # PROFILE_EMBEDDED, in BITMAPV5HEADER
        offset, size = struct.unpack_from("<II", data, 126)
        return data[14 + offset :][:size]
    return None


def _decode_png(image: Image.Image, png: Png) -> Pixels:
    depth, color_type = png.data[24:26]  # in IHDR
    if depth in (1, 2, 4) and color_type == 0 and b"tRNS" in png.header:
        channels = _keyed_gray(image, png.header[b"tRNS"], depth)
    elif depth == 16:
        channels = decode_deep.png_channels(png.data)
    else:
        channels = pillow_channels(image)
    profile, notes = png_chunks.color_profile(png.header, gray=channels.values.shape[-1] == 1)
    return to_srgb(channels, profile, notes)


def _keyed_gray(image: Image.Image, key: bytes, depth: int) -> Channels:
    """Gray of fewer than 8 bits, of which one level is transparent: Pillow compares it with the unscaled level."""
    values = np.asarray(image.convert("L"))[..., None]
    level = int.from_bytes(key[:2], "big") * 255 // (2**depth - 1)
    return Channels(values, np.where(values[..., 0] == level, 0, 255).astype(np.uint8), 8)


def _is_lossless_webp(data: bytes) -> bool:
    """Return True if the first image of a WebP file is a VP8L chunk (RFC 9649)."""
    start = 12
    while start + 8 <= len(data):
        kind, size = data[start : start + 4], int.from_bytes(data[start + 4 : start + 8], "little")
        if kind in (b"VP8L", b"VP8 "):
            return kind == b"VP8L"
        start += 8 + (16 if kind == b"ANMF" else size + size % 2)  # a frame's chunks follow its header
    return False


def _depth(image: Image.Image, data: bytes) -> int:
    """Return the bits per channel of formats of which Pillow decodes 8 bits."""
    if image.format == "AVIF" and (place := data.find(b"av1C")) > 0:
        return {2: 10, 3: 12}.get(data[place + 6] >> 5 & 3, 8)  # high_bitdepth, twelve_bit
    if image.format == "HEIF":
        return image.info.get("bit_depth", 8)
    if image.format == "JPEG2000" and (place := data.find(b"\xff\x4f\xff\x51")) >= 0:
        return (data[place + 42] & 127) + 1  # Ssiz of the first component
    if image.format == "PPM" and data[:2] == b"P6":
        return 16 if _ppm_maximum(data) > 255 else 8
    return 8


def _ppm_maximum(data: bytes) -> int:
    fields = b" ".join(line.split(b"#")[0] for line in data[:4096].split(b"\n")).split()
    return int(fields[3]) if len(fields) > 3 and fields[3].isdigit() else 0
