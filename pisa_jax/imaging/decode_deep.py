"""Decode images of more than 8 bits per channel, which Pillow reduces to 8."""

import io

import imagecodecs
import numpy as np

from pisa_jax.imaging.pixels import Channels


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


def _channels(samples: np.ndarray, largest: int) -> Channels:
    values = samples.reshape(*samples.shape[:2], -1).astype(np.float32) / largest
    has_alpha = values.shape[-1] in (2, 4)
    return Channels(values[..., : 1 if values.shape[-1] < 3 else 3], values[..., -1] if has_alpha else None, 16)
