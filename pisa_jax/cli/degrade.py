"""Make a fixed set of degraded pictures to evaluate on: 8-bit LQ pictures at a quarter of the size of their GT.

    pisa-sr degrade --gt DIR --out DIR [--seed 0] [--overwrite]

OUT/lq and OUT/gt get PNG files of equal names, the GT cut to a multiple of 4 pixels. Degraded as in training, but
without the enlargement at the end, which is the model's work. What is drawn depends on the seed and the picture's name.
Bad files are named and left out, and the exit code is then 1. The folders appear only when they are complete.
"""

import argparse
import hashlib
import os
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

from pisa_jax.data.degradation import PISA_SR, degrade_and_downscale
from pisa_jax.imaging.image_io import from_array, read_rgb8, write_picture
from pisa_jax.metrics.pairing import list_pictures
from pisa_jax.metrics.psnr_ssim import RGB8

SIDES = ("lq", "gt")


def degraded_pair(picture: RGB8, seed: int, name: str) -> tuple[RGB8, RGB8]:
    """The (LQ, GT) made of a picture: GT cut at the right and below to multiples of 4, LQ with a quarter of its sides.

    ValueError for a picture with a side below 8.
    """
    height, width = (side - side % PISA_SR.scale for side in picture.shape[:2])
    gt = picture[:height, :width]
    # The name is an entropy of the generator, so that pictures differ and none depends on which others are there.
    digest = int.from_bytes(hashlib.sha256(name.encode()).digest(), "big")
    return degrade_and_downscale(gt / np.float32(255), np.random.default_rng((seed, digest))), gt


def write_pairs(files: Sequence[Path], out: Path, seed: int, report: Callable[[str], None]) -> int:
    """Write out/lq and out/gt, replacing older ones; returns how many pairs.

    What cannot be degraded goes to `report`. Raises OSError, and leaves what was there, if the folders cannot be
    written, and ValueError if there is nothing to write.
    """
    unfinished = out / ".incomplete"
    shutil.rmtree(unfinished, ignore_errors=True)

    def make(file: Path) -> str | None:
        try:
            pair = degraded_pair(read_rgb8(file), seed, file.stem)
        except (OSError, ValueError, MemoryError) as error:
            return f"{file}: {error or type(error).__name__}"
        for side, picture in zip(SIDES, pair, strict=True):
            write_picture(unfinished / side / f"{file.stem}.png", from_array(picture))
        return None

    try:
        for side in SIDES:
            (unfinished / side).mkdir(parents=True)
        with ThreadPoolExecutor(os.cpu_count()) as threads:
            results = tqdm(threads.map(make, files), total=len(files), unit="picture", disable=None)
            problems = [problem for problem in results if problem]
        for problem in problems:
            report(problem)
        if len(problems) == len(files):
            raise ValueError(f"none of the {len(files)} pictures could be degraded")
        for side in SIDES:
            shutil.rmtree(out / side, ignore_errors=True)
            (unfinished / side).rename(out / side)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return len(files) - len(problems)


def _parse(argv: Sequence[str] | None, prog: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gt", type=Path, required=True, metavar="DIR", help="pictures of high quality")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="gets the folders lq and gt")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the random draws (default 0)")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT/lq and OUT/gt if they exist")
    arguments = parser.parse_args(argv)
    if arguments.seed < 0:
        parser.error(f"--seed {arguments.seed}: give a whole number of at least 0")
    for folder in (arguments.out / side for side in SIDES):
        if arguments.gt.resolve().is_relative_to(folder.resolve()):
            parser.error(f"--gt {arguments.gt} lies in {folder}, which would be replaced; give another --out")
        if folder.exists() and not arguments.overwrite:
            parser.error(f"{folder} exists; add --overwrite to replace it, or give another --out")
    return arguments


def main(argv: Sequence[str] | None = None, prog: str = "pisa-sr degrade") -> int:
    """The exit code: 0 all degraded, 1 something was not, 2 wrong usage (through argparse)."""
    arguments = _parse(argv, prog)
    # Pictures are made side by side; OpenCV's own threads would only get in the way.
    cv2.setNumThreads(1)
    try:
        files = list_pictures(arguments.gt)
        shared = [stem for stem, count in Counter(file.stem for file in files).items() if count > 1]
        if shared:
            raise ValueError(f"names that differ in the ending only would overwrite each other: {', '.join(shared)}")
        made = write_pairs(files, arguments.out, arguments.seed, lambda text: print(text, file=sys.stderr))
    except (OSError, ValueError) as error:
        print(f"{prog}: {error}", file=sys.stderr)
        return 1
    print(f"{arguments.out}: {made} pairs, {len(files) - made} left out; seed {arguments.seed}")
    print(f"use it with: pisa-sr evaluate --lq {arguments.out / 'lq'} --gt {arguments.out / 'gt'}")
    return 0 if made == len(files) else 1
