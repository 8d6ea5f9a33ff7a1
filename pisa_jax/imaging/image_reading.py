"""Read image files for training, inference and metrics: the one decoder of the package."""

import os
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from pisa_jax.imaging import decode
from pisa_jax.imaging.arrays import RGB8
from pisa_jax.imaging.decode import Decoded
from pisa_jax.imaging.image_data import ImageData, ImageError
from pisa_jax.imaging.image_files import READABLE, readable_formats
from pisa_jax.imaging.pixels import to_uint8, to_unit, upright
from pisa_jax.runtime.messages import error_text

_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")


def read_image(path: str | os.PathLike) -> ImageData:
    """Read the first frame, or the main page, of an image file.

    Raises:
        ImageError: the file holds no image or a damaged one.
        OSError: the file cannot be read.
    """
    return decode_image(Path(path).read_bytes(), str(path))


def decode_image(data: bytes, name: str) -> ImageData:
    """Decode the content of an image file.

    Raises:
        ImageError: `data` holds no image or a damaged one; the message begins with `name`.
    """
    return _to_image_data(_decode_file(data, name))


def read_rgb8(path: str | os.PathLike) -> RGB8:
    """Read an image file as upright 8-bit sRGB without alpha; raises as `read_image` does."""
    return decode_rgb8(Path(path).read_bytes(), str(path))


def decode_rgb8(data: bytes, name: str) -> RGB8:
    """Decode the content of an image file to upright 8-bit sRGB without alpha: `read_image`, rounded.

    Samples of 8-bit sRGB files are returned as they are stored.

    Raises:
        ImageError: `data` holds no image or a damaged one; the message begins with `name`.
    """
    pixels = _decode_file(data, name).pixels
    return upright(_three_channels(to_uint8(pixels.values)), pixels.orientation)


def from_pil(image: Image.Image) -> ImageData:
    """Convert a Pillow image with its alpha, EXIF orientation, ICC profile and metadata.

    Raises:
        ImageError: an unsupported mode, such as F.
    """
    return _to_image_data(decode.decode_image(image))


def _decode_file(data: bytes, name: str) -> Decoded:
    if not data:
        raise ImageError(f"{name} is empty (0 bytes)")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of large images and unusual tags
            return decode.decode_file(data)
    except UnidentifiedImageError:
        if data[4:8] == b"ftyp" and data[8:12] in _HEIF_BRANDS and "HEIF" not in readable_formats():
            raise ImageError(f"{name} is an HEIF image; to read it: pip install 'pisa_jax[heif]'") from None
        raise ImageError(f"{name} is not an image in a supported format ({', '.join(READABLE)})") from None
    except Image.DecompressionBombError as error:
        raise ImageError(f"{name}: {error} To allow more, set PIL.Image.MAX_IMAGE_PIXELS.") from None
    except ImageError as error:
        raise ImageError(f"{name}: {error}") from None
    except MemoryError:
        raise
    except Exception as error:  # decoders raise arbitrary exceptions on damaged data
        raise ImageError(f"{name} is damaged: {error_text(error)}") from error


def _to_image_data(decoded: Decoded) -> ImageData:
    pixels, (exif, other, exif_notes) = decoded.pixels, decoded.metadata
    values, alpha = to_unit(pixels.values), pixels.alpha
    return ImageData(
        rgb=upright(_three_channels(values), pixels.orientation),
        alpha=None if alpha is None else upright(to_unit(alpha), pixels.orientation),
        gray=values.shape[-1] == 1,
        bits=pixels.bits,
        exif=exif,
        icc=pixels.icc,
        metadata=other,
        format=decoded.format,
        lossless=decoded.lossless,
        notes=(*decoded.notes, *exif_notes, *pixels.notes),
    )


def _three_channels(values: np.ndarray) -> np.ndarray:
    return np.repeat(values, 3, -1) if values.shape[-1] == 1 else values
