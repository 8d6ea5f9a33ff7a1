"""Put the trained demo model into the package: float16 weights and sample inputs in pisa_jax/assets/demo.

    python demo/ship.py --model runs/demo_model --adapters runs/demo_sem/adapters.safetensors --data DATA --rank 32

The samples are crops of images in DATA that were not used for training, degraded as in training, with a quarter of the
height and width. Their ground truths are written to tests/assets/demo. `--rank` replaces every LoRA update by its best
approximation of a lower rank. `--sem` is the strength of the trained sem adapter that becomes the strength 1 of the
shipped adapter.
"""

import argparse
import dataclasses
import shutil
from pathlib import Path

import numpy as np
from PIL import Image

from pisa_jax.adapters import files
from pisa_jax.adapters.adapter_tree import Adapters
from pisa_jax.data.degradation import degrade_and_downscale
from pisa_jax.imaging.image_reading import read_rgb8
from pisa_jax.imaging.ranges import uint8_to_unit
from pisa_jax.sd.pretrained import DEMO

# Images with edges, text, a face and feathers, and seeds of moderate degradations. Nothing may train on them.
SAMPLES = {
    "roman_colosseum": ("train/photos/budgie_roman_colosseum.jpg", (2, 0)),
    "codec_wiki": ("real_lr/screenshots/codec_wiki.png", (7, 1)),
    "painted_face": ("eval/Kodak24/kodim15.png", (5, 2)),
    "perched_osprey": ("train/photos/budgie_perched_osprey.jpg", (3, 2)),
}
TRUTHS = Path(__file__).parents[1] / "tests" / "assets" / "demo"


def reduce_rank(factors: dict[str, np.ndarray], rank: int) -> dict[str, np.ndarray]:
    """Return factors a and b of a lower rank with the smallest squared error of a b (Eckart-Young theorem)."""
    a, b = factors["a"], factors["b"]
    left, values, right = np.linalg.svd(a.reshape(-1, a.shape[-1]) @ b.reshape(b.shape[-2:]), full_matrices=False)
    root = np.sqrt(values[:rank])
    return {
        "a": (left[:, :rank] * root).reshape(*a.shape[:-1], rank),
        "b": (root[:, None] * right[:rank]).reshape(*b.shape[:-2], rank, b.shape[-1]),
    }


def reduced(adapters: Adapters, rank: int) -> Adapters:
    """Reduce LoRA adapters to a rank; alpha / rank stays."""
    trees = {
        name: {path: reduce_rank(factors, rank) for path, factors in tree.items()}
        for name, tree in adapters.trees.items()
    }
    specs = {
        name: dataclasses.replace(spec, rank=rank, alpha=spec.alpha * rank / spec.rank)
        for name, spec in adapters.specs.items()
    }
    return adapters._replace(trees=trees, specs=specs)


def write_samples(data: Path, out: Path, truths: Path) -> None:
    """Write the samples and their ground truths: the center of each image, at most 640 x 512 pixels."""
    for folder in (out, truths):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    for name, (file, seed) in SAMPLES.items():
        image = read_rgb8(data / file)
        height, width = (min(limit, side // 4 * 4) for limit, side in zip((512, 640), image.shape, strict=False))
        y, x = (image.shape[0] - height) // 2, (image.shape[1] - width) // 2
        crop = image[y : y + height, x : x + width]
        lq = degrade_and_downscale(uint8_to_unit(crop), np.random.default_rng(seed))
        Image.fromarray(lq).save(out / f"{name}.png")
        Image.fromarray(crop).save(truths / f"{name}.jpg", quality=95, subsampling=0)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="--model of adversarial.py")
    parser.add_argument("--adapters", type=Path, required=True, help="output of train.py configs/demo_sem.py")
    parser.add_argument("--data", type=Path, required=True, help="folder that contains train/, eval/ and real_lr/")
    parser.add_argument("--rank", type=int, help="rank of the shipped adapters (default: as trained)")
    parser.add_argument("--sem", type=float, default=1.0, help="factor for the alpha of sem")
    args = parser.parse_args()
    adapters = files.load_adapters(args.adapters)
    adapters = reduced(adapters, args.rank) if args.rank else adapters
    card = (DEMO / "README.md").read_text()
    shutil.rmtree(DEMO)
    shutil.copytree(args.model, DEMO)
    (DEMO / "README.md").write_text(card)
    sem = adapters.specs["sem"]
    specs = adapters.specs | {"sem": dataclasses.replace(sem, alpha=sem.alpha * args.sem)}
    shipped = Adapters(adapters.trees, specs, base_model="demo")
    files.save_adapters(DEMO / "adapters.safetensors", shipped, "float16")
    write_samples(args.data, DEMO / "samples", TRUTHS)
    size = sum(path.stat().st_size for path in DEMO.rglob("*") if path.is_file())
    print(f"{size / 1e6:.1f} MB in {DEMO}")


if __name__ == "__main__":
    main()
