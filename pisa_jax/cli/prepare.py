"""Pack a folder of images, or of LQ/GT pairs, into a tfds data set in array_record format, without TensorFlow.

    pisa-sr prepare DIR --out DIR [--name NAME] [--split train] [--paired] [--overwrite]

Every image is decoded once as a check; the files are stored unchanged. Unreadable files are reported and skipped, and
the exit code is then 1. The data set appears under its name only when it is complete.
"""

import argparse
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pisa_jax.cli.arguments import local_path
from pisa_jax.data.sources import FileSource, folder_source, pair_source
from pisa_jax.runtime.console import say, show_any_name


def readable_indices(source: FileSource, warn: Callable[[str], None]) -> list[int]:
    """Indices of the images that can be decoded; `warn` is called with the reason of every other image."""

    def reason(index: int) -> str | None:
        try:
            source.names[index].encode()  # tfds stores names as UTF-8
            source[index]
        except UnicodeEncodeError:
            return f"{source.names[index]!a}: the name is not valid UTF-8; rename the file"
        except OSError as error:
            return str(error)
        return None

    readable = []
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        for index, problem in enumerate(threads.map(reason, range(len(source)))):
            if problem is None:
                readable.append(index)
            else:
                warn(problem)
    return readable


def read_examples(source: FileSource, indices: Sequence[int]) -> Iterator[dict[str, bytes | str]]:
    """Yield the examples for `data.tfds.write_tfds`: encoded files and their names."""
    for index in indices:
        name = source.names[index]
        gt = (source.root / name).read_bytes()
        if source.paired:
            yield {"gt": gt, "lq": (source.root / source.lq_names[index]).read_bytes(), "path": name}
        else:
            yield {"image": gt, "path": name}


def pack(source: FileSource, indices: Sequence[int], out: Path, name: str, split: str) -> Path:
    """Write the data set to a temporary folder and move it to out/name, replacing an existing one; returns its folder.

    If writing raises an error, such as OSError on a full disk, an existing data set remains and no partial one is left.
    """
    from pisa_jax.data.tfds import write_tfds

    unfinished, replaced = _temporary_folders(out / name)
    clean(out / name)
    unfinished.mkdir(parents=True)
    try:
        written = write_tfds(unfinished, name, split, read_examples(source, indices), source.paired)
        if (out / name).exists():
            (out / name).rename(replaced)
        (unfinished / name).rename(out / name)
        return out / written.relative_to(unfinished)
    finally:
        clean(out / name)


def clean(final: Path) -> None:
    """Delete what a run left behind, also one that was killed; an old data set returns if no new one has its place."""
    unfinished, replaced = _temporary_folders(final)
    if replaced.exists() and not final.exists():
        replaced.rename(final)
    for leftover in (unfinished, replaced):
        shutil.rmtree(leftover, ignore_errors=True)


def _temporary_folders(final: Path) -> tuple[Path, Path]:
    """Return the folders of the unfinished data set and of the one that it replaces, next to `final`."""
    return final.with_name(f".{final.name}.incomplete"), final.with_name(f".{final.name}.replaced")


def _parse(argv: Sequence[str] | None, prog: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "folder", type=local_path, help="folder of images and subfolders; with --paired, folder of lq/ and gt/"
    )
    parser.add_argument(
        "--out", type=local_path, required=True, help="output folder; the data set is written to OUT/NAME"
    )
    parser.add_argument("--name", help="name of the data set (default: name of the folder in lower case)")
    parser.add_argument("--split", default="train", help="name of the split (default: train)")
    parser.add_argument("--paired", action="store_true", help="pack pairs lq/NAME and gt/NAME")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT/NAME if it exists")
    arguments = parser.parse_args(argv)
    if arguments.name is None:
        arguments.name = re.sub(r"\W+", "_", arguments.folder.resolve().name.lower())
    for option in ("name", "split"):
        value = getattr(arguments, option)
        if not re.fullmatch(r"[a-z]\w*", value, re.ASCII):
            parser.error(f"--{option} {value!r}: use letters, digits and _, starting with a lower-case letter")
    return arguments


def main(argv: Sequence[str] | None = None, prog: str = "pisa-sr prepare") -> int:
    """Run the command; returns 0 (all images packed), 1 (failed, or images skipped) or 130 (interrupted).

    Wrong usage exits with 2.
    """
    show_any_name()
    arguments = _parse(argv, prog)
    final = arguments.out / arguments.name
    try:
        clean(final)
        if final.exists() and not arguments.overwrite:
            say(f"{prog}: {final} exists; add --overwrite to replace it, or choose another --name", sys.stderr)
            return 2
        source = (pair_source if arguments.paired else folder_source)(arguments.folder)
        readable = readable_indices(source, lambda problem: say(f"skipped: {problem}", sys.stderr))
        if not readable:
            raise ValueError(f"none of the {len(source)} images of {arguments.folder} can be read")
        folder = pack(source, readable, arguments.out, arguments.name, arguments.split)
    except (OSError, ValueError) as error:
        say(f"{prog}: {error}", sys.stderr)
        return 1
    except KeyboardInterrupt:
        say(f"{prog}: interrupted; nothing was written", sys.stderr)
        return 130
    skipped = len(source) - len(readable)
    say(f"{folder}: {len(readable)} {'pairs' if arguments.paired else 'images'}, {skipped} skipped", sys.stdout)
    say(f"use it with: pisa-sr train CONFIG --data.source tfds --data.path {folder}", sys.stdout)
    return 1 if skipped else 0
