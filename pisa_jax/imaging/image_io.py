"""Image files in and out, and the way of a picture to the network and back.

A `Picture` is what a file shows, upright and in sRGB, with what must survive: alpha, 16 bits, greyness, EXIF, profile.

Colour: a profile other than sRGB is applied on reading, so that the network sees sRGB, and undone on writing, so that
the file keeps its profile and its colours. Colours outside sRGB are values outside [0, 1]: the network sees them
clipped, and `finish` adds what was clipped to its result. Profiles that are not curves and a matrix (all CMYK ones)
are converted to sRGB for good.
"""

import dataclasses
import io
import os
import struct
import warnings
from pathlib import Path

import cv2
import numpy as np
from jaxtyping import Float, Float32, Shaped, UInt8
from PIL import Image, UnidentifiedImageError

from pisa_jax.imaging import decode, icc
from pisa_jax.imaging.decode import ImageError
from pisa_jax.imaging.encode import encode
from pisa_jax.runtime.atomic_write import atomic_write

# What is opened. Pillow can do more, but some of it runs other programs (EPS) or is no picture.
READABLE = ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "DIB", "GIF", "PPM", "AVIF", "JPEG2000", "TGA", "ICO")
WRITABLE = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp", ".tif": "tiff", ".tiff": "tiff"}
SUFFIXES = {"png": ".png", "jpg": ".jpg", "jpeg": ".jpg", "webp": ".webp", "tiff": ".tiff"}
DEEP = ("png", "tiff")  # can be written with 16 bits
LARGEST_SIDE = {"jpeg": 65500, "webp": 16383}
LARGEST_JPEG_EXIF = 65533


@dataclasses.dataclass(frozen=True, eq=False)
class Picture:
    """A decoded picture, upright and in sRGB."""

    # sRGB; three equal channels if `gray`; outside [0, 1] only for colours that sRGB lacks
    rgb: Float32[np.ndarray, "h w 3"]
    # opacity in [0, 1], not multiplied into rgb
    alpha: Float32[np.ndarray, "h w"] | None = None
    # grey or bilevel source: written as grey
    gray: bool = False
    # per channel, of the source: 8 or 16
    bits: int = 8
    # "Exif\0\0...", orientation 1, no thumbnail
    exif: bytes | None = None
    # the profile the file had and will have again
    icc: bytes | None = None
    # of the source: "png", "jpeg", "webp", "tiff", "bmp", "gif", ...; "" if it was no file
    format: str = ""
    # what a user should be told
    notes: tuple[str, ...] = ()


def read_picture(path: str | os.PathLike) -> Picture:
    """Read the first picture of a file. ImageError if it holds none or a damaged one, OSError if it cannot be read."""
    data = Path(path).read_bytes()
    if not data:
        raise ImageError(f"{path} is empty (0 bytes)")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's remarks on large pictures and odd tags
            image = Image.open(io.BytesIO(data), formats=READABLE)
            return _decode(image, data)
    except UnidentifiedImageError:
        raise ImageError(f"{path} is not a picture that can be read here ({', '.join(READABLE)})") from None
    except Image.DecompressionBombError as error:
        raise ImageError(f"{path}: {error} To allow more, set PIL.Image.MAX_IMAGE_PIXELS.") from None
    except ImageError as error:
        raise ImageError(f"{path}: {error}") from None
    except MemoryError:
        raise
    except Exception as error:  # decoders raise anything on damaged data
        raise ImageError(f"{path} is damaged: {error}") from error


def read_rgb8(path: str | os.PathLike) -> UInt8[np.ndarray, "h w 3"]:
    """A picture file as published figures see it, in 8 bit and without alpha; raises as `read_picture` does."""
    return _quantized(read_picture(path).rgb, 8)


def from_pil(image: Image.Image) -> Picture:
    """Take over a Pillow image with alpha, EXIF orientation and profile. ImageError if its mode means nothing here."""
    return _decode(image, b"")


def _decode(image: Image.Image, data: bytes) -> Picture:
    """Turn an opened image into a Picture; `data` is the file, if any: Pillow alone would cut 16-bit colour to 8."""
    notes, image_format = [], image.format or ""
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image_format != "MPO":  # where phones put previews behind the picture
        notes.append(f"animated or of several pages: only the first of {frames} is used")
    image.load()  # finds truncation, which OpenCV lets pass
    if 0 in image.size:
        raise ImageError(f"the picture has no pixels ({image.width}x{image.height})")
    orientation, exif, exif_notes = decode.read_exif(image)
    profile, profile_notes, channels = image.info.get("icc_profile"), (), None
    if image.mode == "CMYK":
        image, note = decode.from_cmyk(image, profile)
        notes.append(note)
        profile = None
    elif data and decode.has_16_bits(image, data):
        channels = decode.channels_16(image, data)
        notes += [] if channels else ["16-bit file that could be read with 8 bits only"]
    values, alpha, bits = channels or decode.channels_of(image)
    gray = values.shape[-1] == 1
    if profile:
        values, profile, profile_notes = decode.to_srgb(values, profile)
    return Picture(
        rgb=decode.upright(np.repeat(values, 3, -1) if gray else values, orientation),
        alpha=None if alpha is None else decode.upright(alpha, orientation),
        gray=gray,
        bits=bits,
        exif=exif,
        icc=profile or None,
        format="jpeg" if image_format == "MPO" else image_format.lower(),
        notes=(*notes, *exif_notes, *profile_notes),
    )


def from_array(array: Shaped[np.ndarray, "h w *c"]) -> Picture:
    """Take over sRGB integers, or floats in [0, 1]: (h, w) or (h, w, 1 to 4) for grey, grey + alpha, RGB, RGBA."""
    if array.ndim not in (2, 3) or 0 in array.shape or (array.ndim == 3 and array.shape[2] > 4):
        raise ImageError(f"an array of shape {array.shape} is no picture; expected (h, w) or (h, w, 1 to 4), not empty")
    tops = {"uint8": 255, "uint16": 65535, "bool": 1}
    floating = np.issubdtype(array.dtype, np.floating)
    if not floating and array.dtype.name not in tops:
        raise ImageError(f"an array of {array.dtype} is no picture; expected {', '.join(tops)} or floats in [0, 1]")
    values = array.astype(np.float32) / tops.get(array.dtype.name, 1)
    if floating and not (values.min() >= 0 and values.max() <= 1):
        raise ImageError(f"floats must be in [0, 1], not [{values.min()}, {values.max()}]; divide by the largest value")
    values = values.reshape(*array.shape[:2], -1)
    channels = values.shape[-1]
    rgb = values[..., :3] if channels > 2 else np.repeat(values[..., :1], 3, -1)
    bits = 16 if array.dtype == np.uint16 else 8
    return Picture(rgb, values[..., -1] if channels in (2, 4) else None, gray=channels < 3, bits=bits)


def to_array(picture: Picture, dtype: type = np.uint8) -> Shaped[np.ndarray, "h w *c"]:
    """sRGB values as `from_array` takes them: uint8 and uint16 rounded, floats in [0, 1]; grey is (h, w)."""
    values = _with_alpha(picture.rgb[..., :1] if picture.gray else picture.rgb, picture.alpha)
    if np.dtype(dtype) in (np.uint8, np.uint16):
        values = _quantized(values, np.dtype(dtype).itemsize * 8)
    elif np.issubdtype(dtype, np.floating):
        values = np.clip(values, 0, 1).astype(dtype)
    else:
        raise ImageError(f"no picture is made of {np.dtype(dtype)}; allowed: uint8, uint16 and floats")
    return values[..., 0] if values.shape[-1] == 1 else values


def to_pil(picture: Picture) -> Image.Image:
    """An 8-bit Pillow image in the colours of the profile, which is in its `info` with the EXIF, where `save` looks."""
    samples = _samples(picture, 8)
    image = Image.fromarray(samples[..., 0] if samples.shape[-1] == 1 else samples)
    image.info.update({k: v for k, v in (("icc_profile", picture.icc), ("exif", picture.exif)) if v})
    return image


def _with_alpha(values: Float32[np.ndarray, "h w c"], alpha: Float32[np.ndarray, "h w"] | None) -> np.ndarray:
    return values if alpha is None else np.concatenate([values, alpha[..., None]], -1)


def _quantized(values: Float[np.ndarray, "*n"], bits: int) -> np.ndarray:
    """[0, 1] -> integers: the only rounding on the way from the network to a file."""
    top = 2**bits - 1
    return np.rint(np.clip(values, 0, 1) * top).astype(np.uint8 if bits == 8 else np.uint16)


def _samples(picture: Picture, bits: int) -> np.ndarray:
    """What goes into a file: (h, w, c) integers in the colours of the picture's profile."""
    values = picture.rgb[..., :1] if picture.gray else picture.rgb
    profile = icc.parse(picture.icc) if picture.icc else None
    if profile is not None and not icc.is_srgb(profile):
        values = icc.from_srgb(values, profile)
    return _quantized(_with_alpha(values, picture.alpha), bits)


def output_suffix(source: Picture, ext: str = "auto") -> str:
    """File suffix for --ext auto|png|jpg|webp|tiff; auto is the source's format where it loses nothing, else PNG."""
    if ext == "auto":
        lossy = source.format not in DEEP and (
            source.bits == 16 or (source.format == "jpeg" and source.alpha is not None)
        )
        ext = source.format if source.format in SUFFIXES and not lossy else "png"
    if ext not in SUFFIXES:
        raise ImageError(f"cannot write {ext!r}; allowed: auto, {', '.join(SUFFIXES)}")
    return SUFFIXES[ext]


def write_picture(path: str | os.PathLike, picture: Picture, quality: int = 95) -> tuple[str, ...]:
    """Write in the format of the suffix and return notes on what that format could not hold.

    The file appears whole or not at all. ImageError if the format cannot hold the picture, OSError if the file cannot
    be written. `quality` is that of JPEG and WebP.
    """
    path = Path(path)
    kind = WRITABLE.get(path.suffix.lower())
    if kind is None:
        raise ImageError(f"cannot write {path}: {path.suffix!r} is none of {', '.join(WRITABLE)}")
    if not np.isfinite(picture.rgb).all():
        raise ImageError(f"cannot write {path}: the picture holds values that are not finite")
    try:
        picture, notes = _adapted(picture, kind)
        data = encode(_samples(picture, picture.bits), kind, quality, picture.exif, picture.icc)
    except (ValueError, OSError, struct.error, cv2.error) as error:
        raise ImageError(f"cannot write {path}: {error}") from error
    with atomic_write(path) as file:
        file.write_bytes(data)
    return notes


def _adapted(picture: Picture, kind: str) -> tuple[Picture, tuple[str, ...]]:
    """Reduce a picture to what a format can hold; notes on what that cost."""
    notes, changes = [], {}
    largest, side = LARGEST_SIDE.get(kind), max(picture.rgb.shape)
    if largest and side > largest:
        raise ImageError(f"{kind} holds at most {largest} pixels a side, not {side}; use png or tiff")
    if kind == "jpeg" and picture.alpha is not None:
        opacity = picture.alpha[..., None]
        changes |= {"rgb": picture.rgb * opacity + (1 - opacity), "alpha": None}
        notes += ["transparency flattened onto white: JPEG holds none"] if opacity.min() < 1 else []
    if picture.bits == 16 and kind not in DEEP:
        changes |= {"bits": 8}
        notes.append(f"16 bits per channel rounded to 8: {kind} holds no more")
    if kind == "jpeg" and len(picture.exif or b"") > LARGEST_JPEG_EXIF:
        changes |= {"exif": None}
        notes.append("EXIF data left out: too long for JPEG")
    if picture.gray and (kind == "webp" or (picture.bits == 16 and picture.alpha is not None and kind in DEEP)):
        changes |= {"gray": False, "icc": None}  # neither is in the format: three equal sRGB channels
    return dataclasses.replace(picture, **changes), tuple(notes)
