"""Errors of VAE tiling in gray levels, and visibility of seams.

    python benchmarks/tiles.py photo.jpg --size 2048 --tile 512 --mode exact

The error of the encoder is measured after the untiled decoder. "beside borders" is the mean error of the two rows or
columns along all borders between tiles, divided by the mean error of all other pixels: 1 without seams.
"""

import argparse
import time
from pathlib import Path

import jax
import numpy as np
from PIL import Image, ImageOps

from pisa_jax import Upscaler
from pisa_jax.model import Predictions


def read(path: Path, side: int) -> np.ndarray:
    """Read the center of an image, resized to a square of `side` pixels: (1, side, side, 3) in [-1, 1]."""
    with Image.open(path) as image:
        square = ImageOps.fit(image.convert("RGB"), (side, side), Image.Resampling.BICUBIC)
    return np.float32(square)[None] / 127.5 - 1


def decoded(upscaler: Upscaler, latents: np.ndarray, style: np.ndarray) -> np.ndarray:
    """Decode latents to gray levels."""
    nothing = np.zeros_like(latents)
    images = upscaler.pipeline.render(Predictions(latents, (nothing, nothing)), (1.0, 1.0), style, style.shape[1:3])
    return 127.5 * (images + 1)


def compare(found: np.ndarray, expected: np.ndarray, tile: int) -> str:
    """Format the errors in gray levels, and their ratio beside the borders of tiles."""
    error = np.abs(found - expected)[0]
    borders = np.arange(tile, len(error), tile)
    beside = np.zeros(error.shape[:2], bool)
    for line in (*borders - 1, *borders):
        beside[line], beside[:, line] = True, True
    ratio = error[beside].mean() / error[~beside].mean() if error.any() and len(borders) else 1.0
    return f"max {error.max():.4f}, mean {error.mean():.6f}, beside borders {ratio:.2f}"


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("image", type=Path)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--adapters", type=Path, help="adapters, for a model other than the demo")
    parser.add_argument("--size", type=int, default=2048)
    parser.add_argument("--tile", type=int, default=512)
    parser.add_argument("--mode", choices=["exact", "fast"], default="exact")
    args = parser.parse_args()
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, {args.model}")
    print(f"{args.size} in tiles of {args.tile}, {args.mode}")

    compilations: list[float] = []
    options = {"color_fix": "none", "notice": print, "on_compile": lambda what, seconds: compilations.append(seconds)}
    whole = Upscaler.load(args.model, args.adapters, vae_tile=0, **options)
    tiled = Upscaler.load(args.model, args.adapters, vae_tile=args.tile, vae_tile_mode=args.mode, **options)
    batch = read(args.image, args.size)

    def timed(what, function, *arrays):
        compilations.clear()
        start = time.perf_counter()
        result = np.asarray(function(*arrays))
        seconds = time.perf_counter() - start - sum(compilations)
        print(f"{what}: {seconds:.1f} s, and {sum(compilations):.1f} s of compilation", flush=True)
        return result

    latents = timed("encoder, whole", whole.pipeline.encode, batch, None)
    expected = timed("decoder, whole", decoded, whole, latents, batch)
    found = timed("decoder, tiles", decoded, tiled, latents, batch)
    print(f"decoder: {compare(found, expected, args.tile)}", flush=True)
    latents = timed("encoder, tiles", tiled.pipeline.encode, batch, None)
    print(f"encoder: {compare(decoded(whole, latents, batch), expected, args.tile)}")


if __name__ == "__main__":
    main()
