"""Sound image files of every readable format: those of the tests, and small ones in every mode of each encoder."""

import importlib.util
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import tifffile
from PIL import Image, ImageCms, PngImagePlugin

ASSETS = Path(__file__).resolve().parents[1] / "tests" / "assets" / "formats"
HEIGHT, WIDTH = 34, 46  # OpenJPEG needs 32
# Saved by Pillow: suffix -> (Pillow's name, modes, options of which each gives a file in each mode).
PILLOW: dict[str, tuple[str, tuple[str, ...], tuple[dict[str, Any], ...]]] = {
    ".png": ("PNG", ("1", "L", "LA", "I;16", "P", "RGB", "RGBA"), ({}, {"metadata": True}, {"bits": 4})),
    ".jpg": ("JPEG", ("L", "RGB", "CMYK"), ({}, {"progressive": True, "metadata": True}, {"subsampling": 0})),
    ".webp": ("WEBP", ("RGB", "RGBA"), ({}, {"lossless": True, "metadata": True}, {"frames": 3})),
    ".tif": (
        "TIFF",
        ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "LAB", "YCbCr"),
        ({}, {"compression": "tiff_lzw", "metadata": True}, {"compression": "tiff_adobe_deflate", "frames": 2}),
    ),
    ".bmp": ("BMP", ("1", "L", "P", "RGB", "RGBA"), ({},)),
    ".dib": ("DIB", ("L", "RGB"), ({},)),
    ".gif": ("GIF", ("L", "P", "RGB", "RGBA"), ({}, {"frames": 3})),
    ".ppm": ("PPM", ("1", "L", "RGB", "I;16", "F"), ({},)),
    ".avif": ("AVIF", ("RGB", "RGBA"), ({}, {"metadata": True})),  # several frames would hold the time
    ".jp2": ("JPEG2000", ("L", "LA", "RGB", "RGBA", "I;16"), ({}, {"irreversible": True, "num_resolutions": 3})),
    ".j2k": ("JPEG2000", ("L", "RGB"), ({"no_jp2": True}, {"no_jp2": True, "tile_size": (16, 16)})),
    ".tga": ("TGA", ("L", "LA", "P", "RGB", "RGBA"), ({}, {"compression": "tga_rle"})),
    ".ico": ("ICO", ("RGB", "RGBA"), ({"sizes": [(16, 16)]}, {"sizes": [(16, 16), (32, 32)], "bitmap_format": "bmp"})),
}
# Saved by tifffile: options of `tifffile.imwrite` with the type of the samples and their number per pixel.
TIFF: tuple[tuple[type, int, dict[str, Any]], ...] = (
    (np.uint8, 3, {"photometric": "rgb", "planarconfig": "separate"}),
    (np.uint16, 3, {"photometric": "rgb", "planarconfig": "separate", "compression": "zlib", "predictor": True}),
    (np.uint16, 3, {"photometric": "rgb", "byteorder": ">"}),
    (np.uint16, 4, {"photometric": "rgb", "extrasamples": ["unassalpha"], "bigtiff": True}),
    (np.uint8, 4, {"photometric": "rgb", "extrasamples": ["assocalpha"]}),
    (np.uint8, 3, {"photometric": "rgb", "tile": (16, 16), "compression": "lzw"}),
    (np.uint16, 1, {"photometric": "minisblack", "tile": (16, 16)}),
    (np.uint16, 1, {"photometric": "miniswhite"}),
    (np.float32, 3, {"photometric": "rgb"}),
    (np.float16, 1, {"photometric": "minisblack"}),
    (np.uint32, 1, {"photometric": "minisblack"}),
    (np.uint8, 4, {"photometric": "separated"}),
    (np.uint16, 4, {"photometric": "separated"}),
    (np.uint8, 3, {"photometric": "rgb", "compression": "zstd", "rowsperstrip": 5}),
    (np.uint8, 3, {"photometric": "ycbcr", "compression": "jpeg"}),
)
# Encoded by OpenCV: type of the samples and their number per pixel.
OPENCV = {
    ".png": ((np.uint16, 1), (np.uint16, 3), (np.uint16, 4)),
    ".tiff": ((np.uint16, 1), (np.uint16, 3), (np.float32, 3)),
    ".jp2": ((np.uint16, 1), (np.uint16, 3)),
    ".ppm": ((np.uint16, 3),),
    ".pfm": ((np.float32, 1), (np.float32, 3)),
    ".bmp": ((np.uint8, 3), (np.uint8, 4)),
    ".webp": ((np.uint8, 3),),
    ".avif": ((np.uint16, 3), (np.uint16, 4)),
}
TEXT = {
    ".pbm": b"P1\n# text\n4 2\n0 1 0 1\n1 0 1 0\n",
    ".pgm": b"P2\n4 2\n15\n0 5 10 15\n15 10 5 0\n",
    ".pnm": b"P3\n2 1\n65535\n0 1 65535\n7 8 9\n",
}


def image_seeds() -> list[tuple[str, bytes]]:
    """Return (suffix, content) of every sound image file, the same list on every call."""
    assets = [(path.suffix, path.read_bytes()) for path in sorted(ASSETS.iterdir()) if path.stat().st_size < 50_000]
    heif = _by_libheif() if importlib.util.find_spec("pillow_heif") else ()
    return [*assets, *_by_pillow(), *_by_tifffile(), *_by_opencv(), *TEXT.items(), *heif]


def _by_pillow() -> Iterator[tuple[str, bytes]]:
    for suffix, (name, modes, variants) in PILLOW.items():
        for mode in modes:
            for variant in variants:
                options = dict(variant)
                if options.pop("metadata", False):
                    options |= _metadata(name)
                if frames := options.pop("frames", 0):
                    options |= {"save_all": True, "append_images": [_image(mode, seed) for seed in range(1, frames)]}
                if "bits" in options and mode != "P":
                    continue
                file = io.BytesIO()
                _image(mode).save(file, name, **options)
                yield suffix, file.getvalue()


def _by_tifffile() -> Iterator[tuple[str, bytes]]:
    for dtype, channels, options in TIFF:
        samples = _samples(dtype, channels)
        if options.get("planarconfig") == "separate":
            samples = np.moveaxis(samples, -1, 0)
        file = io.BytesIO()
        tifffile.imwrite(file, samples, metadata=None, **options)
        yield ".tif", file.getvalue()
    pages, file = [_samples(np.uint8, 3)[::4, ::4], _samples(np.uint8, 3)], io.BytesIO()
    with tifffile.TiffWriter(file) as writer:  # a thumbnail before the image
        for page, kind in zip(pages, (1, 0), strict=True):
            writer.write(page, photometric="rgb", subfiletype=kind, metadata=None)
    yield ".tif", file.getvalue()


def _by_opencv() -> Iterator[tuple[str, bytes]]:
    for suffix, kinds in OPENCV.items():
        for dtype, channels in kinds:
            samples, options = _samples(dtype, channels), []
            if suffix == ".avif":
                samples, options = samples >> 6, [cv2.IMWRITE_AVIF_DEPTH, 10]
            done, data = cv2.imencode(suffix, samples, options)
            assert done, (suffix, dtype, channels)
            yield suffix, data.tobytes()


def _by_libheif() -> Iterator[tuple[str, bytes]]:
    import pillow_heif  # optional

    for mode, dtype in (("L", np.uint8), ("RGB", np.uint8), ("RGBA", np.uint8), ("RGB;16", np.uint16)):
        file, samples = io.BytesIO(), _samples(dtype, len(mode.partition(";")[0]))
        pillow_heif.encode(mode, (WIDTH, HEIGHT), samples.tobytes(), file, exif=_metadata("HEIF")["exif"])
        yield ".heic", file.getvalue()


def _samples(dtype: type, channels: int, seed: int = 0) -> np.ndarray:
    """Return a gradient with noise, (h, w) or (h, w, channels): integers over their whole range, floats in [0, 1]."""
    rng = np.random.default_rng(seed)
    ramp = np.linspace(0, 0.9, HEIGHT * WIDTH).reshape(HEIGHT, WIDTH, 1)
    values = ramp + rng.uniform(0, 0.1, (HEIGHT, WIDTH, channels))
    values = values[..., 0] if channels == 1 else values
    return (values * np.iinfo(dtype).max).astype(dtype) if np.issubdtype(dtype, np.integer) else values.astype(dtype)


def _image(mode: str, seed: int = 0) -> Image.Image:
    if mode == "I;16":
        return Image.fromarray(_samples(np.uint16, 1, seed))
    image = Image.fromarray(_samples(np.uint8, 4, seed), "RGBA")
    if mode == "LAB":
        profiles = map(ImageCms.createProfile, ("sRGB", "LAB"))
        image = ImageCms.profileToProfile(image.convert("RGB"), *profiles, outputMode=mode)
        image.info.clear()  # the profile holds the time
        return image
    return image.convert("RGB").convert(mode) if mode in ("CMYK", "YCbCr", "P", "F") else image.convert(mode)


def _metadata(name: str) -> dict[str, Any]:
    """Return Pillow's options for EXIF with a GPS directory, an ICC profile, resolution, XMP and PNG text."""
    exif = Image.Exif()
    exif[0x010E], exif[0x0112] = "A description", 6
    exif.get_ifd(0x8769)[0x9286] = b"ASCII\0\0\0a comment"
    exif.get_ifd(0x8825)[2] = (47.0, 22.0, 30.5)
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    profile = profile[:24] + bytes(12) + profile[36:]  # without the time at which it was made
    options = {"icc_profile": profile, "dpi": (300, 300)}
    if name == "PNG":
        options["pnginfo"] = PngImagePlugin.PngInfo()
        options["pnginfo"].add_text("Title", "A title", zip=True)
        options["pnginfo"].add(b"gAMA", (45455).to_bytes(4, "big"))
    if name in ("WEBP", "AVIF"):
        options["xmp"] = b"<x:xmpmeta xmlns:x='adobe:ns:meta/'/>"
    return options if name == "TIFF" else options | {"exif": exif.tobytes()}
