"""Decode TIFF files of every layout and depth with tifffile; refuse what has no defined colors."""

import io
import logging
import math
from typing import NamedTuple

import numpy as np
import tifffile
from PIL import Image

from pisa_jax.imaging import tiff_tags
from pisa_jax.imaging.image_data import ImageError
from pisa_jax.imaging.pixels import Channels, Pixels, Values, inks_to_srgb, pillow_channels, to_srgb
from pisa_jax.imaging.tiff_tags import Tags, Value

SIGNATURES = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_OLD_SUBFILE, _PHOTOMETRIC, _ORIENTATION, _INK_SET, _SUBSAMPLING, _ICC_PROFILE = 255, 262, 274, 332, 530, 34675
_UNCOMPRESSED, _OLD_JPEG, _JPEG = 1, 6, 7  # Compression
_LARGEST_TILE = 1 << 24  # pixels, of tiles that exceed the image
_REDUCED, _MASK = 1, 4  # bits of NewSubfileType
_WHITE_IS_0, _BLACK_IS_0, _RGB, _PALETTE, _CMYK, _YCBCR = 0, 1, 2, 3, 5, 6  # PhotometricInterpretation
_RAW = {32803: "color filter array", 34892: "linear raw"}
_UNSPECIFIED, _PREMULTIPLIED, _STRAIGHT = 0, 1, 2  # ExtraSamples

# Problems of a file are exceptions or notes here, and lines of a log only where the program configures one.
logging.getLogger("tifffile").addHandler(logging.NullHandler())


class Tiff(NamedTuple):
    """A decoded page, and its tags completed with those of the first page."""

    pixels: Pixels
    tags: Tags


def is_tiff(data: bytes) -> bool:
    """Return True if `data` begins as TIFF and BigTIFF files do, also those of raw formats of cameras."""
    return data[:4] in SIGNATURES


def decode_tiff(data: bytes) -> Tiff:
    """Decode the main page of a TIFF file: the first at full resolution, also in subdirectories.

    Raises:
        ImageError: samples or a layout without defined colors; raw data of a camera.
        Exception: of arbitrary type, if the file is damaged.
    """
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        page, notes = _main_page(file)
        first, own = tiff_tags.parse(data, file.pages.first.offset), tiff_tags.parse(data, page.offset)
        tags = Tags(own.order, first.directory | own.directory, first.complete and own.complete)
        _check_size(page)
        _check_segments(page, len(data))
        profile = _bytes_of(own, _ICC_PROFILE)
        orientation = tiff_tags.number(own.directory.get(_ORIENTATION), own.order, 1)
        if page.photometric == _YCBCR and page.compression == _UNCOMPRESSED and _is_full_chroma(page):
            # Pillow reads such files since version 13.
            image = Image.frombytes("YCbCr", (page.imagewidth, page.imagelength), page.asarray().tobytes())
            pixels = to_srgb(pillow_channels(image), profile, notes)._replace(orientation=orientation)
        elif page.photometric == _YCBCR and page.compression != _JPEG:
            pixels = to_srgb(_libtiff_channels(data, page), profile, notes)  # Pillow applies the orientation
        else:
            pixels = _decode_page(page, profile, notes)._replace(orientation=orientation)
    return Tiff(pixels, tags)


def _bytes_of(tags: Tags, tag: int) -> bytes | None:
    value = tags.directory.get(tag)
    return value.data if isinstance(value, Value) else None


def _main_page(file: tifffile.TiffFile) -> tuple[tifffile.TiffPage, tuple[str, ...]]:
    """Choose the page to decode and return it with notes on the others."""
    pages = []
    for index in range(len(file.pages)):
        page = file.pages[index].aspage()
        pages += [page, *(sub for sub in page.pages or ())]
    if not pages:
        raise ImageError("is damaged: it has no pages")
    full = [page for page in pages if not _is_reduced(page)]
    if not full:
        page = max(pages, key=_area)
        return page, (f"the file holds only previews; the largest, {_size(page)}, is used",)
    # A first page without a mark is a thumbnail, too, if a page of at least twice its sides has the same shape.
    larger = [page for page in full if _area(page) >= 4 * _area(full[0]) and _same_shape(page, full[0])]
    page = max(larger, key=_area, default=full[0])
    if page.photometric in _RAW:
        raise ImageError(
            f"holds raw data of a camera ({_RAW[page.photometric]}); convert it to TIFF or JPEG with a raw converter"
        )
    if page is pages[0] and len(full) == 1:
        return page, ()
    which = "the first" if page is pages[0] else f"page {pages.index(page) + 1} ({_size(page)})"
    return page, (f"the file has {len(pages)} frames or pages; only {which} is used",)


def _is_reduced(page: tifffile.TiffPage) -> bool:
    return bool(page.subfiletype & (_REDUCED | _MASK)) or page.tags.valueof(_OLD_SUBFILE, 1) == 2


def _area(page: tifffile.TiffPage) -> int:
    return page.imagewidth * page.imagelength


def _size(page: tifffile.TiffPage) -> str:
    return f"{page.imagewidth}x{page.imagelength}"


def _same_shape(page: tifffile.TiffPage, first: tifffile.TiffPage) -> bool:
    """Return True if both pages have one aspect ratio, up to the rounding of the smaller one's sides."""
    small, large = sorted((page, first), key=_area)
    factor = small.imagewidth / max(large.imagewidth, 1)
    return abs(large.imagelength * factor - small.imagelength) <= 1


def _check_size(page: tifffile.TiffPage) -> None:
    if not _area(page):
        raise ImageError(f"the image has no pixels ({_size(page)})")
    limit = Image.MAX_IMAGE_PIXELS
    if limit and _area(page) > 2 * limit:
        raise Image.DecompressionBombError(f"Image size ({_area(page)} pixels) exceeds limit of {2 * limit} pixels.")
    if page.is_tiled and page.tilewidth * page.tilelength > max(4 * _area(page), _LARGEST_TILE):
        raise ImageError(f"is damaged: tiles of {page.tilewidth}x{page.tilelength} pixels for {_size(page)}")


def _check_segments(page: tifffile.TiffPage, size: int) -> None:
    """Refuse truncated and sparse files, whose missing strips or tiles decoders fill with zeros."""
    if page.compression == _OLD_JPEG:  # in a layout of its own
        return
    segments = list(zip(page.dataoffsets, page.databytecounts, strict=True))
    missing = len(segments) < math.prod(page.chunked)
    if page.compression == _UNCOMPRESSED and page.photometric != _YCBCR and isinstance(page.bitspersample, int):
        missing |= sum(page.databytecounts) * 8 < _area(page) * page.samplesperpixel * page.bitspersample
    if missing or any(not count or start + count > size for start, count in segments):
        raise ImageError("is damaged: strips or tiles of the image are truncated or missing")


def _is_full_chroma(page: tifffile.TiffPage) -> bool:
    """Return True if YCbCr samples of 8 bits are stored one after the other, without subsampling of chroma."""
    contiguous = page.planarconfig == tifffile.PLANARCONFIG.CONTIG
    return page.bitspersample == 8 and contiguous and page.tags.valueof(_SUBSAMPLING, (2, 2)) == (1, 1)


def _libtiff_channels(data: bytes, page: tifffile.TiffPage) -> Channels:
    """Decode YCbCr that is not in JPEG streams with libtiff, which upsamples chroma."""
    if page.bitspersample != 8 or not isinstance(page.index, int):
        raise ImageError("holds YCbCr pixels in a subdirectory or of more than 8 bits; save it as RGB")
    with Image.open(io.BytesIO(data), formats=("TIFF",)) as image:
        image.seek(page.index)
        image.load()
        return pillow_channels(image)


def _decode_page(page: tifffile.TiffPage, profile: bytes | None, notes: tuple[str, ...]) -> Pixels:
    """Decode samples of gray, RGB, CMYK and palettes."""
    if isinstance(page.bitspersample, tuple) or _PHOTOMETRIC not in page.tags:
        raise ImageError("holds channels of different depths, or of no defined color; save it as gray, RGB or CMYK")
    colors = {_WHITE_IS_0: 1, _BLACK_IS_0: 1, _PALETTE: 1, _RGB: 3, _YCBCR: 3, _CMYK: 4}.get(page.photometric)
    if colors is None or page.samplesperpixel < colors or page.tags.valueof(_INK_SET, 1) not in (0, 1):
        name = getattr(page.photometric, "name", page.photometric)
        raise ImageError(f"holds {name} pixels; save it as gray, RGB or CMYK with 8 or 16 bits")
    samples, bits, depth_notes = _read_samples(page), 8, ()
    if page.photometric == _PALETTE:
        samples = _look_up(samples, page)
        colors = 3
    else:
        samples, bits, depth_notes = _unit_samples(samples, page)
    values, extra = samples[..., :colors], samples[..., colors:]
    if page.photometric == _WHITE_IS_0:
        values = 255 - values if values.dtype == np.uint8 else 1 - values
    values, alpha, extra_notes = _separate_alpha(values, extra, page)
    notes = notes + depth_notes + extra_notes
    if page.photometric == _CMYK:
        pixels = inks_to_srgb(values, alpha, bits, profile)
        return pixels._replace(notes=notes + pixels.notes)
    return to_srgb(Channels(values, alpha, bits), profile, notes)


def _read_samples(page: tifffile.TiffPage) -> np.ndarray:
    """Read samples of shape (h, w, c); those of JPEG streams in YCbCr are RGB."""
    try:
        samples = page.asarray()
    except MemoryError:
        raise
    except Exception as error:  # tifffile and imagecodecs raise arbitrary exceptions
        text = " ".join(str(error).split()) or type(error).__name__
        raise ImageError(f"is damaged, or of a layout that is not supported: {text}") from error
    shape, separate = (page.imagelength, page.imagewidth), page.planarconfig == 2 and page.samplesperpixel > 1
    expected = (page.samplesperpixel, *shape) if separate else (*shape, page.samplesperpixel)
    if samples.size != np.prod(expected):
        raise ImageError(f"holds samples of the unsupported shape {samples.shape}; save it as a flat image")
    samples = samples.reshape(expected)
    return np.moveaxis(samples, 0, -1) if separate else samples


def _look_up(indices: np.ndarray, page: tifffile.TiffPage) -> np.ndarray:
    """Replace palette indices by their colors, reduced to 8 bits; further channels are dropped."""
    palette = np.asarray(page.colormap)
    palette = palette if palette.max() < 256 else palette >> 8  # some writers store 8 bits
    return palette.T.astype(np.uint8)[indices[..., 0].astype(np.intp)]


def _unit_samples(samples: np.ndarray, page: tifffile.TiffPage) -> tuple[Values, int, tuple[str, ...]]:
    """Convert to (samples: uint8, or float32 in [0, 1]; bits, 8 or 16; notes)."""
    bits = page.bitspersample
    if samples.dtype == np.uint8 and bits == 8:
        return samples, 8, ()
    if samples.dtype.kind in "bu" and bits <= 16:
        values = samples.astype(np.float32) / (2**bits - 1)
        if bits in (1, 2, 4):  # whose levels are exact in 8 bits
            return np.rint(values * 255).astype(np.uint8), 8, ()
        return values, 8 if bits < 8 else 16, ()
    if samples.dtype.kind == "f":
        low, high = samples.min(), samples.max()
        if not (low >= 0 and high <= 1):
            raise ImageError(f"holds floats in [{low}, {high}]; allowed are floats in [0, 1]")
        note = "float samples are taken as values from 0 (black) to 1 (white) and are written with 16 bits per channel"
        return samples.astype(np.float32), 16, (note,)
    kind = {"i": "signed integers", "u": "integers"}.get(samples.dtype.kind, "complex numbers")
    raise ImageError(f"holds {kind} of {bits} bits; save it with 8 or 16 bits per channel")


def _separate_alpha(
    values: np.ndarray, extra: np.ndarray, page: tifffile.TiffPage
) -> tuple[np.ndarray, np.ndarray | None, tuple[str, ...]]:
    """Return (values that are not premultiplied, alpha, notes)."""
    count = extra.shape[-1]
    kinds = list(page.extrasamples) or ([_STRAIGHT] if count == 1 and page.photometric == _RGB else [])
    kinds += [_UNSPECIFIED] * (count - len(kinds))
    index = next((i for i in range(count) if kinds[i] in (_PREMULTIPLIED, _STRAIGHT)), None)
    unused = count - (index is not None)
    notes = (f"{unused} extra channel{'s' * (unused > 1)} without a defined meaning dropped",) if unused else ()
    if index is None:
        return np.ascontiguousarray(values), None, notes
    alpha = np.ascontiguousarray(extra[..., index])
    if kinds[index] == _PREMULTIPLIED:
        opacity = alpha[..., None].astype(np.float32)
        values = np.divide(values, opacity, out=np.zeros(values.shape, np.float32), where=opacity > 0)
        values = np.minimum(values, 1)
    return np.ascontiguousarray(values), alpha, notes
