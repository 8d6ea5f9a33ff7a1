"""Latents that were encoded in advance: a source of training pairs for which no step runs the encoder."""

import functools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pisa_jax.data.contents import digest_files, file_sizes
from pisa_jax.data.sources import SourceImage, digest_parts
from pisa_jax.data.text_files import read_lines

# Files of a folder of latents: two arrays (n, h, w, c), and the names of the n pairs, one per line.
LATENT_FILES = ("lq.npy", "gt.npy")
NAMES_FILE = "names.txt"


@dataclass(frozen=True)
class LatentSource:
    """LQ/GT pairs of scaled latents, in memory-mapped arrays of `shape` (n, h, w, c) below `root`."""

    root: Path
    names: tuple[str, ...]
    shape: tuple[int, int, int, int]

    @property
    def paired(self) -> bool:
        return True

    @functools.cached_property
    def identity(self) -> str:
        return digest_parts([*self.names, str(self.shape)])

    @functools.cached_property
    def _arrays(self) -> tuple[np.ndarray, ...]:
        return tuple(_open(self.root / name) for name in LATENT_FILES)

    def contents(self) -> str:
        files = [str(self.root / name) for name in LATENT_FILES]
        return digest_files(files, file_sizes(files))

    def paths(self) -> Iterator[str]:
        return iter(self.names)

    def __getstate__(self) -> dict:
        # Every worker maps the files itself: a memory-mapped array is sent as a copy of all its values.
        return {name: value for name, value in self.__dict__.items() if name != "_arrays"}

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> SourceImage:
        lq, gt = self._arrays
        return SourceImage(gt[index], self.names[index], lq[index])


def latent_source(path: str | os.PathLike) -> LatentSource:
    """Pairs of latents path/lq.npy and path/gt.npy, floating-point arrays (n, h, w, c), named in path/names.txt.

    Raises:
        OSError: a file is missing or cannot be read.
        ValueError: a file is no array, or the shapes, the dtypes or the number of names do not match.
    """
    root = Path(path)
    lq, gt = (_open(root / name) for name in LATENT_FILES)
    names = tuple(line for line in map(str.strip, read_lines(root / NAMES_FILE)) if line)
    if lq.ndim != 4 or lq.shape != gt.shape or lq.dtype != gt.dtype or not np.issubdtype(lq.dtype, np.floating):
        raise ValueError(
            f"the latents in {root} are lq {lq.dtype} {lq.shape} and gt {gt.dtype} {gt.shape}; they must be "
            "floating-point arrays (n, h, w, c) of the same shape and dtype"
        )
    if len(names) != len(lq) or not names:
        raise ValueError(f"{root / NAMES_FILE} has {len(names)} names for {len(lq)} pairs; it needs one line per pair")
    return LatentSource(root, names, lq.shape)


def _open(file: Path) -> np.ndarray:
    try:
        return np.lib.format.open_memmap(file, mode="r")
    except ValueError as error:
        raise ValueError(f"{file} is not a complete .npy file of numbers: {error}") from error
