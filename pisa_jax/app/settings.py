"""Settings of the page: one scale for each adapter, and the painted area where other scales hold."""

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import cv2
import numpy as np
from jaxtyping import Float32, UInt8
from PIL import Image

from pisa_jax.config import Scales
from pisa_jax.imaging.ranges import uint8_to_unit
from pisa_jax.runtime.messages import number_text

LARGEST_MASK = 4096  # pixels a side; the viewer sends at most 1024


class ScaleMap(NamedTuple):
    """A scale map as `pisa-sr infer --sem-map` reads it: a gray image, and the scale that white stands for."""

    gray: UInt8[np.ndarray, "h w"]
    white: float

    def values(self) -> Float32[np.ndarray, "h w"]:
        """Return the scale at every pixel."""
        return np.float32(self.white) * uint8_to_unit(self.gray)

    def png(self) -> bytes:
        """Encode the gray image."""
        file = io.BytesIO()
        Image.fromarray(self.gray).save(file, "PNG")
        return file.getvalue()


@dataclass(frozen=True)
class Painted:
    """A painted area: its scales, and the width of its soft edge in percent of the shorter side."""

    area: UInt8[np.ndarray, "h w"]
    scales: Scales
    softness: float = 0.0

    def strength(self) -> Float32[np.ndarray, "h w"]:
        """Return 1 inside the area, 0 outside, and a Gaussian transition of about the width of the soft edge."""
        hard = (self.area > 127).astype(np.float32)
        sigma = self.softness / 100 * min(hard.shape) / 4  # the transition covers about 4 sigma
        return cv2.GaussianBlur(hard, (0, 0), sigma, borderType=cv2.BORDER_REPLICATE) if sigma > 0 else hard


@dataclass(frozen=True)
class Setting:
    """Scales of the adapters, in their order, and the painted area with its own."""

    scales: Scales
    painted: Painted | None = None

    def maps(self) -> list[float | ScaleMap]:
        """Return a number for each adapter whose scale is the same everywhere, and a map for the others."""
        if self.painted is None or not (self.painted.area > 127).any():
            return list(self.scales)
        strength = self.painted.strength()
        return [_blend(*pair, strength) for pair in zip(self.scales, self.painted.scales, strict=True)]

    def label(self, names: Sequence[str]) -> str:
        """Format the scales as "pix 1, sem 0.5", with those of the painted area where they differ."""
        inside = self.painted.scales if self.painted else self.scales
        parts = []
        for name, outer, inner in zip(names, self.scales, inside, strict=True):
            other = "" if inner == outer else f" (painted {number_text(inner)})"
            parts.append(f"{name} {number_text(outer)}{other}")
        return ", ".join(parts)


def _blend(outside: float, inside: float, strength: Float32[np.ndarray, "h w"]) -> float | ScaleMap:
    white = max(outside, inside)
    if outside == inside:
        return outside
    values = outside + (inside - outside) * strength
    return ScaleMap(np.rint(values / white * 255).astype(np.uint8), white)


def check_range(name: str, value: Any, least: float | int, most: float | int) -> float:
    """Return `value` as a float; raises ValueError unless it is in [least, most]."""
    if not isinstance(value, int | float) or not math.isfinite(value) or not least <= value <= most:
        raise ValueError(
            f"{name} is {value!r}; allowed are numbers from {number_text(float(least))} to {number_text(float(most))}"
        )
    return float(value)


def read_area(png: bytes) -> UInt8[np.ndarray, "h w"]:
    """Read a painted area: the opacity of a PNG.

    Raises:
        ValueError: it is no such PNG, or one of more than `LARGEST_MASK` pixels a side.
    """
    try:
        with Image.open(io.BytesIO(png), formats=["PNG"]) as image:
            if max(image.size) > LARGEST_MASK or image.mode != "RGBA":
                raise ValueError(f"it has the mode {image.mode} and {image.size} pixels")
            return np.asarray(image.getchannel("A"))
    except Exception as error:  # Pillow raises arbitrary exceptions on damaged data
        raise ValueError(
            f"the painted area is not an RGBA image of at most {LARGEST_MASK} pixels a side: {error}"
        ) from None
