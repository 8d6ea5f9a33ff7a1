"""EXIF blocks "Exif\\0\\0...": what of them describes an upscaled image."""

from pisa_jax.imaging import tiff_tags
from pisa_jax.imaging.tiff_tags import EXIF_DIRECTORY, LONG, SHORT, Tags

PREFIX = b"Exif\0\0"
ORIENTATION = 274
# Tags that describe the photograph: document, description, make, model, orientation, resolution, software, date,
# artist, computer, ratings, copyright, EXIF and GPS directories, Windows' title to subject. All other tags describe the
# layout of the old file, a georeference per pixel, or the thumbnail, and would be wrong in a new file.
KEPT = {269, 270, 271, 272, 274, 282, 283, 296, 305, 306, 315, 316, 18246, 18249, 33432, 34665, 34853}
KEPT |= {40091, 40092, 40093, 40094, 40095}
_WIDTH, _HEIGHT = 40962, 40963  # of the image, in the EXIF directory
DAMAGED = "the EXIF data is damaged; what could not be read was dropped"


def parse(block: bytes) -> Tags:
    """Parse a block with or without its prefix; raises as `tiff_tags.parse` does."""
    return tiff_tags.parse(block.removeprefix(PREFIX))


def upright_block(tags: Tags) -> bytes | None:
    """Build the block of an upright image; None if no tag remains."""
    kept = {tag: value for tag, value in tags.directory.items() if tag in KEPT}
    if ORIENTATION in kept:
        kept[ORIENTATION] = tiff_tags.integers(SHORT, 1, order=tags.order)
    return PREFIX + tiff_tags.serialize(kept, tags.order) if kept else None


def with_size(block: bytes, height: int, width: int) -> bytes:
    """Replace the image size in a block that has one."""
    order, directory, _ = parse(block)
    details = directory.get(EXIF_DIRECTORY)
    if not isinstance(details, dict):
        return block
    new = {_WIDTH: tiff_tags.integers(LONG, width, order=order), _HEIGHT: tiff_tags.integers(LONG, height, order=order)}
    details |= {tag: value for tag, value in new.items() if tag in details}
    return PREFIX + tiff_tags.serialize(directory, order)
