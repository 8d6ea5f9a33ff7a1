"""Encode the pairs of pairs.py to the latents that prior.py and train.py (`data.source = "latents"`) read.

    python demo/latents.py --pairs runs/demo_pairs --vae runs/demo_vae --out runs/demo_latents

The output folder contains pix/ (LQ images and ground truths) and, if --pairs has the results of teacher.py, sem/ (LQ
images and results of the teacher).
"""

import argparse
import functools
import itertools
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
from crops import read_network_input
from vae import load as load_vae

from pisa_jax.data.latents import NAMES_FILE
from pisa_jax.imaging.image_files import find_images
from pisa_jax.imaging.image_reading import read_rgb8
from pisa_jax.imaging.ranges import uint8_to_signed
from pisa_jax.runtime.compilation import compiler_options
from pisa_jax.sd import backbone as bb

BATCH = 8
# Folders of latents, and the images that their lq.npy and gt.npy are encoded from.
STAGES = {"pix": ("lq", "gt"), "sem": ("lq", "teacher")}


def encode_files(encode, files: Sequence[Path], side: str, size: int) -> np.ndarray:
    """Encode images, `size` at a time, to float16 latents."""
    parts, read = [], read_network_input if side == "lq" else read_rgb8
    with ThreadPoolExecutor() as pool:
        reading = pool.map(read, files)  # ahead of the device
        for _ in range(0, len(files), size):
            images = uint8_to_signed(np.stack(list(itertools.islice(reading, size))))
            missing = size - len(images)  # the last batch is padded, so that one program serves all
            padded = np.concatenate([images, np.zeros((missing, *images.shape[1:]), np.float32)])
            parts.append(np.asarray(encode(padded), np.float16)[: len(images)])
    return np.concatenate(parts)


def encode_pairs(pairs: Path, vae: Path, out: Path, size: int = BATCH) -> None:
    """Encode all pairs; for `sem`, those that the teacher has upscaled."""
    backbone, params = load_vae(vae)
    encode = jax.jit(functools.partial(bb.encode, backbone, params), compiler_options=compiler_options())
    encoded: dict[tuple[Path, ...], Path] = {}
    for stage, sides in STAGES.items():
        if not (pairs / sides[1]).is_dir():
            continue
        names = [file.name for file in find_images(pairs / sides[1])]
        (out / stage).mkdir(parents=True, exist_ok=True)
        for side, target in zip(sides, ("lq", "gt"), strict=True):
            files, made = tuple(pairs / side / name for name in names), out / stage / f"{target}.npy"
            if files in encoded:  # the LQ images, for the second stage
                shutil.copy(encoded[files], made)
            else:
                np.save(made, encode_files(encode, files, side, size))
            encoded[files] = made
        (out / stage / NAMES_FILE).write_text("\n".join(names) + "\n")
        print(f"{len(names)} pairs of latents in {out / stage}", flush=True)
    shutil.copy(pairs / "prompts.jsonl", out)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=Path, required=True, help="--out of pairs.py")
    parser.add_argument("--vae", type=Path, required=True, help="--out of vae.py")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    encode_pairs(args.pairs, args.vae, args.out)


if __name__ == "__main__":
    main()
