"""Make a fixed evaluation set: 8-bit LQ images with a quarter of the width and height of their GT.

    pisa-sr degrade --gt DIR --out DIR [--seed 0] [--overwrite]

Writes PNG files of equal names to OUT/lq and OUT/gt; the GT is cropped to multiples of 4 pixels. The degradation is
that of training without the final upscaling, and depends only on the seed and the file name. Files that cannot be
degraded are reported and skipped, and the exit code is then 1. The output folders appear only when they are complete.
"""

import argparse
import hashlib
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np

from pisa_jax.cli.arguments import local_path
from pisa_jax.data.degradation import PISA_SR, degrade_and_downscale
from pisa_jax.imaging.arrays import RGB8
from pisa_jax.imaging.image_data import from_array
from pisa_jax.imaging.image_files import find_images
from pisa_jax.imaging.image_reading import read_rgb8
from pisa_jax.imaging.image_writing import write_image
from pisa_jax.imaging.ranges import uint8_to_unit
from pisa_jax.runtime.console import progress_bar, say, show_any_name
from pisa_jax.runtime.file_identity import file_id, is_inside, probe_names
from pisa_jax.runtime.messages import error_text

SIDES = ("lq", "gt")


def degraded_pair(image: RGB8, seed: int, name: str) -> tuple[RGB8, RGB8]:
    """Make (LQ, GT) of an image: GT is cropped (right, bottom) to multiples of 4, LQ has a quarter of its sides.

    Raises ValueError for an image with a side below 8.
    """
    height, width = (side - side % PISA_SR.scale for side in image.shape[:2])
    gt = image[:height, :width]
    # The name seeds the generator too: images get different degradations, independent of the other files.
    digest = int.from_bytes(hashlib.sha256(name.encode()).digest(), "big")
    return degrade_and_downscale(uint8_to_unit(gt), np.random.default_rng((seed, digest))), gt


def write_pairs(files: Sequence[Path], out: Path, seed: int, warn: Callable[[str], None]) -> int:
    """Write out/lq and out/gt, replacing existing folders; returns the number of pairs.

    `warn` is called with the reason of every skipped file. Raises OSError if a folder cannot be written, ValueError if
    no file can be degraded; existing folders then remain unchanged.
    """
    unfinished = out / ".incomplete"
    shutil.rmtree(unfinished, ignore_errors=True)

    def write_pair(file: Path) -> str | None:
        try:
            pair = degraded_pair(read_rgb8(file), seed, file.stem)
        except Exception as error:  # whatever one image raises, the others are degraded
            return f"{file}: {error_text(error)}"
        for side, image in zip(SIDES, pair, strict=True):
            write_image(unfinished / side / f"{file.stem}.png", from_array(image))
        return None

    try:
        for side in SIDES:
            (unfinished / side).mkdir(parents=True)
        problems = []
        with ThreadPoolExecutor(os.cpu_count()) as threads, progress_bar(len(files)) as bar:
            for problem in threads.map(write_pair, files):
                problems += [problem] if problem else []
                bar.update()
        for problem in problems:
            warn(problem)
        if len(problems) == len(files):
            raise ValueError(f"none of the {len(files)} images could be degraded")
        for side in SIDES:
            shutil.rmtree(out / side, ignore_errors=True)
            (unfinished / side).rename(out / side)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return len(files) - len(problems)


def check_files(files: Sequence[Path], out: Path) -> None:
    """Raise ValueError if results would have one name, or if a folder that is replaced holds one of the files."""
    existing = next(folder for folder in (out, *out.absolute().parents) if folder.is_dir())
    with probe_names(existing) as probe:
        for file in files:
            if other := probe.take(f"{file.stem}.png", file):
                raise ValueError(f"the results of {other.name} and {file.name} would overwrite each other; rename one")
    identities = {file_id(file): file for file in files}
    for replaced in (path for side in SIDES for path in (out / side).rglob("*")):
        if (identity := file_id(replaced)) and identity in identities:
            raise ValueError(f"{identities[identity]} is also {replaced}, which would be replaced; give another --out")


def _parse(argv: Sequence[str] | None, prog: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gt", type=local_path, required=True, metavar="DIR", help="folder of high-quality images")
    parser.add_argument(
        "--out", type=local_path, required=True, metavar="DIR", help="output folder of the folders lq and gt"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="random seed (default 0)")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT/lq and OUT/gt if they exist")
    arguments = parser.parse_args(argv)
    if arguments.seed < 0:
        parser.error(f"--seed {arguments.seed}: give an integer of at least 0")
    for folder in (arguments.out / side for side in SIDES):
        if folder.is_dir() and is_inside(arguments.gt, folder):
            parser.error(f"--gt {arguments.gt} is inside {folder}, which would be replaced; give another --out")
        if folder.exists() and not arguments.overwrite:
            parser.error(f"{folder} exists; add --overwrite to replace it, or give another --out")
    return arguments


def main(argv: Sequence[str] | None = None, prog: str = "pisa-sr degrade") -> int:
    """Run the command; returns 0 if all images were degraded, else 1. Wrong usage exits with 2."""
    show_any_name()
    arguments = _parse(argv, prog)
    # Images are degraded in parallel threads; OpenCV's own threads would compete with them.
    cv2.setNumThreads(1)
    try:
        files = find_images(arguments.gt)
        check_files(files, arguments.out)
        count = write_pairs(files, arguments.out, arguments.seed, lambda text: say(text, sys.stderr))
    except (OSError, ValueError) as error:
        say(f"{prog}: {error}", sys.stderr)
        return 1
    say(f"{arguments.out}: {count} pairs, {len(files) - count} skipped; seed {arguments.seed}", sys.stdout)
    say(f"use it with: pisa-sr evaluate --lq {arguments.out / 'lq'} --gt {arguments.out / 'gt'}", sys.stdout)
    return 0 if count == len(files) else 1
