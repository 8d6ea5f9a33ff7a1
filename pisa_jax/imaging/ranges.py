"""Conversions between the value ranges of images: uint8 0..255, unit [0, 1], signed [-1, 1]."""

from typing import Any

import numpy as np
from jaxtyping import Float, Float32, UInt8


def uint8_to_unit(image: UInt8[np.ndarray, "*shape"]) -> Float32[np.ndarray, "*shape"]:
    """x / 255."""
    return np.divide(image, np.float32(255), dtype=np.float32)


def uint8_to_signed(image: UInt8[np.ndarray, "*shape"]) -> Float32[np.ndarray, "*shape"]:
    """x / 127.5 - 1, equal to `unit_to_signed(uint8_to_unit(x))` in every bit and with one temporary array less."""
    scaled = np.divide(image, np.float32(127.5), dtype=np.float32)
    return np.subtract(scaled, np.float32(1), out=scaled)


def unit_to_uint8(image: Float[np.ndarray, "*shape"]) -> UInt8[np.ndarray, "*shape"]:
    """Clip to [0, 1], scale by 255 and round to nearest, halves to even."""
    return np.rint(np.clip(image, 0, 1) * 255).astype(np.uint8)


def signed_to_uint8(image: Float[np.ndarray, "*shape"]) -> UInt8[np.ndarray, "*shape"]:
    """Clip to [-1, 1], map to 0..255 and round to nearest, halves to even."""
    return unit_to_uint8(signed_to_unit(image))


def unit_to_signed(image: Any) -> Any:
    """2 x - 1 of a NumPy or JAX array."""
    return image * 2 - 1


def signed_to_unit(image: Any) -> Any:
    """(x + 1) / 2 of a NumPy or JAX array."""
    return (image + 1) / 2
