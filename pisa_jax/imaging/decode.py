"""Channels and metadata of an opened image file: sRGB pixels, EXIF orientation, EXIF block."""

import contextlib
import io
from typing import NamedTuple

import cv2
import numpy as np
from jaxtyping import Float32, Shaped, UInt8
from PIL import Image, ImageCms
from PIL.ExifTags import Base

from pisa_jax.imaging import icc
from pisa_jax.imaging.image_data import ImageError
from pisa_jax.imaging.ranges import uint8_to_unit, unit_to_uint8

# EXIF tags that describe the photograph: document, description, make, model, orientation, resolution, software, date,
# artist, computer, ratings, copyright, EXIF and GPS directories, Windows' title to subject. All other tags describe the
# layout of the old file, a georeference per pixel, or the thumbnail, and would be wrong in a new file.
EXIF_KEPT = {269, 270, 271, 272, 274, 282, 283, 296, 305, 306, 315, 316, 18246, 18249, 33432, 34665, 34853}
EXIF_KEPT |= {40091, 40092, 40093, 40094, 40095}

# uint8 as stored, or float32 in [0, 1] where the file has 16 bits or a conversion took place.
Values = UInt8[np.ndarray, "*shape"] | Float32[np.ndarray, "*shape"]


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


def to_unit(values: Values) -> Float32[np.ndarray, "*shape"]:
    """Convert values to float32 in [0, 1]."""
    return uint8_to_unit(values) if values.dtype == np.uint8 else values


def to_uint8(values: Values) -> UInt8[np.ndarray, "*shape"]:
    """Round values to uint8."""
    return values if values.dtype == np.uint8 else unit_to_uint8(values)


def decode_pixels(image: Image.Image, data: bytes) -> Pixels:
    """Decode the first frame of an opened image to sRGB.

    `data` is the content of the file, b"" if there is none: Pillow alone would reduce 16-bit color to 8 bits.
    """
    image.load()  # detects truncation, which OpenCV ignores
    if 0 in image.size:
        raise ImageError(f"the image has no pixels ({image.width}x{image.height})")
    profile = image.info.get("icc_profile")
    if image.mode == "CMYK":
        image, note = _cmyk_to_srgb(image, profile)
        return Pixels(*_pillow_channels(image), None, (note,))
    channels, notes = None, ()
    if data and _has_16_bits(image, data):
        channels = _opencv_channels(image, data)
        notes = () if channels else ("the 16-bit file could only be decoded with 8 bits per channel",)
    channels = channels or _pillow_channels(image)
    if not profile:
        return Pixels(*channels, None, notes)
    values, profile, profile_notes = _to_srgb(channels.values, profile)
    return Pixels(values, channels.alpha, channels.bits, profile, notes + profile_notes)


def exif_orientation(image: Image.Image) -> int:
    """EXIF orientation that remains to be applied to a loaded image; 1 where the EXIF data is damaged.

    Pillow itself applies the orientation of a TIFF when it loads the pixels.
    """
    with contextlib.suppress(Exception):  # Pillow's parser raises arbitrary exceptions on damaged data
        return image.getexif().get(Base.Orientation, 1)
    return 1


def exif_block(image: Image.Image) -> tuple[bytes | None, tuple[str, ...]]:
    """Build (EXIF block for the upright image, notes); the block has the tags `EXIF_KEPT` and orientation 1."""
    try:
        exif = Image.Exif()
        exif.load(image.getexif().tobytes())  # a copy: the image keeps its own
        for tag in set(exif) - EXIF_KEPT:
            del exif[tag]
        if Base.Orientation in exif:
            exif[Base.Orientation] = 1
        return exif.tobytes() if len(exif) else None, ()
    except Exception:  # Pillow's parser raises arbitrary exceptions on damaged data
        return None, ("the EXIF data is damaged and was dropped",)


def upright(array: Shaped[np.ndarray, "h w *c"], orientation: int) -> Shaped[np.ndarray, "h2 w2 *c"]:
    """Apply an EXIF orientation, 1 to 8 (EXIF 2.3, tag 274); other values count as 1."""
    if orientation in (5, 6, 7, 8):
        array = array.swapaxes(0, 1)
    if orientation in (2, 3, 6, 7):
        array = array[:, ::-1]
    if orientation in (3, 4, 7, 8):
        array = array[::-1]
    return np.ascontiguousarray(array)


def _has_16_bits(image: Image.Image, data: bytes) -> bool:
    """Return True if the file `data`, opened as `image`, is a PNG or TIFF with 16 bits per channel."""
    if image.format == "PNG":
        return data[24] == 16  # the bit depth in IHDR
    return image.format == "TIFF" and 16 in image.tag_v2.get(Base.BitsPerSample, ())


def _opencv_channels(image: Image.Image, data: bytes) -> Channels | None:
    """Decode a 16-bit PNG or TIFF with OpenCV, which also applies the orientation of a TIFF; None if it fails."""
    try:
        samples = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    except cv2.error:
        return None
    if samples is None or samples.dtype != np.uint16 or samples.shape[:2] != image.size[::-1]:
        return None
    samples = samples.reshape(*samples.shape[:2], -1)
    gray = samples.shape[-1] == 1 or (image.format == "PNG" and data[25] == 4)  # color type in IHDR: gray + alpha
    values = samples[..., :1] if gray else samples[..., 2::-1]
    values, alpha = values.astype(np.float32) / 65535, None
    if gray and "transparency" in image.info:  # the one gray level that is transparent
        alpha = (samples[..., 0] != image.info["transparency"]).astype(np.float32)
    elif samples.shape[-1] == 4 and image.has_transparency_data:
        alpha = samples[..., 3].astype(np.float32) / 65535
    tags = image.tag_v2 if image.format == "TIFF" else {}
    if alpha is not None and tags.get(Base.ExtraSamples) == (1,):  # premultiplied alpha
        values = np.divide(values, alpha[..., None], out=np.zeros_like(values), where=alpha[..., None] > 0)
    if tags.get(Base.PhotometricInterpretation) == 0:  # white is 0
        values = 1 - values
    return Channels(values, alpha, 16)


def _pillow_channels(image: Image.Image) -> Channels:
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


def _cmyk_to_srgb(image: Image.Image, profile: bytes | None) -> tuple[Image.Image, str]:
    """Convert to (sRGB, note) with the profile if there is a valid one, else with Pillow's formula."""
    with contextlib.suppress(ImageCms.PyCMSError, OSError):
        if profile:
            return _apply_profile(image, profile), "CMYK was converted to sRGB with its ICC profile"
    return image.convert("RGB"), "CMYK was converted to sRGB without an ICC profile: the colors are approximate"


def _to_srgb(values: Values, data: bytes) -> tuple[Values, bytes | None, tuple[str, ...]]:
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
