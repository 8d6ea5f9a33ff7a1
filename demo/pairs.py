"""Make the pairs that the adapters are trained on: ground truths, which are crops of photographs, and LQ images.

    python demo/pairs.py --data runs/demo_pictures --out runs/demo_pairs --count 2000

Pair i depends only on --seed and i. The output folder contains lq/NAME.png (64 x 64), gt/NAME.png (256 x 256) and
prompts.jsonl.
"""

import argparse
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import crops
import cv2
import numpy as np

from pisa_jax.data.degradation import degrade_and_downscale
from pisa_jax.data.prompts import read_prompts
from pisa_jax.data.sources import folder_source
from pisa_jax.imaging.image_data import from_array
from pisa_jax.imaging.image_writing import write_image
from pisa_jax.imaging.ranges import uint8_to_unit

SIDE = 256


class Pair(NamedTuple):
    """An LQ image, its ground truth, and the index of the photograph."""

    lq: np.ndarray
    gt: np.ndarray
    photograph: int


def make_pair(photographs: list[np.ndarray], seed: int, index: int) -> Pair:
    """Draw a photograph, crop it and degrade the crop."""
    rng = np.random.default_rng((seed, index))
    chosen = int(rng.integers(len(photographs)))
    gt = crops.random_crop(photographs[chosen], SIDE, rng)
    return Pair(degrade_and_downscale(uint8_to_unit(gt), rng), gt, chosen)


def write_pairs(data: Path, out: Path, count: int, seed: int = 0) -> None:
    """Write the pairs that do not exist yet, and all prompts."""
    source, prompts = folder_source(data), read_prompts(data / "prompts.jsonl")
    photographs = [record.image for record in source]
    for side in ("lq", "gt"):
        (out / side).mkdir(parents=True, exist_ok=True)

    def write(index: int) -> str:
        pair, file = make_pair(photographs, seed, index), f"{index:06d}.png"
        for side, image in (("lq", pair.lq), ("gt", pair.gt)):
            if not (out / side / file).exists():
                write_image(out / side / file, from_array(image))
        return json.dumps({"path": file, "prompt": prompts[source.names[pair.photograph]]})

    cv2.setNumThreads(1)
    with ThreadPoolExecutor() as pool:
        lines = list(pool.map(write, range(count)))
    (out / "prompts.jsonl").write_text("\n".join(lines) + "\n")
    print(f"{count} pairs in {out}")


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="--out of pictures.py")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--count", type=int, required=True)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    write_pairs(args.data, args.out, args.count, args.seed)


if __name__ == "__main__":
    main()
