"""Seconds per stage of inference, compile time and peak memory.

    python benchmarks/make_checkpoint.py sd21 && python benchmarks/infer.py --model sd21 --size 128
    python benchmarks/infer.py --model sd21 --size 128 --dtype bfloat16 --vae-dtype bfloat16

Run it twice with the same --compile-cache to see the start from the cache. Ratios are against the single UNet pass of
the default setting, in the same run.
"""

import argparse
import resource
import statistics
import time
from pathlib import Path

import jax
import numpy as np

from pisa_jax import Upscaler


def median_seconds(function, repeats: int) -> float:
    """Median over runs, after one to warm up, each waited for."""
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        jax.block_until_ready(function())
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a folder of make_checkpoint.py, or any other with --adapters")
    parser.add_argument("--adapters", type=Path)
    parser.add_argument("--size", type=int, default=128, help="side of the square input, enlarged 4 times")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--vae-dtype", default="float32")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--compile-cache")
    args = parser.parse_args()
    if args.compile_cache:
        jax.config.update("jax_compilation_cache_dir", args.compile_cache)
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, {args.dtype}, VAE {args.vae_dtype}")

    compiled = {}
    start = time.perf_counter()
    adapters = args.adapters or Path(args.model) / "adapters.safetensors"
    options = {"dtype": args.dtype, "vae_dtype": args.vae_dtype, "on_compile": compiled.__setitem__}
    upscaler = Upscaler.load(args.model, adapters, **options)
    print(f"load {time.perf_counter() - start:.1f} s")

    side = 4 * args.size
    batch = np.random.default_rng(0).uniform(-1, 1, (1, side, side, 3)).astype(np.float32)
    both, one = (upscaler.residuals(batch, both=both) for both in (True, False))
    upscaler.render(both, (1.0, 0.7), batch, (side, side))
    for what, seconds in compiled.items():
        print(f"compile {what}: {seconds:.1f} s")

    timed = {
        "encode + UNet, default": lambda: upscaler.residuals(batch, both=False).eps_full,
        "encode + UNet, adjustable": lambda: upscaler.residuals(batch, both=True).eps_full,
        "decode and colours": lambda: upscaler.render(one, (1.0, 1.0), batch, (side, side)),
    }
    seconds = {name: median_seconds(function, args.repeats) for name, function in timed.items()}
    for name, value in seconds.items():
        print(f"{name}: {value:.2f} s")
    default = seconds["encode + UNet, default"] + seconds["decode and colours"]
    adjustable = seconds["encode + UNet, adjustable"] + seconds["decode and colours"]
    print(f"picture: default {default:.2f} s, adjustable {adjustable:.2f} s ({adjustable / default:.2f} of default)")
    print(f"a further pair of scales: {seconds['decode and colours'] / default:.2f} of default")
    print(f"peak memory: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB")


if __name__ == "__main__":
    main()
