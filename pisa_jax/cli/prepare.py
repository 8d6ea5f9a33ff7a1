"""Pack a folder of pictures, or of LQ/GT pairs, into a tfds data set in array_record format. Needs no TensorFlow.

    pisa-sr prepare DIR --out DIR [--name NAME] [--split train] [--paired] [--overwrite]

Every picture is decoded once to check it; the files themselves are stored unchanged. Bad files are named and left out,
and the exit code is then 1. The data set appears under its name only when it is complete.
"""

import argparse
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pisa_jax.data.sources import FileSource, folder_source, pair_source


def check_pictures(source: FileSource, report: Callable[[str], None]) -> list[int]:
    """Indices of the pictures that decode (and, in pairs, fit); each other one's reason goes to `report`."""

    def reason(index: int) -> str | None:
        try:
            source[index]
        except OSError as error:
            return str(error)
        return None

    good = []
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        for index, problem in enumerate(threads.map(reason, range(len(source)))):
            if problem is None:
                good.append(index)
            else:
                report(problem)
    return good


def read_examples(source: FileSource, indices: Sequence[int]) -> Iterator[dict[str, bytes | str]]:
    """The examples that `tfds_files.write_tfds` takes: undecoded files and their names."""
    for index in indices:
        name = source.names[index]
        gt = (source.root / name).read_bytes()
        if source.paired:
            yield {"gt": gt, "lq": (source.root / source.lq_names[index]).read_bytes(), "path": name}
        else:
            yield {"image": gt, "path": name}


def pack(source: FileSource, indices: Sequence[int], out: Path, name: str, split: str) -> Path:
    """Write the data set beside its place and move it there; an older one of that name is replaced. Returns its folder.

    Raises whatever writing raises, e.g. OSError on a full disk, and leaves nothing half-written.
    """
    from pisa_jax.data.tfds import write_tfds

    unfinished, replaced = out / f".{name}.incomplete", out / f".{name}.replaced"
    for leftover in (unfinished, replaced):
        shutil.rmtree(leftover, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        written = write_tfds(unfinished, name, split, read_examples(source, indices), source.paired)
        if (out / name).exists():
            (out / name).rename(replaced)
        (unfinished / name).rename(out / name)
        return out / written.relative_to(unfinished)
    finally:
        for leftover in (unfinished, replaced):
            shutil.rmtree(leftover, ignore_errors=True)


def _parse(argv: Sequence[str] | None, prog: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="pictures, in subfolders too; with --paired it holds lq/ and gt/")
    parser.add_argument("--out", type=Path, required=True, help="the data set becomes OUT/NAME")
    parser.add_argument("--name", help="default: the folder's name in lower case")
    parser.add_argument("--split", default="train", help="name of its one split (default: train)")
    parser.add_argument("--paired", action="store_true", help="pack pairs lq/NAME and gt/NAME")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT/NAME if it exists")
    arguments = parser.parse_args(argv)
    if arguments.name is None:
        arguments.name = re.sub(r"\W+", "_", arguments.folder.resolve().name.lower())
    for option in ("name", "split"):
        value = getattr(arguments, option)
        if not re.fullmatch(r"[a-z]\w*", value, re.ASCII):
            parser.error(f"--{option} {value!r}: use letters, digits and _, starting with a small letter")
    if (arguments.out / arguments.name).exists() and not arguments.overwrite:
        parser.error(
            f"{arguments.out / arguments.name} exists; add --overwrite to replace it, or choose another --name"
        )
    return arguments


def main(argv: Sequence[str] | None = None, prog: str = "pisa-sr prepare") -> int:
    arguments = _parse(argv, prog)
    try:
        source = (pair_source if arguments.paired else folder_source)(arguments.folder)
        good = check_pictures(source, lambda problem: print(f"left out: {problem}", file=sys.stderr))
        if not good:
            raise ValueError(f"none of the {len(source)} pictures of {arguments.folder} can be read")
        folder = pack(source, good, arguments.out, arguments.name, arguments.split)
    except (OSError, ValueError) as error:
        print(f"{prog}: {error}", file=sys.stderr)
        return 1
    bad = len(source) - len(good)
    print(f"{folder}: {len(good)} {'pairs' if arguments.paired else 'pictures'}, {bad} left out")
    print(f"use it with: pisa-sr train CONFIG --data.source tfds --data.path {folder}")
    return 1 if bad else 0
