"""Time per stage of inference, compile time and peak memory.

    python benchmarks/make_checkpoint.py sd21 && python benchmarks/infer.py --model sd21 --size 128
    python benchmarks/infer.py --model sd21 --size 128 --dtype bfloat16 --vae-dtype bfloat16

Run it twice with the same --compile-cache to measure the start from the cache. Ratios are relative to the default
setting with its single UNet pass, in the same run.
"""

import functools
import resource
import statistics
import time
from pathlib import Path

import jax
import numpy as np
from timing import alternate, model_parser, seconds

from pisa_jax import Upscaler


def main() -> None:
    """Run the command line."""
    parser = model_parser(__doc__)
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
    pipeline = upscaler.pipeline

    def predict(adjustable):
        return pipeline.predict(pipeline.encode(batch, None), adjustable)

    both, one = predict(True), predict(False)
    pipeline.render(both, (1.0, 0.7), batch, (side, side))
    for what, taken in compiled.items():
        print(f"compile {what}: {taken:.1f} s")

    timed = {
        "encode + UNet, default": lambda: predict(False).eps_full,
        "encode + UNet, adjustable": lambda: predict(True).eps_full,
        "decode and color fix": lambda: pipeline.render(one, (1.0, 1.0), batch, (side, side)),
    }
    found = alternate({name: functools.partial(seconds, function) for name, function in timed.items()}, args.repeats)
    medians = {name: statistics.median(values) for name, values in found.items()}
    for name, value in medians.items():
        print(f"{name}: {value:.2f} s")
    default = medians["encode + UNet, default"] + medians["decode and color fix"]
    adjustable = medians["encode + UNet, adjustable"] + medians["decode and color fix"]
    print(f"image: default {default:.2f} s, adjustable {adjustable:.2f} s ({adjustable / default:.2f} of default)")
    print(f"a further pair of scales: {medians['decode and color fix'] / default:.2f} of default")
    print(f"peak memory: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB")


if __name__ == "__main__":
    main()
