"""Encode the pairs of pairs.py to the latents that prior.py and train.py (`data.source = "latents"`) read.

    python demo/latents.py --pairs runs/demo_pairs --vae runs/demo_vae --out runs/demo_latents

The output folder contains pix/ (LQ images and ground truths) and, if --pairs has the results of teacher.py, sem/ (LQ
images and results of the teacher). Pairs can be encoded in several orientations, since latents cannot be mirrored: the
result of the teacher for a mirrored image is nearly its mirrored result.
"""

import argparse
import functools
import itertools
import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
from crops import read_network_input
from vae import load as load_vae

from pisa_jax.data.latents import NAMES_FILE
from pisa_jax.data.prompts import read_prompts
from pisa_jax.imaging.image_files import find_images
from pisa_jax.imaging.image_reading import read_rgb8
from pisa_jax.imaging.ranges import uint8_to_signed
from pisa_jax.runtime.compilation import compiler_options
from pisa_jax.sd import backbone as bb

BATCH = 8
# Folders of latents, and the images that their lq.npy and gt.npy are encoded from.
STAGES = {"pix": ("lq", "gt"), "sem": ("lq", "teacher")}
# Mirrored (-1) or not (1), and the quarter turns after that.
ORIENTATIONS = ((1, 0), (-1, 1), (-1, 0), (1, 1))


def oriented(images: Iterable[np.ndarray], count: int) -> Iterator[np.ndarray]:
    """Yield every image in the first `count` orientations."""
    for image in images:
        yield from (np.rot90(image[:, ::mirrored], turns) for mirrored, turns in ORIENTATIONS[:count])


def oriented_names(name: str, count: int) -> list[str]:
    """Return the names of the orientations of an image: "000012.0.png", ..."""
    path = Path(name)
    return [f"{path.stem}.{index}{path.suffix}" for index in range(count)]


def encode_files(encode, files: Sequence[Path], side: str, size: int, count: int = 1) -> np.ndarray:
    """Encode images in `count` orientations, `size` at a time, to float16 latents."""
    parts, read = [], read_network_input if side == "lq" else read_rgb8
    with ThreadPoolExecutor() as pool:
        reading = oriented(pool.map(read, files), count)  # ahead of the device
        for _ in range(0, len(files) * count, size):
            images = uint8_to_signed(np.stack(list(itertools.islice(reading, size))))
            missing = size - len(images)  # the last batch is padded, so that one program serves all
            padded = np.concatenate([images, np.zeros((missing, *images.shape[1:]), np.float32)])
            parts.append(np.asarray(encode(padded), np.float16)[: len(images)])
    return np.concatenate(parts)


def encode_pairs(pairs: Path, vae: Path, out: Path, size: int = BATCH, count: int = 1) -> None:
    """Encode all pairs in `count` orientations; for `sem`, those that the teacher has upscaled."""
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
                np.save(made, encode_files(encode, files, side, size, count))
            encoded[files] = made
        every = [variant for name in names for variant in oriented_names(name, count)]
        (out / stage / NAMES_FILE).write_text("\n".join(every) + "\n")
        print(f"{len(every)} pairs of latents in {out / stage}", flush=True)
    prompts = read_prompts(pairs / "prompts.jsonl")
    texts = {path: text for name, text in prompts.items() for path in oriented_names(name, count)}
    lines = [json.dumps({"path": path, "prompt": text}) for path, text in texts.items()]
    (out / "prompts.jsonl").write_text("\n".join(lines) + "\n")


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=Path, required=True, help="--out of pairs.py")
    parser.add_argument("--vae", type=Path, required=True, help="--out of vae.py")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--orientations", type=int, choices=range(1, 5), default=1)
    args = parser.parse_args()
    encode_pairs(args.pairs, args.vae, args.out, count=args.orientations)


if __name__ == "__main__":
    main()
