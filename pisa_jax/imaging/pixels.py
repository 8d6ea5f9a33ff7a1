"""Decoded pixels: their types, orientation, and conversion to sRGB."""

import contextlib
import io
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, Shaped, UInt8
from PIL import Image, ImageCms

from pisa_jax.imaging import icc
from pisa_jax.imaging.image_data import ImageError
from pisa_jax.imaging.ranges import uint8_to_unit, unit_to_uint8

# uint8 as stored, or float32 in [0, 1] where the file has 16 bits or a conversion took place.
Values = UInt8[np.ndarray, "..."] | Float32[np.ndarray, "..."]


class Channels(NamedTuple):
    """Pixels in the colors of the file: one channel is gray, three are RGB; alpha is not premultiplied."""

    values: Values
    alpha: Values | None
    # per channel: 8 or 16
    bits: int


class Pixels(NamedTuple):
    """Pixels in sRGB (see `Channels`), not yet upright."""

    values: Values
    alpha: Values | None
    bits: int
    # profile under which the image is written again
    icc: bytes | None
    notes: tuple[str, ...]
    # EXIF orientation, 1 to 8, that remains to be applied
    orientation: int = 1


def to_unit(values: Values) -> Float32[np.ndarray, "..."]:
    """Convert values to float32 in [0, 1]."""
    return uint8_to_unit(values) if values.dtype == np.uint8 else values


def to_uint8(values: Values) -> UInt8[np.ndarray, "..."]:
    """Round values to uint8."""
    return values if values.dtype == np.uint8 else unit_to_uint8(values)


def upright(array: Shaped[np.ndarray, "h w *c"], orientation: int) -> Shaped[np.ndarray, "h2 w2 *c"]:
    """Apply an EXIF orientation, 1 to 8 (EXIF 2.3, tag 274); other values count as 1."""
    if orientation in (5, 6, 7, 8):
        array = array.swapaxes(0, 1)
    if orientation in (2, 3, 6, 7):
        array = array[:, ::-1]
    if orientation in (3, 4, 7, 8):
        array = array[::-1]
    return np.ascontiguousarray(array)


def pillow_channels(image: Image.Image) -> Channels:
    """Convert a Pillow image of 8 bits in any mode, or of 16 bits in gray.

    Raises:
        ImageError: pixels without a defined white, such as floats, 32-bit integers or Lab.
    """
    if image.mode.startswith("I"):
        samples = np.asarray(image)
        if samples.min() < 0 or samples.max() > 65535:
            raise ImageError("holds 32-bit integers; save it with 8 or 16 bits per channel")
        return Channels(samples[..., None].astype(np.float32) / 65535, None, 16)
    gray, transparent = image.mode in ("1", "L", "LA", "La"), image.has_transparency_data
    mode = ("L" if gray else "RGB") + ("A" if transparent else "")
    try:
        if image.mode == "F":
            raise ValueError("Pillow would convert it as if white were 255")
        samples = np.asarray(image.convert(mode))
    except ValueError as error:
        raise ImageError(f"holds {image.mode} pixels; save it as gray, RGB or CMYK with 8 or 16 bits") from error
    samples = samples.reshape(image.height, image.width, -1)
    return Channels(samples[..., : 1 if gray else 3], samples[..., -1] if transparent else None, 8)


def inks_to_srgb(inks: Values, alpha: Values | None, bits: int, profile: bytes | None) -> Pixels:
    """Convert CMYK, 1 is full ink, with the profile if there is a valid one, else with Pillow's formula."""
    image = Image.fromarray(to_uint8(inks), "CMYK")
    with contextlib.suppress(ImageCms.PyCMSError, OSError):
        if profile:
            srgb = np.asarray(_apply_profile(image, profile))
            depth = " with 8 bits per channel" if bits == 16 else ""
            return Pixels(srgb, alpha, 8, None, (f"CMYK was converted to sRGB with its ICC profile{depth}",))
    note = "CMYK was converted to sRGB without an ICC profile: the colors are approximate"
    rgb = np.asarray(image.convert("RGB")) if inks.dtype == np.uint8 else (1 - inks[..., :3]) * (1 - inks[..., 3:])
    return Pixels(rgb, alpha, bits, None, (note,))


def to_srgb(channels: Channels, profile: bytes | None, notes: tuple[str, ...] = ()) -> Pixels:
    """Convert gray or RGB channels under an ICC profile."""
    if not profile:
        return Pixels(*channels, None, notes)
    values, kept, profile_notes = _values_to_srgb(channels.values, profile)
    return Pixels(values, channels.alpha, channels.bits, kept, notes + profile_notes)


def _values_to_srgb(values: Values, data: bytes) -> tuple[Values, bytes | None, tuple[str, ...]]:
    """Convert gray or RGB values under the profile `data` to (sRGB values, profile to write back, notes)."""
    gray = values.shape[-1] == 1
    expected, found = "GRAY" if gray else "RGB", icc.color_space(data)
    if found != expected:
        return values, None, (f"the ICC profile is for {found} pixels, not for {expected}, and was dropped",)
    try:
        profile = icc.parse(data)
        if profile is not None:
            return values if icc.is_srgb(profile) else icc.to_srgb(to_unit(values), profile), data, ()
        if gray:
            return values, data, ("the gray ICC profile is not a tone curve: it is kept, but was not applied",)
        srgb = _apply_profile(Image.fromarray(to_uint8(values)), data)
        note = "converted to sRGB with 8 bits per channel: the ICC profile is not made of curves and a matrix"
        return np.asarray(srgb), None, (note,)
    except (ValueError, OSError, ImageCms.PyCMSError):
        return values, None, ("the ICC profile is damaged and was dropped",)


def _apply_profile(image: Image.Image, profile: bytes) -> Image.Image:
    """Convert to 8-bit sRGB with LittleCMS."""
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    return ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
