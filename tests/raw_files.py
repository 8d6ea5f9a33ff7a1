"""Files and ICC profiles written byte by byte, as independent inputs of tests."""

import io
import struct
import zlib

import numpy as np
from PIL.TiffImagePlugin import ImageFileDirectory_v2

# Colorants under D50: Adobe RGB (1998) annex, Display P3 as Apple embeds it.
ADOBE_RGB = [[0.60974, 0.31111, 0.01947], [0.20528, 0.62567, 0.06087], [0.14919, 0.06322, 0.74457]]
DISPLAY_P3 = [[0.51512, 0.24120, -0.00105], [0.29198, 0.69225, 0.04189], [0.15710, 0.06657, 0.78407]]


def fixed(*numbers):
    return struct.pack(f">{len(numbers)}i", *[round(n * 65536) for n in numbers])


def gamma(value):
    return b"curv" + bytes(4) + struct.pack(">IH", 1, round(value * 256))


def table(values):
    return (
        b"curv"
        + bytes(4)
        + struct.pack(">I", len(values))
        + np.rint(np.asarray(values) * 65535).astype(">u2").tobytes()
    )


def parametric(kind, *parameters):
    return b"para" + bytes(4) + struct.pack(">HH", kind, 0) + fixed(*parameters)


SRGB_CURVE = parametric(3, 2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)


def profile(space, tags, connection=b"XYZ "):
    """Make a display profile with these tags {name: bytes}."""
    tags = {b"wtpt": b"XYZ " + bytes(4) + fixed(0.9642, 1, 0.8249), **tags}
    head, body = struct.pack(">I", len(tags)), b""
    for name, data in tags.items():
        data += bytes(-len(data) % 4)
        head += struct.pack(">4sII", name, 132 + 12 * len(tags) + len(body), len(data))
        body += data
    version, date = 0x04200000, bytes(12)
    fields = b"none" + struct.pack(">I", version) + b"mntr" + space + connection + date + b"acsp" + bytes(28)
    fields += fixed(0.9642, 1, 0.8249) + bytes(48)
    return struct.pack(">I", 4 + len(fields) + len(head) + len(body)) + fields + head + body


def rgb_profile(colorants, curve):
    tags = {
        name: b"XYZ " + bytes(4) + fixed(*xyz) for name, xyz in zip((b"rXYZ", b"gXYZ", b"bXYZ"), colorants, strict=True)
    }
    return profile(b"RGB ", tags | dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve))


def lut_profile(space, channels, lab):
    """Make a profile from a table of Lab colors, lab(corner) at every corner of the cube of channels (lut8Type)."""
    corners = np.stack(np.meshgrid(*[(0, 1)] * channels, indexing="ij"), -1).reshape(-1, channels)
    colors = np.array([lab(*corner) for corner in corners]) * [2.55, 1, 1] + [0, 128, 128]
    data = b"mft1" + bytes(4) + bytes([channels, 3, 2, 0]) + fixed(1, 0, 0, 0, 1, 0, 0, 0, 1)
    identity = bytes(range(256))
    data += identity * channels + np.rint(colors).astype(np.uint8).tobytes() + identity * 3
    return profile(space, {b"A2B0": data}, b"Lab ")


def gray_profile(curve):
    return profile(b"GRAY", {b"kTRC": curve})


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(samples, color_type, extra=b"", size=None):
    """Encode a PNG of 8 (uint8) or 16 bits."""
    height, width = size or samples.shape[:2]
    bits = 8 if samples.dtype == np.uint8 else 16
    rows = b"".join(b"\0" + row.astype(f">u{bits // 8}").tobytes() for row in samples)
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, color_type, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + extra + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def tiff16(samples, photometric=2, **tags):
    """Encode a 16-bit TIFF of one raw strip; further tags as t274=6."""
    height, width, channels = samples.shape
    directory = ImageFileDirectory_v2(b"II*\0\x08\0\0\0")
    data = samples.astype("<u2").tobytes()
    fields = {256: width, 257: height, 258: (16,) * channels, 259: 1, 262: photometric, 273: 0, 277: channels}
    fields |= {278: height, 279: len(data)} | {int(name[1:]): value for name, value in tags.items()}
    for tag, value in fields.items():
        directory[tag] = value
    file = io.BytesIO()
    directory.save(file)
    return file.getvalue() + data
