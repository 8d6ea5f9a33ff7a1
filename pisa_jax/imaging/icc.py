"""Conversion between sRGB and the colors of ICC profiles made of tone curves and a matrix, in floating point.

LittleCMS, as shipped with Pillow, converts 8-bit pixels only and clips colors outside sRGB. The profiles embedded by
cameras, phones and editors (Adobe RGB, Display P3, ProPhoto, Rec. 2020, gray gamma, ...) consist of tone curves and a
matrix. Converted here, 16-bit data keeps its precision, and colors outside sRGB become values outside [0, 1].
"""

import functools
import struct
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Float32

_STEPS = 65536  # one per 16-bit value, so that reading a file needs no interpolation
# From linear sRGB to XYZ under D50, the white point of every ICC profile (IEC 61966-2-1, Bradford adaptation).
_SRGB_TO_XYZ = np.array(
    [[0.4360747, 0.3850649, 0.1430804], [0.2225045, 0.7168786, 0.0606169], [0.0139322, 0.0971045, 0.7141733]]
)
_PARAMETERS = (1, 3, 4, 5, 7)  # number of parameters of a parametric curve, by its kind
_D50 = (0.9642, 1.0, 0.8249)
_BRADFORD = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])
# Chromaticities (x, y) of white, red, green and blue, by their number in ITU-T H.273.
PRIMARIES = {
    1: (0.3127, 0.329, 0.64, 0.33, 0.3, 0.6, 0.15, 0.06),  # BT.709, sRGB
    5: (0.3127, 0.329, 0.64, 0.33, 0.29, 0.6, 0.15, 0.06),  # BT.601, 625 lines
    6: (0.3127, 0.329, 0.63, 0.34, 0.31, 0.595, 0.155, 0.07),  # BT.601, 525 lines
    9: (0.3127, 0.329, 0.708, 0.292, 0.17, 0.797, 0.131, 0.046),  # BT.2020
    11: (0.314, 0.351, 0.68, 0.32, 0.265, 0.69, 0.15, 0.06),  # DCI P3
    12: (0.3127, 0.329, 0.68, 0.32, 0.265, 0.69, 0.15, 0.06),  # Display P3
}


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


def parametric_curve(kind: int, *parameters: float) -> bytes:
    """Encode a parametricCurveType tag (ICC.1, 10.18)."""
    return b"para" + bytes(4) + struct.pack(f">HH{len(parameters)}i", kind, 0, *_fixed(parameters))


def _fixed(numbers: Iterable[float]) -> list[int]:
    return [round(number * 65536) for number in numbers]


SRGB_CURVE = parametric_curve(3, 2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)
_BT709_CURVE = parametric_curve(3, 1 / 0.45, 1 / 1.099, 0.099 / 1.099, 1 / 4.5, 0.081)
# Curves from values to light, by their number in ITU-T H.273.
TRANSFERS = dict.fromkeys((1, 6, 14, 15), _BT709_CURVE)
TRANSFERS |= {4: parametric_curve(0, 2.2), 5: parametric_curve(0, 2.8), 8: parametric_curve(0, 1.0), 13: SRGB_CURVE}


def spans_colors(chromaticities: Sequence[float]) -> bool:
    """Return True if white, red, green and blue of these chromaticities can be the base of a profile."""
    try:
        return bool((np.abs(_colorants(chromaticities)) < 100).all())
    except (ZeroDivisionError, np.linalg.LinAlgError):
        return False


def _colorants(chromaticities: Sequence[float]) -> Float[np.ndarray, "3 3"]:
    """XYZ of red, green and blue (columns) under D50, from (x, y) of white, red, green and blue."""
    pairs = zip(chromaticities[::2], chromaticities[1::2], strict=True)
    white, *primaries = (np.array([x / y, 1, (1 - x - y) / y]) for x, y in pairs)
    columns = np.stack(primaries, 1)
    columns = columns * np.linalg.solve(columns, white)
    gains = (_BRADFORD @ _D50) / (_BRADFORD @ white)
    return np.linalg.inv(_BRADFORD) @ np.diag(gains) @ _BRADFORD @ columns


def make_profile(chromaticities: Sequence[float], curve: bytes, gray: bool) -> bytes:
    """Make a display profile (ICC.1, version 4) of chromaticities (see `PRIMARIES`) and one curve tag."""

    def xyz(values: Iterable[float]) -> bytes:
        return b"XYZ " + bytes(4) + struct.pack(">3i", *_fixed(values))

    def text(content: str) -> bytes:
        encoded = content.encode("utf-16-be")
        return b"mluc" + bytes(4) + struct.pack(">II4sII", 1, 12, b"enUS", len(encoded), 28) + encoded

    tags = {b"desc": text("Color space of a PNG file"), b"cprt": text("CC0"), b"wtpt": xyz(_D50)}
    if gray:
        tags[b"kTRC"] = curve
    else:
        tags |= zip((b"rXYZ", b"gXYZ", b"bXYZ"), map(xyz, _colorants(chromaticities).T), strict=True)
        tags |= dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve)
    table, body = struct.pack(">I", len(tags)), b""
    for name, data in tags.items():
        table += struct.pack(">4sII", name, 132 + 12 * len(tags) + len(body), len(data))
        body += data + bytes(-len(data) % 4)
    head = struct.pack(">4sI4s4s4s", bytes(4), 0x04200000, b"mntr", b"GRAY" if gray else b"RGB ", b"XYZ ")
    head += struct.pack(">6H4s28x3i48x", 2026, 1, 1, 0, 0, 0, b"acsp", *_fixed(_D50))
    return struct.pack(">I", 4 + len(head) + len(table) + len(body)) + head + table + body


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
