"""Decoded images, and their conversion from NumPy arrays and to NumPy arrays, Pillow images and file samples.

Color management: an ICC profile other than sRGB is applied on reading, so that the network gets sRGB, and inverted on
writing, so that the file keeps its profile and its colors. Colors outside sRGB are values outside [0, 1]: the network
gets them clipped, and `network_input.finish_output` adds the clipped part to its result. Images with profiles that are
not curves and a matrix (all CMYK profiles) are converted to sRGB permanently.
"""

import dataclasses
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Float32, Shaped
from PIL import Image

from pisa_jax.imaging import icc
from pisa_jax.imaging.ranges import unit_to_uint8


class ImageError(ValueError):
    """An image that cannot be decoded, converted or encoded; the message gives the reason."""


class Metadata(NamedTuple):
    """Metadata of a file besides EXIF data and ICC profile, as bytes of the file."""

    # XMP packet, with orientation 1
    xmp: bytes | None = None
    # IPTC-IIM records
    iptc: bytes | None = None
    comment: bytes | None = None
    # pixels per inch, horizontal and vertical
    dpi: tuple[float, float] | None = None
    # text chunks (kind, data) of a PNG
    text: tuple[tuple[bytes, bytes], ...] = ()


NO_METADATA = Metadata()


@dataclasses.dataclass(frozen=True, eq=False)
class ImageData:
    """A decoded image, upright and in sRGB, and everything that a file written from it keeps."""

    # sRGB; three equal channels if `gray`; outside [0, 1] only for colors outside the sRGB gamut
    rgb: Float32[np.ndarray, "h w 3"]
    # opacity in [0, 1], not premultiplied
    alpha: Float32[np.ndarray, "h w"] | None = None
    # gray or bilevel source: written as gray
    gray: bool = False
    # bits per channel of the source: 8 or 16, which stands for floats, too
    bits: int = 8
    # EXIF block "Exif\0\0...", with orientation 1 and without thumbnail
    exif: bytes | None = None
    # ICC profile of the source, under which a file is written
    icc: bytes | None = None
    metadata: Metadata = NO_METADATA
    # format of the source: "png", "jpeg", "webp", "tiff", "bmp", "gif", ...; "" if it was not a file
    format: str = ""
    # source of format "webp" without loss: written again without loss
    lossless: bool = False
    # warnings for the user, such as what could not be kept
    notes: tuple[str, ...] = ()


def from_array(array: Shaped[np.ndarray, "h w *c"]) -> ImageData:
    """Convert an sRGB array: uint8, uint16, bool, or floats in [0, 1].

    Shapes are (h, w) or (h, w, 1) for gray, (h, w, 2) for gray and alpha, (h, w, 3) for RGB, (h, w, 4) for RGBA.

    Raises:
        ImageError: another shape or type, or floats outside [0, 1].
    """
    if array.ndim not in (2, 3) or 0 in array.shape or (array.ndim == 3 and array.shape[2] > 4):
        raise ImageError(
            f"an array of shape {array.shape} is not an image; expected (h, w) or (h, w, 1 to 4), not empty"
        )
    largest = {"uint8": 255, "uint16": 65535, "bool": 1}
    floating = np.issubdtype(array.dtype, np.floating)
    if not floating and array.dtype.name not in largest:
        raise ImageError(f"unsupported array type {array.dtype}; expected {', '.join(largest)} or floats in [0, 1]")
    values = array.astype(np.float32) / largest.get(array.dtype.name, 1)
    if floating and not (values.min() >= 0 and values.max() <= 1):
        raise ImageError(f"floats must be in [0, 1], not [{values.min()}, {values.max()}]; divide by the largest value")
    values = values.reshape(*array.shape[:2], -1)
    channels = values.shape[-1]
    rgb = values[..., :3] if channels > 2 else np.repeat(values[..., :1], 3, -1)
    bits = 16 if floating or array.dtype == np.uint16 else 8
    return ImageData(rgb, values[..., -1] if channels in (2, 4) else None, gray=channels < 3, bits=bits)


def to_array(image: ImageData, dtype: type = np.uint8) -> Shaped[np.ndarray, "h w *c"]:
    """Convert to sRGB uint8, uint16 or bool (rounded) or floats in [0, 1]; shapes as for `from_array`, gray is (h, w).

    Raises:
        ImageError: another `dtype`.
    """
    values = _with_alpha(image.rgb[..., :1] if image.gray else image.rgb, image.alpha)
    if np.dtype(dtype) in (np.uint8, np.uint16):
        values = _quantize(values, np.dtype(dtype).itemsize * 8)
    elif np.dtype(dtype) == bool:
        values = values > 0.5
    elif np.issubdtype(dtype, np.floating):
        values = np.clip(values, 0, 1).astype(dtype)
    else:
        raise ImageError(f"unsupported array type {np.dtype(dtype)}; allowed: uint8, uint16, bool and floats")
    return values[..., 0] if values.shape[-1] == 1 else values


def to_pil(image: ImageData, bits: int = 8) -> Image.Image:
    """Convert to a Pillow image in the colors of the profile, of 16 bits if `bits` is 16 and Pillow has such a mode.

    It has one for gray without alpha. `info` holds the profile and metadata, as Pillow's `save` expects.
    """
    deep = bits == 16 and image.gray and image.alpha is None
    samples = file_samples(image, 16 if deep else 8)
    converted = Image.fromarray(samples[..., 0] if samples.shape[-1] == 1 else samples)
    kept = {"icc_profile": image.icc, "exif": image.exif, "xmp": image.metadata.xmp, "dpi": image.metadata.dpi}
    converted.info.update({key: value for key, value in kept.items() if value})
    return converted


def file_samples(image: ImageData, bits: int) -> Shaped[np.ndarray, "h w c"]:
    """Convert to uint8 or uint16 samples in the colors of the image's ICC profile: gray, gray + alpha, RGB or RGBA."""
    values = image.rgb[..., :1] if image.gray else image.rgb
    profile = icc.parse(image.icc) if image.icc else None
    if profile is not None and not icc.is_srgb(profile):
        values = icc.from_srgb(values, profile)
    return _quantize(_with_alpha(values, image.alpha), bits)


def _with_alpha(values: Float32[np.ndarray, "h w c"], alpha: Float32[np.ndarray, "h w"] | None) -> np.ndarray:
    return values if alpha is None else np.concatenate([values, alpha[..., None]], -1)


def _quantize(values: Float[np.ndarray, "*n"], bits: int) -> np.ndarray:
    """Round [0, 1] to unsigned integers: the only rounding between the network output and a file."""
    if bits == 8:
        return unit_to_uint8(values)
    return np.rint(np.clip(values, 0, 1) * 65535).astype(np.uint16)
