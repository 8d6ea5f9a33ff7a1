"""Read image files for training, inference and metrics: the one decoder of the package."""

import io
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image, UnidentifiedImageError

from pisa_jax.imaging import decode
from pisa_jax.imaging.arrays import RGB8
from pisa_jax.imaging.image_data import ImageData, ImageError
from pisa_jax.imaging.image_files import READABLE

T = TypeVar("T")


def read_image(path: str | os.PathLike) -> ImageData:
    """Read the first frame of an image file.

    Raises:
        ImageError: the file holds no image or a damaged one.
        OSError: the file cannot be read.
    """
    return _decode_file(Path(path).read_bytes(), str(path), _to_image_data)


def read_rgb8(path: str | os.PathLike) -> RGB8:
    """Read an image file as upright 8-bit sRGB without alpha; raises as `read_image` does."""
    return decode_rgb8(Path(path).read_bytes(), str(path))


def decode_rgb8(data: bytes, name: str) -> RGB8:
    """Decode the content of an image file to upright 8-bit sRGB without alpha: `read_image`, rounded.

    Samples of 8-bit sRGB files are returned as they are stored.

    Raises:
        ImageError: `data` holds no image or a damaged one; the message begins with `name`.
    """
    return _decode_file(data, name, _to_rgb8)


def from_pil(image: Image.Image) -> ImageData:
    """Convert a Pillow image with its alpha, EXIF orientation and ICC profile.

    Raises:
        ImageError: an unsupported mode, such as F.
    """
    return _to_image_data(image, b"")


def _decode_file(data: bytes, name: str, convert: Callable[[Image.Image, bytes], T]) -> T:
    if not data:
        raise ImageError(f"{name} is empty (0 bytes)")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of large images and unusual tags
            return convert(Image.open(io.BytesIO(data), formats=tuple(READABLE)), data)
    except UnidentifiedImageError:
        raise ImageError(f"{name} is not an image in a supported format ({', '.join(READABLE)})") from None
    except Image.DecompressionBombError as error:
        raise ImageError(f"{name}: {error} To allow more, set PIL.Image.MAX_IMAGE_PIXELS.") from None
    except ImageError as error:
        raise ImageError(f"{name}: {error}") from None
    except MemoryError:
        raise
    except Exception as error:  # decoders raise arbitrary exceptions on damaged data
        raise ImageError(f"{name} is damaged: {error or type(error).__name__}") from error


def _to_rgb8(image: Image.Image, data: bytes) -> RGB8:
    values = decode.to_uint8(decode.decode_pixels(image, data).values)
    return decode.upright(_three_channels(values), decode.exif_orientation(image))


def _to_image_data(image: Image.Image, data: bytes) -> ImageData:
    """Convert an opened image; `data` is the content of its file, or b""."""
    notes, frames, image_format = (), getattr(image, "n_frames", 1), image.format or ""
    if frames > 1 and image_format != "MPO":  # in which phones put previews behind the photograph
        notes = (f"the file has {frames} frames or pages; only the first is used",)
    pixels = decode.decode_pixels(image, data)
    exif, exif_notes = decode.exif_block(image)
    values, alpha, orientation = decode.to_unit(pixels.values), pixels.alpha, decode.exif_orientation(image)
    return ImageData(
        rgb=decode.upright(_three_channels(values), orientation),
        alpha=None if alpha is None else decode.upright(decode.to_unit(alpha), orientation),
        gray=values.shape[-1] == 1,
        bits=pixels.bits,
        exif=exif,
        icc=pixels.icc,
        format="jpeg" if image_format == "MPO" else image_format.lower(),
        notes=(*notes, *exif_notes, *pixels.notes),
    )


def _three_channels(values: np.ndarray) -> np.ndarray:
    return np.repeat(values, 3, -1) if values.shape[-1] == 1 else values
