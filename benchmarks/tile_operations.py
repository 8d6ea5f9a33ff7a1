"""Operations of VAE tiling relative to the whole image, counted by XLA without running anything.

    python benchmarks/tile_operations.py --sizes 2048 4096 --tile 1024

One pass over the tiles is counted. XLA counts loops once, so the scores of attention are left out everywhere.
"""

import argparse
import collections
import functools
from pathlib import Path

import jax
import numpy as np

from pisa_jax import Upscaler
from pisa_jax.tiling import vae_tiles


def operations(function, *arrays) -> float:
    """Return the operations of a function of arrays."""
    return jax.jit(function).lower(*arrays).cost_analysis()["flops"]


def count(upscaler: Upscaler, part: str, size: int, tile: int, fast: bool) -> dict[str, float]:
    """Return the operations of the encoder or decoder on tiles by kind, relative to the whole image."""
    base, weights = upscaler.pipeline.base, upscaler.pipeline.runner.weights
    found, known = collections.Counter(), {}

    def run(stage, static, *arrays):
        # Stages are counted instead of run: the results are zeros, which equal those of a further pass.
        function = functools.partial(stage, *static, weights)
        key = stage, static, tuple(leaf.shape for leaf in jax.tree.leaves(arrays))
        if key not in known:
            known[key] = operations(function, *arrays), jax.eval_shape(function, *arrays)
        is_check = stage.__name__ == "process_tiles" and static[-1] != first_size.setdefault(static[1], static[-1])
        found["check" if is_check else stage.__name__] += known[key][0]
        return jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), known[key][1])

    first_size: dict = {}
    latents = size // base.vae_scale_factor
    if part == "encoder":
        source, whole = np.zeros((size, size, 3), np.float32), base.encode
    else:
        source, whole = np.zeros((latents, latents, base.latent_channels), np.float32), base.decode
    untiled = operations(functools.partial(whole, weights.vae), source[None])
    for functions in getattr(base.tiled_vae, part)(weights.vae, upscaler.pipeline.mesh, run):
        source, _ = vae_tiles.process_in_tiles(functions, source, tile // base.vae_scale_factor, fast)
    return {name: flops / untiled for name, flops in found.items()}


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--adapters", type=Path, help="adapters, for a model other than the demo")
    parser.add_argument("--sizes", type=int, nargs="+", default=[2048, 4096])
    parser.add_argument("--tile", type=int, default=1024)
    args = parser.parse_args()
    print(f"jax {jax.__version__}, {args.model}, tiles of {args.tile}")
    upscaler = Upscaler.load(args.model, args.adapters)
    for size in args.sizes:
        for part in ("decoder", "encoder"):
            for fast in (False, True):
                found = count(upscaler, part, size, args.tile, fast)
                parts = ", ".join(f"{name} {share:.2f}" for name, share in found.items())
                print(f"{size} {part} {'fast' if fast else 'exact'}: {sum(found.values()):.2f} ({parts})", flush=True)


if __name__ == "__main__":
    main()
