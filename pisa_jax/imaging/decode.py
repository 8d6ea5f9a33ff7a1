"""What an image file holds -> channels in [0, 1], upright and in sRGB, and the metadata worth keeping."""

import contextlib
import io
from typing import NamedTuple

import cv2
import numpy as np
from jaxtyping import Float32, Shaped
from PIL import Image, ImageCms
from PIL.ExifTags import Base

from pisa_jax.imaging import icc

# EXIF tags that describe the photograph: document, description, make, model, orientation, resolution, software, date,
# artist, computer, ratings, copyright, EXIF and GPS directories, Windows' title to subject. All others describe the
# old file's layout, its place on a map per pixel, or its thumbnail, and would be wrong in a new file.
EXIF_KEPT = {269, 270, 271, 272, 274, 282, 283, 296, 305, 306, 315, 316, 18246, 18249, 33432, 34665, 34853}
EXIF_KEPT |= {40091, 40092, 40093, 40094, 40095}


class ImageError(ValueError):
    """A picture that cannot be read or written; the message says why."""


class Channels(NamedTuple):
    """Pixels of a file: one channel is grey, three are RGB; alpha is not multiplied into them; bits are 8 or 16."""

    values: Float32[np.ndarray, "h w c"]
    alpha: Float32[np.ndarray, "h w"] | None
    bits: int


def read_exif(image: Image.Image) -> tuple[int, bytes | None, tuple[str, ...]]:
    """(orientation to apply, block to keep with orientation 1, notes). Pillow itself has turned a loaded TIFF."""
    orientation = 1
    try:
        orientation = image.getexif().get(Base.Orientation, 1)
        exif = Image.Exif()
        exif.load(image.getexif().tobytes())  # a copy: the image keeps its own
        for tag in set(exif) - EXIF_KEPT:
            del exif[tag]
        if Base.Orientation in exif:
            exif[Base.Orientation] = 1
        return orientation, exif.tobytes() if len(exif) else None, ()
    except Exception:  # Pillow's parser raises anything on damaged data
        return orientation, None, ("its EXIF data is damaged and left out",)


def upright(array: Shaped[np.ndarray, "h w *c"], orientation: int) -> Shaped[np.ndarray, "h2 w2 *c"]:
    """Apply an EXIF orientation, 1 to 8 (EXIF 2.3, tag 274); anything else is taken for 1."""
    if orientation in (5, 6, 7, 8):
        array = array.swapaxes(0, 1)
    if orientation in (2, 3, 6, 7):
        array = array[:, ::-1]
    if orientation in (3, 4, 7, 8):
        array = array[::-1]
    return np.ascontiguousarray(array)


def has_16_bits(image: Image.Image, data: bytes) -> bool:
    """Whether the file `data`, opened as `image`, is a PNG or TIFF of more than 8 bits per channel."""
    if image.format == "PNG":
        return data[24] == 16  # the bit depth in IHDR
    return image.format == "TIFF" and 16 in image.tag_v2.get(Base.BitsPerSample, ())


def channels_16(image: Image.Image, data: bytes) -> Channels | None:
    """A 16-bit PNG or TIFF by OpenCV (Pillow cuts colour to 8 bits), which also turns a TIFF; None if it cannot."""
    try:
        samples = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    except cv2.error:
        return None
    if samples is None or samples.dtype != np.uint16 or samples.shape[:2] != image.size[::-1]:
        return None
    samples = samples.reshape(*samples.shape[:2], -1)
    gray = samples.shape[-1] == 1 or (image.format == "PNG" and data[25] == 4)  # colour type in IHDR: grey + alpha
    values = samples[..., :1] if gray else samples[..., 2::-1]
    values, alpha = values.astype(np.float32) / 65535, None
    if gray and "transparency" in image.info:  # the one grey that is transparent
        alpha = (samples[..., 0] != image.info["transparency"]).astype(np.float32)
    elif samples.shape[-1] == 4 and image.has_transparency_data:
        alpha = samples[..., 3].astype(np.float32) / 65535
    tags = image.tag_v2 if image.format == "TIFF" else {}
    if alpha is not None and tags.get(Base.ExtraSamples) == (1,):  # multiplied into the colours
        values = np.divide(values, alpha[..., None], out=np.zeros_like(values), where=alpha[..., None] > 0)
    if tags.get(Base.PhotometricInterpretation) == 0:  # white is 0
        values = 1 - values
    return Channels(values, alpha, 16)


def channels_of(image: Image.Image) -> Channels:
    """What Pillow holds: 8 bits of any mode, or 16 bits of grey. ImageError for floats, 32-bit integers, Lab, ..."""
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
        samples = np.asarray(image.convert(mode), np.float32) / 255
    except ValueError as error:
        raise ImageError(f"holds {image.mode} pixels; save it as grey, RGB or CMYK with 8 or 16 bits") from error
    samples = samples.reshape(image.height, image.width, -1)
    return Channels(samples[..., : 1 if gray else 3], samples[..., -1] if transparent else None, 8)


def from_cmyk(image: Image.Image, profile: bytes | None) -> tuple[Image.Image, str]:
    """(sRGB, note), through the profile if there is a usable one, else by Pillow's formula."""
    with contextlib.suppress(ImageCms.PyCMSError, OSError):
        if profile:
            return _managed(image, profile), "CMYK converted to sRGB through its profile"
    return image.convert("RGB"), "CMYK converted to sRGB without a profile: its colours are approximate"


def to_srgb(
    values: Float32[np.ndarray, "h w c"], data: bytes
) -> tuple[Float32[np.ndarray, "h w c"], bytes | None, tuple[str, ...]]:
    """(values in sRGB, profile to write back, notes) of grey or RGB values under the profile `data`."""
    gray = values.shape[-1] == 1
    if icc.color_space(data) != ("GRAY" if gray else "RGB"):
        return values, None, (f"its colour profile is for {icc.color_space(data)}, not for its pixels, and left out",)
    try:
        profile = icc.parse(data)
        if profile is not None:
            return values if icc.is_srgb(profile) else icc.to_srgb(values, profile), data, ()
        if gray:
            return values, data, ("its grey profile is not a curve: kept, but not applied",)
        srgb = _managed(Image.fromarray(np.rint(values * 255).astype(np.uint8)), data)
        note = "converted to sRGB with 8 bits: its colour profile is not curves and a matrix"
        return np.asarray(srgb, np.float32) / 255, None, (note,)
    except (ValueError, OSError, ImageCms.PyCMSError):
        return values, None, ("its colour profile is damaged and left out",)


def _managed(image: Image.Image, profile: bytes) -> Image.Image:
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    return ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
