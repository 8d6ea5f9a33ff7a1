"""Compilation of a folder of images of many sizes, and the cost of the masks of padded arrays.

    python benchmarks/buckets.py --images FOLDER              # infer.py with a cold, then with a warm compilation cache
    python benchmarks/buckets.py --side 512 --repeats 9       # the masks only: a full bucket with and without them

The share of compilation is that of the seconds between the first and the last file.
"""

import argparse
import functools
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
from timing import alternate, seconds

from pisa_jax import Upscaler
from pisa_jax.pipeline import Pipeline

ROOT = Path(__file__).resolve().parents[1]
SCALES = (1.0, 0.7)
# Names of the programs of inference in the compilation cache.
PROGRAMS = re.compile(r"jit_(encode|predict|render|recolor|.*tiles|.*sample|.*trunk)")


def run_folder(images: Path, options: list[str], cache: Path, out: Path) -> str:
    """Upscale a folder in a process of its own; returns a line of figures."""
    before = programs(cache)
    command = [sys.executable, str(ROOT / "infer.py"), "-i", str(images), "-o", str(out), "--compile-cache", str(cache)]
    start = time.perf_counter()
    done = subprocess.run([*command, "--scales", "1,0.7", *options], capture_output=True, text=True, check=True)
    whole = time.perf_counter() - start
    obtained = [float(found) for found in re.findall(r"compiled .* in ([\d.]+) s", done.stderr)]
    upscaling = float(re.search(r" in ([\d.]+) s; results", done.stdout)[1])
    return (
        f"{len(programs(cache)) - len(before)} programs compiled, {len(obtained)} obtained in {sum(obtained):.1f} s of "
        f"{upscaling:.1f} s ({sum(obtained) / upscaling:.0%}); {whole:.1f} s with the start; {done.stdout.strip()}"
    )


def programs(cache: Path) -> set[str]:
    """Return the names of the programs of inference in a compilation cache."""
    return {file.name for file in cache.glob("*-cache") if PROGRAMS.match(file.name)}


def measure_masks(pipeline: Pipeline, side: int, repeats: int) -> None:
    """Time every stage for an image of the size of its bucket, with masks and without them."""
    factor = pipeline.base.vae_scale_factor
    batch = np.random.default_rng(0).uniform(-1, 1, (1, side, side, 3)).astype(np.float32)
    sizes = np.full((1, 2), side // factor, np.int32)
    pixels = sizes * factor
    latents = pipeline.encode(batch, None)
    predictions = pipeline.predict(latents, True)
    stages = {
        "encode": (lambda: pipeline.encode(batch, None), lambda: pipeline.encode(batch, None, sizes)),
        "predict": (lambda: pipeline.predict(latents, True).eps, lambda: pipeline.predict(latents, True, sizes).eps),
        "render": (
            lambda: pipeline.render(predictions, SCALES, batch, (side, side)),
            lambda: pipeline.render(predictions, SCALES, batch, pixels),
        ),
    }
    whole = np.zeros(2)
    for name, (plain, masked) in stages.items():
        plain(), masked()  # compiles
        timed = {"plain": functools.partial(seconds, plain), "masked": functools.partial(seconds, masked)}
        medians = [statistics.median(taken) for taken in alternate(timed, repeats).values()]
        whole += medians
        print(f"{name}: {medians[0]:.3f} s, with masks {medians[1]:.3f} s ({medians[1] / medians[0]:.3f})", flush=True)
    print(f"all stages: {whole[0]:.3f} s, with masks {whole[1]:.3f} s ({whole[1] / whole[0]:.3f})")


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, help="folder of images")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--adapters")
    parser.add_argument("--scale", default="4", help="upscale factor of the folder")
    parser.add_argument("--side", type=int, default=512, help="side of the upscaled image for the masks, in pixels")
    parser.add_argument("--repeats", type=int, default=9)
    args = parser.parse_args()
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, {args.model}")
    if not args.images:
        # Without windows: the UNet runs on the whole bucket, as it does for images of up to 768 x 768 at its full size.
        upscaler = Upscaler.load(args.model, args.adapters, tile=0, vae_tile=0)
        measure_masks(upscaler.pipeline, args.side, args.repeats)
        return
    options = ["--model", args.model, *(["--adapters", args.adapters] if args.adapters else []), "-s", args.scale]
    with tempfile.TemporaryDirectory() as folder:
        for state in ("cold", "warm"):
            cache, out = Path(folder, "cache"), Path(folder, state)
            print(f"{state} cache: {run_folder(args.images, options, cache, out)}", flush=True)


if __name__ == "__main__":
    main()
