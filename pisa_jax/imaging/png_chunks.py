"""Chunks of PNG files: color spaces, text, and ancillary chunks that decoders refuse (PNG, third edition, 2025)."""

import struct
import zlib
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import numpy as np

from pisa_jax.imaging import icc
from pisa_jax.imaging.image_data import ImageError

SIGNATURE = b"\x89PNG\r\n\x1a\n"
TEXT = (b"tEXt", b"zTXt", b"iTXt")
LARGEST_TEXT = 1 << 20  # bytes, unpacked: Pillow refuses files with longer texts
LARGEST_PROFILE = 1 << 24
# Keywords of texts that Pillow reads as EXIF data or XMP, which are kept as such.
_METADATA = (b"XML:com.adobe.xmp", b"Raw profile type exif", b"Raw profile type APP1", b"Raw profile type xmp")


class Chunk(NamedTuple):
    """A chunk with a correct checksum, or a critical one."""

    kind: bytes
    data: bytes


class Png(NamedTuple):
    """Content of a PNG file."""

    # the file without the ancillary chunks that decoders refuse
    data: bytes
    # chunks before the pixels: kind -> data of the first one
    header: dict[bytes, bytes]
    # text chunks
    text: tuple[Chunk, ...]
    notes: tuple[str, ...]


def make_chunk(kind: bytes, data: bytes) -> bytes:
    """Encode a chunk."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def insert_chunks(png: bytes, chunks: Iterable[Chunk]) -> bytes:
    """Insert chunks behind IHDR."""
    start = len(SIGNATURE) + 25
    return png[:start] + b"".join(make_chunk(*chunk) for chunk in chunks) + png[start:]


def _walk(data: bytes) -> Iterator[tuple[int, int, bytes]]:
    """Yield (start, end, kind) of each complete chunk."""
    start = len(SIGNATURE)
    while start + 12 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, start)
        end = start + 12 + length
        if end > len(data):
            return
        yield start, end, kind
        start = end


def parse(data: bytes) -> Png:
    """Parse the chunks of a PNG file; pixels and critical chunks are left to the decoder."""
    parts, header, text, dropped, pixels, last = [data[: len(SIGNATURE)]], {}, [], {}, False, len(SIGNATURE)
    for start, end, kind in _walk(data):
        last, content, pixels = end, data[start + 8 : end - 4], pixels or kind == b"IDAT"
        ancillary = bool(kind[0] & 0x20)
        if ancillary and struct.unpack_from(">I", data, end - 4)[0] != zlib.crc32(data[start + 4 : end - 4]):
            dropped[kind] = "its checksum is wrong"
        elif kind in TEXT and not _text_fits(kind, content):
            dropped[kind] = f"it is damaged or longer than {LARGEST_TEXT} bytes"
        else:
            if kind in TEXT and content.split(b"\0")[0] not in _METADATA:
                text.append(Chunk(kind, content))
            if ancillary and not pixels:
                header.setdefault(kind, content)
            if kind != b"iCCP":  # Pillow refuses large ones; `color_profile` reads it
                parts.append(data[start:end])
    notes = tuple(f"the PNG chunk {kind.decode('latin-1')} was dropped: {why}" for kind, why in dropped.items())
    return Png(b"".join([*parts, data[last:]]), header, tuple(text), notes)


def _text_fits(kind: bytes, data: bytes) -> bool:
    packed = data
    if kind == b"zTXt":
        packed = data.partition(b"\0")[2][1:]
    elif kind == b"iTXt":
        _, _, rest = data.partition(b"\0")
        if rest[:1] != b"\1":
            return len(data) <= LARGEST_TEXT
        packed = rest[2:].split(b"\0", 2)[-1]
    else:
        return len(data) <= LARGEST_TEXT
    return _unpack(packed, LARGEST_TEXT) is not None


def _unpack(data: bytes, limit: int) -> bytes | None:
    """Decompress; None if the data is damaged or longer than `limit`."""
    try:
        stream = zlib.decompressobj()
        unpacked = stream.decompress(data, limit)
        return unpacked if stream.eof else None
    except zlib.error:
        return None


def color_profile(header: dict[bytes, bytes], gray: bool) -> tuple[bytes | None, tuple[str, ...]]:
    """ICC profile of the colors of a PNG, None for sRGB, and notes: cICP, iCCP, sRGB, gAMA and cHRM in this order.

    Raises:
        ImageError: HDR, or YCbCr colors.
    """
    if b"cICP" in header:
        primaries, transfer, matrix, full_range = header[b"cICP"][:4].ljust(4, b"\0")
        if matrix or full_range != 1:
            raise ImageError(f"holds YCbCr colors or a limited range (cICP {list(header[b'cICP'])}); save it as RGB")
        return profile_of_code_points(primaries, transfer, gray), ()
    if b"iCCP" in header:
        profile = _unpack(header[b"iCCP"].partition(b"\0")[2][1:], LARGEST_PROFILE)
        return profile, () if profile else ("the ICC profile is damaged and was dropped",)
    if b"sRGB" in header:
        return None, ()
    return _profile_of_gama(header.get(b"gAMA", b""), header.get(b"cHRM", b""), gray), ()


def profile_of_code_points(primaries: int, transfer: int, gray: bool) -> bytes | None:
    """Make the profile of coding-independent code points (ITU-T H.273); None for sRGB and unspecified ones.

    Raises:
        ImageError: HDR, or unknown code points.
    """
    primaries, transfer = (1 if primaries == 2 else primaries), (13 if transfer == 2 else transfer)  # unspecified
    if primaries not in icc.PRIMARIES or transfer not in icc.TRANSFERS:
        raise ImageError(
            f"its color space has primaries {primaries} and transfer function {transfer} (ITU-T H.273), such as HDR; "
            "convert it to a standard dynamic range, such as sRGB or Display P3"
        )
    if (primaries, transfer) == (1, 13):
        return None
    return icc.make_profile(icc.PRIMARIES[primaries], icc.TRANSFERS[transfer], gray)


def header_of_pillow(info: Mapping) -> dict[bytes, bytes]:
    """Rebuild the chunks on colors from the `info` of an image that Pillow opened."""
    header = {b"sRGB": b"\0"} if "srgb" in info else {}
    for key, kind in (("gamma", b"gAMA"), ("chromaticity", b"cHRM")):
        numbers = np.atleast_1d(info.get(key, ()))
        if numbers.size:
            header[kind] = np.rint(numbers * 100000).astype(">u4").tobytes()
    return header


def _profile_of_gama(gamma: bytes, chromaticities: bytes, gray: bool) -> bytes | None:
    """Make the profile of the chunks gAMA and cHRM; None if it is sRGB within the tolerances of libpng."""
    exponent = 100000 / struct.unpack(">I", gamma)[0] if len(gamma) == 4 and any(gamma) else 2.2
    srgb = icc.PRIMARIES[1]
    points = tuple(v / 100000 for v in struct.unpack(">8I", chromaticities)) if len(chromaticities) == 32 else srgb
    near_srgb = gray or max(abs(a - b) for a, b in zip(points, srgb, strict=True)) < 0.01
    usual = abs(exponent / 2.2 - 1) < 0.05
    if usual and near_srgb:
        return None
    if not 0.1 < exponent < 10 or not icc.spans_colors(points):
        return None
    return icc.make_profile(points, icc.SRGB_CURVE if usual else icc.parametric_curve(0, exponent), gray)
