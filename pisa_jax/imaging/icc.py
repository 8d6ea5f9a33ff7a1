"""Conversion between sRGB and the colors of ICC profiles made of tone curves and a matrix, in floating point.

LittleCMS, as shipped with Pillow, converts 8-bit pixels only and clips colors outside sRGB. The profiles embedded by
cameras, phones and editors (Adobe RGB, Display P3, ProPhoto, Rec. 2020, gray gamma, ...) consist of tone curves and a
matrix. Converted here, 16-bit data keeps its precision, and colors outside sRGB become values outside [0, 1].
"""

import functools
import struct
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Float32

_STEPS = 65536  # one per 16-bit value, so that reading a file needs no interpolation
# From linear sRGB to XYZ under D50, the white point of every ICC profile (IEC 61966-2-1, Bradford adaptation).
_SRGB_TO_XYZ = np.array(
    [[0.4360747, 0.3850649, 0.1430804], [0.2225045, 0.7168786, 0.0606169], [0.0139322, 0.0971045, 0.7141733]]
)
_PARAMETERS = (1, 3, 4, 5, 7)  # number of parameters of a parametric curve, by its kind


class Profile(NamedTuple):
    """Tone curves from values to linear light, sampled evenly on [0, 1], and the matrix from light to linear sRGB."""

    curves: Float[np.ndarray, "c n"]
    matrix: Float[np.ndarray, "c c"]


def color_space(icc: bytes) -> str:
    """Color space of the pixels that a profile describes: "RGB", "GRAY", "CMYK", ... (ICC.1, 7.2.8)."""
    return icc[16:20].decode("ascii", "replace").strip()


@functools.lru_cache(maxsize=8)  # 8 ms per image otherwise, and the images of a data set share few profiles
def parse(icc: bytes) -> Profile | None:
    """Parse a gray or RGB profile; None if it is not made of curves and a matrix.

    Raises:
        ValueError: the profile is damaged.
    """
    try:
        (count,) = struct.unpack_from(">I", icc, 128)
        entries = (struct.unpack_from(">4sII", icc, 132 + 12 * i) for i in range(count))
        tags = {name: icc[start : start + size] for name, start, size in entries}
        if color_space(icc) == "GRAY" and b"kTRC" in tags and icc[20:24] == b"XYZ ":
            return Profile(_curve(tags[b"kTRC"])[None], np.eye(1))
        if color_space(icc) != "RGB" or not {b"rXYZ", b"gXYZ", b"bXYZ", b"rTRC", b"gTRC", b"bTRC"} <= tags.keys():
            return None
        colorants = [struct.unpack_from(">3i", tags[name], 8) for name in (b"rXYZ", b"gXYZ", b"bXYZ")]
        matrix = np.linalg.inv(_SRGB_TO_XYZ) @ (np.array(colorants).T / 65536)
        return Profile(np.stack([_curve(tags[name]) for name in (b"rTRC", b"gTRC", b"bTRC")]), matrix)
    except (struct.error, IndexError, ValueError) as error:
        raise ValueError(f"the ICC profile is damaged: {error}") from error


def _curve(data: bytes) -> Float[np.ndarray, " n"]:
    """Sample a curveType or parametricCurveType tag (ICC.1, 10.6 and 10.18)."""
    x = np.linspace(0, 1, _STEPS)
    if data[:4] == b"para":
        (kind,) = struct.unpack_from(">H", data, 8)
        p = np.array(struct.unpack_from(f">{_PARAMETERS[kind]}i", data, 12)) / 65536
        gain, offset = (p[1], p[2]) if kind else (1.0, 0.0)
        power = np.maximum(gain * x + offset, 0) ** p[0]
        if kind < 3:
            y = power + (p[3] if kind == 2 else 0)
        else:
            above, below = (p[5], p[6]) if kind == 4 else (0, 0)
            y = np.where(x >= p[4], power + above, p[3] * x + below)
    else:
        (count,) = struct.unpack_from(">I", data, 8)
        if count == 0:
            y = x
        elif count == 1:
            y = x ** (struct.unpack_from(">H", data, 12)[0] / 256)
        else:
            y = np.interp(x, np.linspace(0, 1, count), np.frombuffer(data, ">u2", count, 12) / 65535)
    return np.maximum.accumulate(np.clip(y, 0, 1))  # a decreasing curve has no inverse


def to_srgb(values: Float[np.ndarray, "*n c"], profile: Profile) -> Float32[np.ndarray, "*n c"]:
    """Convert pixel values in [0, 1] to sRGB, which is outside [0, 1] for colors outside the sRGB gamut."""
    steps = np.rint(np.clip(values, 0, 1) * (_STEPS - 1)).astype(np.uint16)
    light = np.stack([curve.astype(np.float32)[steps[..., i]] for i, curve in enumerate(profile.curves)], -1)
    linear = light @ profile.matrix.T.astype(np.float32)
    size = np.abs(linear)
    return np.copysign(np.where(size <= 0.0031308, 12.92 * size, 1.055 * size ** (1 / 2.4) - 0.055), linear)


def from_srgb(srgb: Float[np.ndarray, "*n c"], profile: Profile) -> Float32[np.ndarray, "*n c"]:
    """Convert sRGB, also outside [0, 1], to pixel values in [0, 1]; colors outside the profile's gamut are clipped."""
    size = np.abs(srgb).astype(np.float32)
    linear = np.copysign(np.where(size <= 0.04045, size / 12.92, ((size + 0.055) / 1.055) ** 2.4), srgb)
    light = linear @ np.linalg.inv(profile.matrix).T.astype(np.float32)
    values = [np.interp(light[..., i], *_inverse(curve)) for i, curve in enumerate(profile.curves)]
    return np.stack(values, -1).astype(np.float32)


def _inverse(curve: Float[np.ndarray, " n"]) -> tuple[Float[np.ndarray, " m"], Float[np.ndarray, " m"]]:
    """Invert a curve to (light, value) without its constant parts; black has the value 0, full light the value 1."""
    light, first = np.unique(curve, return_index=True)
    values = first / (_STEPS - 1)
    values[-1] = 1
    return light, values


def is_srgb(profile: Profile) -> bool:
    """Return True if converting with this profile changes no color by a whole 8-bit level."""
    channels = len(profile.curves)
    grid = np.stack(np.meshgrid(*[np.linspace(0, 1, 9)] * channels), -1).reshape(-1, channels)
    return bool(np.abs(to_srgb(grid, profile) - grid).max() < 1 / 255)
