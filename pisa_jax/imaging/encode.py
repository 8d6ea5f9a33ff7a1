"""Encode pixels and metadata as the content of an image file.

Samples are uint8 or uint16 of shape (h, w, c): gray, gray + alpha, RGB or RGBA. EXIF blocks begin with "Exif\\0\\0".
"""

import io
import zlib

import imagecodecs
import numpy as np
from jaxtyping import UInt8, UInt16
from PIL import Image
from PIL.ExifTags import Base

from pisa_jax.imaging import exif, metadata, tiff_tags
from pisa_jax.imaging.image_data import ImageData
from pisa_jax.imaging.png_chunks import Chunk, insert_chunks
from pisa_jax.imaging.tiff_tags import LONG, SHORT, UNDEFINED, Directory, Value, integers

_RGB, _MIN_IS_BLACK, _DEFLATE, _DIFFERENCES, _UNASSOCIATED_ALPHA = 2, 1, 8, 2, 2  # values of TIFF 6.0


def encode(
    samples: UInt8[np.ndarray, "h w c"] | UInt16[np.ndarray, "h w c"], image: ImageData, kind: str, quality: int
) -> bytes:
    """Encode samples with the metadata of `image` as "png", "jpeg", "webp" or "tiff"; uint16 only as "png" and "tiff".

    `quality` is that of JPEG (with 4:4:4 chroma) and of WebP with loss.

    Raises:
        ValueError, RuntimeError, OSError, struct.error: the encoder failed.
    """
    if kind == "tiff":
        return _tiff(samples, image)
    if kind == "png" and samples.dtype == np.uint16:
        return insert_chunks(_png16(samples), [*_profile_and_exif(image), *_png_metadata(image)])
    options = {"jpeg": _jpeg_options, "webp": _webp_options, "png": _no_options}[kind](image, quality)
    file = io.BytesIO()
    Image.fromarray(samples[..., 0] if samples.shape[-1] == 1 else samples).save(
        file, kind, exif=image.exif or b"", icc_profile=image.icc, **options
    )
    return insert_chunks(file.getvalue(), _png_metadata(image)) if kind == "png" else file.getvalue()


def _no_options(image: ImageData, quality: int) -> dict:
    del image, quality
    return {}


def _jpeg_options(image: ImageData, quality: int) -> dict:
    other = image.metadata
    kept = {"xmp": other.xmp, "comment": other.comment, "dpi": other.dpi and tuple(map(round, other.dpi))}
    kept["extra"] = metadata.photoshop_segment(other.iptc) if other.iptc else None
    return {"quality": quality, "subsampling": "4:4:4"} | {name: value for name, value in kept.items() if value}


def _webp_options(image: ImageData, quality: int) -> dict:
    loss = {"lossless": True, "exact": True} if image.lossless else {"quality": quality}
    return loss | ({"xmp": image.metadata.xmp} if image.metadata.xmp else {})


def _png16(samples: UInt16[np.ndarray, "h w c"]) -> bytes:
    """Encode with libpng, since Pillow writes 16 bits in gray only."""
    planes = samples[..., 0] if samples.shape[-1] == 1 else samples
    return imagecodecs.png_encode(np.ascontiguousarray(planes), level=6)


def _profile_and_exif(image: ImageData) -> list[Chunk]:
    profile = [Chunk(b"iCCP", b"ICC profile\0\0" + zlib.compress(image.icc))] if image.icc else []
    return profile + ([Chunk(b"eXIf", image.exif.removeprefix(exif.PREFIX))] if image.exif else [])


def _png_metadata(image: ImageData) -> list[Chunk]:
    other, chunks = image.metadata, []
    if other.dpi:
        x, y = (round(number / 0.0254) for number in other.dpi)
        chunks.append(Chunk(b"pHYs", x.to_bytes(4, "big") + y.to_bytes(4, "big") + b"\1"))  # per meter
    if other.xmp:
        chunks.append(Chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + other.xmp))
    if other.comment:
        chunks.append(Chunk(b"tEXt", b"Comment\0" + other.comment.replace(b"\0", b" ")))
    return [*chunks, *(Chunk(*text) for text in other.text)]


def _tiff(samples: np.ndarray, image: ImageData) -> bytes:
    """Encode a TIFF of one Deflate strip: the directory of the EXIF block, completed with the layout of the pixels.

    tifffile writes no EXIF and GPS directories, Pillow no 16-bit color.
    """
    height, width, channels = samples.shape
    differences = np.diff(samples, axis=1, prepend=samples.dtype.type(0))
    strip = zlib.compress(differences.astype(samples.dtype.newbyteorder("<")).tobytes())
    directory: Directory = {} if image.exif is None else tiff_tags.little_endian(exif.parse(image.exif))
    directory = metadata.tiff_directory(image.metadata) | directory | {
        Base.ImageWidth: integers(LONG, width),
        Base.ImageLength: integers(LONG, height),
        Base.BitsPerSample: integers(SHORT, *[samples.dtype.itemsize * 8] * channels),
        Base.SamplesPerPixel: integers(SHORT, channels),
        Base.PhotometricInterpretation: integers(SHORT, _RGB if channels >= 3 else _MIN_IS_BLACK),
        Base.Compression: integers(SHORT, _DEFLATE),
        Base.Predictor: integers(SHORT, _DIFFERENCES),
        Base.RowsPerStrip: integers(LONG, height),
        Base.StripByteCounts: integers(LONG, len(strip)),
        Base.StripOffsets: integers(LONG, 0),
    }  # fmt: skip
    if channels in (2, 4):
        directory[Base.ExtraSamples] = integers(SHORT, _UNASSOCIATED_ALPHA)
    if image.icc:
        directory[Base.InterColorProfile] = Value(UNDEFINED, image.icc)
    head = len(tiff_tags.serialize(directory))
    return tiff_tags.serialize(directory | {Base.StripOffsets: integers(LONG, head)}) + strip
