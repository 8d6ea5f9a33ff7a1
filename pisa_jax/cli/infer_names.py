"""Input files of `pisa-sr infer`, and the parts of the names of its output files."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from pisa_jax.config import Scales
from pisa_jax.imaging.image_files import list_images
from pisa_jax.runtime.file_identity import file_id
from pisa_jax.runtime.messages import number_text


def find_inputs(paths: Iterable[str | Path]) -> list[Path]:
    """List the given files, and the images directly inside the given folders, in order and without duplicates.

    One file under two paths is a duplicate unless its name differs. A path that does not exist stays in the list: it is
    reported as a failure of its own.
    """
    found: dict[tuple, Path] = {}
    for path in map(Path, paths):
        for file in [path / name for name in list_images(path)] if path.is_dir() else [path]:
            found.setdefault((file_id(file) or file, file.name), file)
    return list(found.values())


def scale_marks(pairs: Sequence[Scales]) -> list[str]:
    """Make the part of an output name that tells scales apart: "_p1_s0.5" for two, "_1_0.5_0.7" for others.

    Where there is nothing to tell apart it is empty.
    """
    if len(pairs) == 1:
        return [""]
    letters = ("p", "s") if len(pairs[0]) == 2 else ("",) * len(pairs[0])
    return [
        "".join(f"_{letter}{number_text(scale)}" for letter, scale in zip(letters, scales, strict=True))
        for scales in pairs
    ]
