"""Write image files."""

import dataclasses
import os
import struct
from pathlib import Path

import numpy as np

from pisa_jax.imaging import metadata
from pisa_jax.imaging.encode import encode
from pisa_jax.imaging.image_data import ImageData, ImageError, file_samples
from pisa_jax.runtime.atomic_write import atomic_write

WRITABLE = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp", ".tif": "tiff", ".tiff": "tiff"}
SUFFIXES = {"png": ".png", "jpg": ".jpg", "jpeg": ".jpg", "webp": ".webp", "tiff": ".tiff"}
FORMATS_OF_16_BITS = ("png", "tiff")
LARGEST_SIDE = {"jpeg": 65500, "webp": 16383}
LARGEST_JPEG_EXIF = 65533


def output_suffix(source: ImageData, ext: str = "auto") -> str:
    """File suffix for `ext` auto|png|jpg|webp|tiff.

    "auto" is the format of the source if it is writable and holds the alpha and the bits of the source, else PNG.
    """
    if ext == "auto":
        lossy = source.format not in FORMATS_OF_16_BITS and (
            source.bits == 16 or (source.format == "jpeg" and source.alpha is not None)
        )
        ext = source.format if source.format in SUFFIXES and not lossy else "png"
    if ext not in SUFFIXES:
        raise ImageError(f"cannot write {ext!r}; allowed: auto, {', '.join(SUFFIXES)}")
    return SUFFIXES[ext]


def write_image(path: str | os.PathLike, image: ImageData, quality: int = 95) -> tuple[str, ...]:
    """Write an image atomically in the format of the suffix; return notes on what the format cannot hold.

    `quality` is that of JPEG and WebP.

    Raises:
        ImageError: the format cannot hold the image.
        OSError: the file cannot be written.
    """
    path = Path(path)
    kind = WRITABLE.get(path.suffix.lower())
    if kind is None:
        raise ImageError(f"cannot write {path}: {path.suffix!r} is none of {', '.join(WRITABLE)}")
    if not np.isfinite(image.rgb).all():
        raise ImageError(f"cannot write {path}: the image holds values that are not finite")
    try:
        image, notes = _adapt(image, kind)
        data = encode(file_samples(image, image.bits), image, kind, quality)
    except (ValueError, RuntimeError, OSError, struct.error) as error:
        raise ImageError(f"cannot write {path}: {error}") from error
    with atomic_write(path) as file:
        file.write_bytes(data)
    return notes


def _adapt(image: ImageData, kind: str) -> tuple[ImageData, tuple[str, ...]]:
    """Reduce an image to what the format `kind` can hold; also return notes on what was lost."""
    largest, side = LARGEST_SIDE.get(kind), max(image.rgb.shape)
    if largest and side > largest:
        raise ImageError(f"{kind} allows at most {largest} pixels per side, not {side}; use png or tiff")
    kept, lost = metadata.adapt(image.metadata, kind)
    notes, changes = list(lost), {"metadata": kept}
    if kind == "jpeg" and image.alpha is not None:
        opacity = image.alpha[..., None]
        changes |= {"rgb": image.rgb * opacity + (1 - opacity), "alpha": None}
        notes += ["transparency was composited onto white: JPEG has no alpha channel"] if opacity.min() < 1 else []
    if image.bits == 16 and kind not in FORMATS_OF_16_BITS:
        changes |= {"bits": 8}
        notes.append(f"rounded from 16 to 8 bits per channel: {kind} has no 16-bit samples")
    if kind == "jpeg" and len(image.exif or b"") > LARGEST_JPEG_EXIF:
        changes |= {"exif": None}
        notes.append(f"the EXIF data was dropped: {len(image.exif)} bytes, JPEG allows {LARGEST_JPEG_EXIF}")
    if image.gray and kind == "webp":
        changes |= {"gray": False, "icc": None}  # not supported by the format: three equal sRGB channels
    return dataclasses.replace(image, **changes), tuple(notes)
