"""Put the trained demo model into the package: float16 weights and sample inputs in pisa_jax/assets/demo.

    python demo/ship.py --model runs/demo_model --adapters runs/demo_final/adapters.safetensors --data TRAIN

The samples are crops of images that were not used for training, degraded as in training, with a quarter of the height
and width. Their ground truths are written to tests/assets/demo. `--sem` is the strength of the trained sem adapter that
becomes the strength 1 of the shipped adapter.
"""

import argparse
import dataclasses
import shutil
from pathlib import Path

import numpy as np
from pictures import HELD_OUT
from PIL import Image

from pisa_jax.adapters import files
from pisa_jax.adapters.adapter_tree import Adapters
from pisa_jax.data.degradation import degrade_and_downscale
from pisa_jax.imaging.image_reading import read_rgb8
from pisa_jax.imaging.ranges import uint8_to_unit
from pisa_jax.sd.pretrained import DEMO

SAMPLE_SEED = 3
TRUTHS = Path(__file__).parents[1] / "tests" / "assets" / "demo"


def write_samples(photos: Path, out: Path, truths: Path) -> None:
    """Write the samples and their ground truths: the center of each held-out image, at most 640 x 512 pixels."""
    for folder in (out, truths):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    for index, held_out in enumerate(HELD_OUT):
        image, name = read_rgb8(photos / f"{held_out}.jpg"), held_out.removeprefix("budgie_")
        height, width = 512, min(640, image.shape[1] // 4 * 4)
        y, x = (image.shape[0] - height) // 2, (image.shape[1] - width) // 2
        crop = image[y : y + height, x : x + width]
        lq = degrade_and_downscale(uint8_to_unit(crop), np.random.default_rng((SAMPLE_SEED, index)))
        Image.fromarray(lq).save(out / f"{name}.png")
        Image.fromarray(crop).save(truths / f"{name}.jpg", quality=95, subsampling=0)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="--model of prior.py")
    parser.add_argument("--adapters", type=Path, required=True, help="output of train.py configs/demo_final.py")
    parser.add_argument("--data", type=Path, required=True, help="folder that contains photos/")
    parser.add_argument("--sem", type=float, default=1.0, help="factor for the alpha of sem")
    args = parser.parse_args()
    shutil.rmtree(DEMO, ignore_errors=True)
    shutil.copytree(args.model, DEMO)
    adapters = files.load_adapters(args.adapters)
    sem = adapters.specs["sem"]
    specs = adapters.specs | {"sem": dataclasses.replace(sem, alpha=sem.alpha * args.sem)}
    shipped = Adapters(adapters.trees, specs, base_model="demo")
    files.save_adapters(DEMO / "adapters.safetensors", shipped, "float16")
    write_samples(args.data / "photos", DEMO / "samples", TRUTHS)
    size = sum(path.stat().st_size for path in DEMO.rglob("*") if path.is_file())
    print(f"{size / 1e6:.1f} MB in {DEMO}")


if __name__ == "__main__":
    main()
