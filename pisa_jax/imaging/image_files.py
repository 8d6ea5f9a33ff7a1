"""Supported image formats, and the image files of a folder."""

import functools
import importlib.util
import os
from pathlib import Path

# Pillow's name of each format that is decoded, and its file suffixes. Pillow supports more formats, but some of their
# decoders run other programs (EPS), and some hold no raster image.
READABLE = {
    "PNG": (".png", ".apng"),
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "WEBP": (".webp",),
    "TIFF": (".tif", ".tiff"),
    "BMP": (".bmp",),
    "DIB": (".dib",),
    "GIF": (".gif",),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm", ".pfm"),
    "AVIF": (".avif", ".avifs"),
    "JPEG2000": (".jp2", ".j2k", ".jpc", ".jpf", ".jpx", ".j2c"),
    "TGA": (".tga", ".icb", ".vda", ".vst"),
    "ICO": (".ico",),
    "HEIF": (".heic", ".heics", ".heif", ".heifs", ".hif"),  # with pillow-heif only
}
IMAGE_SUFFIXES = tuple(suffix for suffixes in READABLE.values() for suffix in suffixes)


@functools.cache
def readable_formats() -> tuple[str, ...]:
    """Return the formats of `READABLE` that this installation decodes: HEIF needs pillow-heif (extra `heif`)."""
    if importlib.util.find_spec("pillow_heif") is None:
        return tuple(name for name in READABLE if name != "HEIF")
    import pillow_heif

    pillow_heif.register_heif_opener()
    return tuple(READABLE)


def list_images(folder: str | os.PathLike) -> list[str]:
    """Sorted names of the image files directly in `folder`; `data.folders` lists subfolders too.

    A file is an image if its suffix is in `IMAGE_SUFFIXES`. Hidden files are skipped, symbolic links are followed.

    Raises:
        NotADirectoryError: `folder` is not a folder.
    """
    root = Path(folder)
    if not root.is_dir():
        raise NotADirectoryError(f"{root} is not a folder")
    _, _, files = next(os.walk(root, followlinks=True))
    return sorted(file for file in files if file.lower().endswith(IMAGE_SUFFIXES) and not file.startswith("."))


def find_images(path: Path) -> list[Path]:
    """List the image files directly inside the folder `path`, sorted, or return the one file `path`.

    Raises:
        FileNotFoundError: `path` does not exist or has no images.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise FileNotFoundError(f"{path} is neither a folder nor a file")
    found = [path / name for name in list_images(path)]
    if not found:
        raise FileNotFoundError(f"no images in {path}; suffixes of images: {' '.join(IMAGE_SUFFIXES)}")
    return found
