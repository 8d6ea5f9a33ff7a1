"""Encode pixels and metadata as the content of an image file.

Samples are uint8 or uint16 of shape (h, w, c): gray, gray + alpha, RGB or RGBA. EXIF blocks begin with "Exif\\0\\0".
"""

import io
import struct
import zlib

import cv2
import numpy as np
from jaxtyping import UInt8, UInt16
from PIL import Image
from PIL.ExifTags import Base

_EXIF_PREFIX = b"Exif\0\0"
_ICC_PROFILE = 34675
_RGB, _MIN_IS_BLACK, _DEFLATE, _DIFFERENCES, _UNASSOCIATED_ALPHA = 2, 1, 8, 2, 2  # values of TIFF 6.0


def encode(
    samples: UInt8[np.ndarray, "h w c"] | UInt16[np.ndarray, "h w c"],
    kind: str,
    quality: int,
    exif: bytes | None,
    icc: bytes | None,
) -> bytes:
    """Encode as "png", "jpeg", "webp" or "tiff"; uint16 only as "png" and "tiff".

    `quality` is that of JPEG (with 4:4:4 chroma) and WebP.

    Raises:
        ValueError, OSError: the encoder failed.
    """
    if kind == "tiff":
        return _tiff(samples, exif, icc)
    if samples.dtype == np.uint16:
        return _png16(samples, exif, icc)
    options = {"jpeg": {"quality": quality, "subsampling": "4:4:4"}, "webp": {"quality": quality}}.get(kind, {})
    image = Image.fromarray(samples[..., 0] if samples.shape[-1] == 1 else samples)
    file = io.BytesIO()
    image.save(file, kind, exif=exif or b"", icc_profile=icc, **options)
    return file.getvalue()


def _png16(samples: UInt16[np.ndarray, "h w c"], exif: bytes | None, icc: bytes | None) -> bytes:
    """Encode 1, 3 or 4 channels with OpenCV, since Pillow writes 16 bits in gray only, and insert the metadata."""
    bgr = samples[..., {1: [0], 3: [2, 1, 0], 4: [2, 1, 0, 3]}[samples.shape[-1]]]
    done, data = cv2.imencode(".png", bgr, [cv2.IMWRITE_PNG_COMPRESSION, 6])
    if not done:
        raise ValueError("OpenCV could not encode the 16-bit PNG")
    chunks = _png_chunk(b"iCCP", b"ICC profile\0\0" + zlib.compress(icc)) if icc else b""
    chunks += _png_chunk(b"eXIf", exif.removeprefix(_EXIF_PREFIX)) if exif else b""
    header = 8 + 25  # the signature and IHDR
    return data[:header].tobytes() + chunks + data[header:].tobytes()


def _png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _tiff(samples: np.ndarray, exif: bytes | None, icc: bytes | None) -> bytes:
    """Encode a TIFF of one Deflate strip, since Pillow writes no 16-bit color and OpenCV no metadata.

    An EXIF block is a TIFF without pixels: Pillow's EXIF writer makes the head of the file; the strip is appended.
    """
    height, width, channels = samples.shape
    head = Image.Exif()
    head.load(exif or b"")
    head.endian = "<"  # Pillow misreads big-endian 16-bit gray
    differences = np.diff(samples, axis=1, prepend=samples.dtype.type(0))
    strip = zlib.compress(differences.astype(samples.dtype.newbyteorder("<")).tobytes())
    head[Base.ImageWidth], head[Base.ImageLength] = width, height
    head[Base.BitsPerSample] = (samples.dtype.itemsize * 8,) * channels
    head[Base.SamplesPerPixel] = channels
    head[Base.PhotometricInterpretation] = _RGB if channels >= 3 else _MIN_IS_BLACK
    if channels in (2, 4):
        head[Base.ExtraSamples] = _UNASSOCIATED_ALPHA
    head[Base.Compression], head[Base.Predictor] = _DEFLATE, _DIFFERENCES
    head[Base.RowsPerStrip], head[Base.StripByteCounts] = height, len(strip)
    head[Base.StripOffsets] = 0  # Pillow counts it from the end of the head
    if icc:
        head[_ICC_PROFILE] = icc
    return head.tobytes().removeprefix(_EXIF_PREFIX) + strip
