"""Input files of `pisa-sr infer`, and the names of its output files."""

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from pisa_jax.config import Scales
from pisa_jax.imaging.image_files import list_images


def find_inputs(paths: Iterable[str | Path]) -> list[Path]:
    """List the given files, and the images directly inside the given folders, in order and without duplicates.

    A path that does not exist stays in the list: it is reported when it is read.
    """
    found: dict[Path, None] = {}
    for path in map(Path, paths):
        found |= dict.fromkeys([path / name for name in list_images(path)] if path.is_dir() else [path])
    return list(found)


def output_stems(inputs: Sequence[Path]) -> list[str]:
    """Make a unique output name without suffix for each input.

    It is the stem of the input. If stems are not unique, it also has the suffix, then the folder, then a number.
    """
    for name in (
        lambda p: p.stem,
        lambda p: p.name.replace(".", "_"),
        lambda p: f"{p.resolve().parent.name}_{p.name.replace('.', '_')}",
    ):
        stems = [name(path) for path in inputs]
        if max(Counter(stems).values(), default=1) == 1:
            return stems
    return [f"{index:04d}_{stem}" for index, stem in enumerate(stems)]


def scale_marks(pairs: Sequence[Scales]) -> list[str]:
    """Make the part of an output name that tells pairs of scales apart, "_p1_s0.5"; "" for a single pair."""
    return [f"_p{pix:g}_s{sem:g}" for pix, sem in pairs] if len(pairs) > 1 else [""]
