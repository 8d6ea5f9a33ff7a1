"""Sources of training images: folders, text lists, LQ/GT pairs and generated images.

tfds.py has data sets of tfds, latents.py pairs of latents.

A source has a length, returns a `SourceImage` per index and raises OSError naming an image that cannot be read.
"""

import functools
import hashlib
import logging
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

import cv2
import numpy as np
from PIL import Image

from pisa_jax.data.contents import digest_files, file_sizes
from pisa_jax.data.folders import image_names
from pisa_jax.data.text_files import listed_name, normalize_path, read_lines
from pisa_jax.imaging.arrays import RGB8, Latents
from pisa_jax.imaging.image_data import ImageError
from pisa_jax.imaging.image_reading import decode_rgb8

logger = logging.getLogger(__name__)


class SourceImage(NamedTuple):
    """An image of a source, its path (the key of the prompts), and its LQ image if the source is paired.

    Images are 8-bit RGB; a `latents.LatentSource` has latents instead.
    """

    image: RGB8 | Latents
    path: str
    lq: RGB8 | Latents | None = None


@runtime_checkable
class Source(Protocol):
    """Interface of a source of images.

    `names` are the paths of the images, or () if they are unknown before reading; `paired` sources have LQ images;
    `identity` is a text that changes with the names, their order and the parameters of the source.
    """

    names: tuple[str, ...]
    paired: bool
    identity: str

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> SourceImage: ...


@runtime_checkable
class StoredSource(Source, Protocol):
    """Interface of a source of stored files, which may be replaced by others under their names."""

    def contents(self) -> str:
        """Digest of the contents of the files, see `contents.digest_files`."""

    def paths(self) -> Iterator[str]:
        """Paths of all images; in an order such that the first ones are a fair sample where reading them is slow."""


def decode_rgb(data: bytes, name: str) -> RGB8:
    """Decode the content of an image file to upright 8-bit sRGB.

    Raises:
        OSError: `data` cannot be decoded; the message begins with `name`.
    """
    try:
        return decode_rgb8(data, name)
    except (ImageError, MemoryError) as error:  # the loader replaces images that raise OSError
        raise OSError(str(error) or f"{name}: not enough memory to decode it") from error


def read_rgb(path: Path) -> RGB8:
    """Read an image file as `decode_rgb` does."""
    if not path.is_file():  # opening a pipe would wait for its writer
        raise FileNotFoundError(f"{path} does not exist or is no regular file")
    return decode_rgb(path.read_bytes(), str(path))


def digest_parts(parts: Iterable[str]) -> str:
    """Digest of texts and their order."""
    return hashlib.sha256("\n".join(parts).encode(errors="surrogatepass")).hexdigest()[:16]


def match_size(lq: RGB8, gt: RGB8, name: str) -> RGB8:
    """Upscale (bicubic) the LQ image of a pair to the size of its GT; OSError unless the factor is an integer."""
    height, width = gt.shape[:2]
    factor = height // lq.shape[0]
    if (lq.shape[0] * factor, lq.shape[1] * factor) != (height, width):
        raise OSError(
            f"{name}: GT is {width}x{height} and LQ {lq.shape[1]}x{lq.shape[0]}; "
            "the size of GT must be an integer multiple of that of LQ"
        )
    if factor == 1:
        return lq
    return np.asarray(Image.fromarray(lq).resize((width, height), Image.Resampling.BICUBIC))


@dataclass(frozen=True)
class FileSource:
    """Image files below `root`; with `lq_names`, item i is the pair root/names[i] (GT) and root/lq_names[i] (LQ)."""

    root: Path
    names: tuple[str, ...]
    lq_names: tuple[str, ...] = ()

    @property
    def paired(self) -> bool:
        return bool(self.lq_names)

    @functools.cached_property
    def identity(self) -> str:
        return digest_parts([*self.names, *self.lq_names])

    @functools.cached_property
    def distinct(self) -> int:
        """Number of distinct files: a list may name one several times."""
        return len({normalize_path(name) for name in self.names})

    @functools.cached_property
    def _files(self) -> list[str]:
        return [os.path.join(self.root, name) for name in (*self.names, *self.lq_names)]

    @functools.cached_property
    def _sizes(self) -> list[int]:
        return file_sizes(self._files)

    def contents(self) -> str:
        return digest_files(self._files, self._sizes)

    def paths(self) -> Iterator[str]:
        return iter(self.names)

    def missing(self) -> list[str]:
        """Names of files that do not exist or are no regular files."""
        return [name for name, size in zip((*self.names, *self.lq_names), self._sizes, strict=True) if size < 0]

    def __getstate__(self) -> dict:
        # Workers need neither the paths nor the sizes, which take as much memory as the names.
        return {name: value for name, value in self.__dict__.items() if name not in ("_files", "_sizes")}

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> SourceImage:
        name = self.names[index]
        image = read_rgb(self.root / name)
        if not self.lq_names:
            return SourceImage(image, name)
        lq = read_rgb(self.root / self.lq_names[index])
        return SourceImage(image, name, match_size(lq, image, str(self.root / name)))


@dataclass(frozen=True)
class MixedSource:
    """A mixture: images of the list `general`, each replaced by one of the list `hq` with `hq_probability`."""

    general: FileSource
    hq: FileSource
    hq_probability: float

    @property
    def names(self) -> tuple[str, ...]:
        return self.general.names + self.hq.names

    @property
    def paired(self) -> bool:
        return False

    @property
    def identity(self) -> str:
        return digest_parts([self.general.identity, self.hq.identity, str(self.hq_probability)])

    def contents(self) -> str:
        return digest_parts([self.general.contents(), self.hq.contents()])

    def paths(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.general)

    def __getitem__(self, index: int) -> SourceImage:
        return self.general[index]

    def choose(self, index: int, rng: np.random.Generator) -> tuple[int, int]:
        """Draw (0, `index`), for the general list, or with `hq_probability` (1, a random index of the other list)."""
        if rng.random() < self.hq_probability:
            return 1, int(rng.integers(len(self.hq)))
        return 0, index


def folder_source(path: str | os.PathLike) -> FileSource:
    """All images in a folder and its subfolders, sorted by name. Raises ValueError if there are none."""
    return FileSource(Path(path), image_names(path))


def pair_source(path: str | os.PathLike) -> FileSource:
    """LQ/GT pairs path/lq/NAME and path/gt/NAME; suffixes may differ, and LQ may be smaller by an integer factor.

    Raises ValueError with the names of images that have no counterpart.
    """
    sides = []
    for side in ("gt", "lq"):
        names = image_names(Path(path) / side)
        by_stem = {normalize_path(os.path.splitext(name)[0]): f"{side}/{name}" for name in names}
        if len(by_stem) < len(names):
            raise ValueError(
                f"{Path(path) / side} has images that differ only in the suffix or the Unicode normalization of their "
                "names: pairs are ambiguous"
            )
        sides.append(by_stem)
    gt, lq = sides
    unpaired = sorted(gt.keys() ^ lq.keys())
    if unpaired:
        raise ValueError(f"{len(unpaired)} images are not in both {path}/gt and {path}/lq, e.g. {unpaired[:5]}")
    return FileSource(Path(path), tuple(gt.values()), tuple(lq[stem] for stem in gt))


def _read_list(text_file: str | os.PathLike) -> FileSource:
    path = Path(text_file)
    lines = [line.strip() for line in read_lines(path)]
    entries = [line for line in lines if line and (line[0] != "#" or os.path.exists(path.parent / line))]
    names = tuple(listed_name(path.parent, line) for line in entries)
    if not names:
        raise ValueError(f"{path} lists no images; it needs one path per line, relative to {path.parent}")
    source = FileSource(path.parent, names)
    logger.info("%s: %d images (%d distinct files)", path, len(names), source.distinct)
    return source


def list_source(
    text_file: str | os.PathLike, hq_file: str | os.PathLike | None = None, hq_probability: float = 0.0
) -> FileSource | MixedSource:
    """Images listed in a text file, one path per line, relative to the folder of the file.

    Blank lines are skipped, and lines that begin with # unless there is a file of that name. The separator of folders
    may be "\\"; names outside ASCII are also found in the other Unicode normalization (`text_files.listed_name`).

    With `hq_file`, a second such list, each image is taken from it with probability `hq_probability` (the original
    program's `prob` is 1 - hq_probability). `FileSource.missing` names the listed files that do not exist.
    """
    if not 0 <= hq_probability <= 1 or (hq_probability > 0) != (hq_file is not None):
        raise ValueError(
            f"hq_probability is {hq_probability} with hq_file {hq_file}; give both or none, and 0 < hq_probability <= 1"
        )
    general = _read_list(text_file)
    return general if hq_file is None else MixedSource(general, _read_list(hq_file), hq_probability)


@dataclass(frozen=True)
class FakeSource:
    """`count` generated images of size x size pixels; see `fake_source`."""

    count: int
    size: int
    seed: int

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(f"fake/{index:06d}" for index in range(self.count))

    @property
    def paired(self) -> bool:
        return False

    @property
    def identity(self) -> str:
        return f"fake-{self.count}-{self.size}-{self.seed}"

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> SourceImage:
        if not 0 <= index < self.count:
            raise IndexError(f"index {index} is not in 0..{self.count - 1}")
        return SourceImage(_draw_image(self.size, np.random.default_rng((self.seed, index))), f"fake/{index:06d}")


def fake_source(count: int, size: int, seed: int = 0) -> FakeSource:
    """Deterministic generated images with smooth shading, hard edges and fine texture, for tests and debugging."""
    if count < 1 or size < 1:
        raise ValueError(f"count {count} and size {size} must be at least 1")
    return FakeSource(count, size, seed)


def _draw_image(size: int, rng: np.random.Generator) -> RGB8:
    """Draw a color gradient, a few filled shapes, and band-limited grain that is stronger in dark regions."""
    along = np.linspace(0, 1, size, dtype=np.float32)
    angle = rng.uniform(0, 2 * np.pi)
    ramp = 0.5 + 0.5 * ((along[None] - 0.5) * np.cos(angle) + (along[:, None] - 0.5) * np.sin(angle))
    dark, light = np.sort(rng.uniform(20, 235, (2, 3)), axis=0)
    canvas = np.ascontiguousarray(dark + (light - dark) * ramp[..., None]).astype(np.uint8)
    for _ in range(rng.integers(4, 12)):
        color = [int(value) for value in rng.integers(0, 256, 3)]
        points = rng.integers(0, size, (rng.integers(3, 6), 2)).astype(np.int32)
        if rng.random() < 0.5:
            cv2.fillPoly(canvas, [points], color, lineType=cv2.LINE_AA)
        else:
            radius = int(rng.integers(1, max(2, size // 4)))
            cv2.circle(canvas, [int(value) for value in points[0]], radius, color, thickness=-1, lineType=cv2.LINE_AA)
    grain = cv2.GaussianBlur(rng.standard_normal((size, size), dtype=np.float32), (0, 0), rng.uniform(0.6, 1.6))
    textured = canvas + (30 - canvas / 12) * grain[..., None] * rng.uniform(0.2, 1.5)
    return np.clip(np.rint(textured), 0, 255).astype(np.uint8)
