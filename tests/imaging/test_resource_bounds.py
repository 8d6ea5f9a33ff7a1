"""Small files that claim or hold more than their size allows do not fill the memory."""

import struct
import tracemalloc
import zlib

import numpy as np
import pytest
from PIL import Image
from raw_files import chunk, png, tiff16

from pisa_jax.imaging import exif
from pisa_jax.imaging.image_data import ImageError
from pisa_jax.imaging.image_reading import from_pil, read_image

PIXELS = np.zeros((4, 5, 3), np.uint8)
ZEROS = zlib.compress(bytes(1 << 28))
MEGABYTE = 1 << 20


def peak(function, *arguments):
    """Return (result or ImageError, largest number of bytes allocated by Python and NumPy)."""
    tracemalloc.start()
    try:
        result = function(*arguments)
    except ImageError as error:
        result = error
    finally:
        largest = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    return result, largest


@pytest.mark.parametrize("kind", [b"zTXt", b"iTXt"])
def test_text_of_a_png(tmp_path, kind):
    head = b"Comment\0\0" if kind == b"zTXt" else b"Comment\0\1\0\0\0"
    (tmp_path / "a.png").write_bytes(png(PIXELS, 2, chunk(kind, head + ZEROS)))
    image, largest = peak(read_image, tmp_path / "a.png")
    assert f"{kind.decode()} was dropped" in image.notes[0]
    assert largest < 20 * MEGABYTE


def test_profile_of_a_png(tmp_path):
    (tmp_path / "a.png").write_bytes(png(PIXELS, 2, chunk(b"iCCP", b"name\0\0" + ZEROS)))
    image, largest = peak(read_image, tmp_path / "a.png")
    assert image.notes == ("the ICC profile is damaged and was dropped",)
    assert largest < 80 * MEGABYTE


@pytest.mark.parametrize(
    "tags",
    [
        {"t256": 13000, "t257": 13000, "t278": 10},  # one strip of 1300
        {"t256": 13000, "t257": 13000, "t278": 13000},
        {"t322": 16384, "t323": 16384, "t324": 0, "t325": 60},
    ],
)
def test_layouts_of_a_tiff(tmp_path, tags):
    (tmp_path / "a.tif").write_bytes(tiff16(PIXELS.astype(np.uint16), **tags))
    error, largest = peak(read_image, tmp_path / "a.tif")
    assert isinstance(error, ImageError)
    assert largest < 5 * MEGABYTE


def test_values_of_exif_that_share_their_bytes():
    count, length = 1500, 30000
    entries = b"".join(struct.pack("<HHII", 60000 + i, 7, length, 20000) for i in range(count))
    details = struct.pack("<H", count) + entries + bytes(4)
    block = b"II*\0\x08\0\0\0" + struct.pack("<HHHII", 1, exif.EXIF_DIRECTORY, 4, 1, 26) + bytes(4) + details
    image = Image.fromarray(PIXELS)
    image.info["exif"] = exif.PREFIX + block.ljust(60000, b"\0")
    result, largest = peak(from_pil, image)
    assert result.notes == (exif.DAMAGED,)
    assert len(result.exif) < 2 * len(image.info["exif"])
    assert largest < 5 * MEGABYTE
