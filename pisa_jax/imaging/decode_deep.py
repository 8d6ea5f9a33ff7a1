"""Decode images of more than 8 bits per channel, which Pillow reduces to 8."""

import io

import imagecodecs
import numpy as np

from pisa_jax.imaging.image_data import ImageError
from pisa_jax.imaging.pixels import Channels, to_unit


def png_channels(data: bytes) -> Channels:
    """Decode a PNG of 16 bits with libpng."""
    return _channels(imagecodecs.png_decode(data), 65535)


def avif_channels(data: bytes, bits: int) -> Channels:
    """Decode the first image of an AVIF of 10 or 12 bits with libavif, before its orientation is applied."""
    return _channels(imagecodecs.avif_decode(data, index=0), 2**bits - 1)


def heif_channels(data: bytes) -> Channels:
    """Decode the primary image of an HEIF of 10 or 12 bits with libheif, upright."""
    import pillow_heif  # optional; `image_files.readable_formats` has found it

    file = pillow_heif.open_heif(io.BytesIO(data), convert_hdr_to_8bit=False)
    return _channels(np.asarray(file), 65535)  # libheif scales samples to 16 bits


def jpeg2000_channels(data: bytes, bits: int, reduced: Channels) -> Channels:
    """Decode a JPEG 2000 with OpenJPEG; `reduced` is what Pillow decodes, in which white can wrap around to black.

    Raises:
        ImageError: other pixels than `reduced`: Pillow has converted a color space that OpenJPEG only decodes.
    """
    channels = _channels(imagecodecs.jpeg2k_decode(data), 2**bits - 1)
    if channels.values.shape == reduced.values.shape and (channels.alpha is None) == (reduced.alpha is None):
        levels = 255 * np.abs(channels.values - to_unit(reduced.values))
        if np.minimum(levels, 256 - levels).max() <= 2:
            return channels
    raise ImageError(f"holds {bits} bits per channel in an unusual color space; save it as RGB, or with 8 bits")


def find_jpeg_precision(data: bytes) -> int | None:
    """Return the offset of the bits per sample in a JPEG that has more than 8, else None (ITU-T T.81, B.2.2)."""
    place = 2
    while data.startswith(b"\xff\xd8") and data[place : place + 1] == b"\xff" and place + 4 < len(data):
        marker = data[place + 1]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            return place + 4 if data[place + 4] > 8 else None
        place += 2 + int.from_bytes(data[place + 2 : place + 4], "big")
    return None


def jpeg_channels(data: bytes) -> Channels:
    """Decode a JPEG of 12 bits with libjpeg-turbo.

    Raises:
        ImageError: the file is truncated, which libjpeg-turbo does not report, or holds CMYK.
    """
    if data.rfind(b"\xff\xd9") < data.rfind(b"\xff\xda"):  # end of image, start of scan
        raise ImageError("is damaged: the image is truncated")
    samples = imagecodecs.jpeg_decode(data)
    if samples.ndim == 3 and samples.shape[-1] != 3:
        raise ImageError("holds CMYK with 12 bits; save it as RGB")
    return _channels(samples, 4095)


def _channels(samples: np.ndarray, largest: int) -> Channels:
    values = samples.reshape(*samples.shape[:2], -1).astype(np.float32) / largest
    has_alpha = values.shape[-1] in (2, 4)
    return Channels(values[..., : 1 if values.shape[-1] < 3 else 3], values[..., -1] if has_alpha else None, 16)
