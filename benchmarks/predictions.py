"""The two predictions: one UNet call on a batch of two with the low-rank path in its second half, or two calls.

    python benchmarks/make_checkpoint.py sd21 && python benchmarks/predictions.py --model sd21 --size 128

"a batch of two" is what `Upscaler` does. "two calls, merged" keeps a second UNet, with both adapters merged; "two
calls, low-rank" keeps one. Also: two decodes one after the other against one of a batch of two. Runs alternate.
"""

import argparse
import functools
import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from pisa_jax import Upscaler, convert, lora, model
from pisa_jax import backbone as bb
from pisa_jax.inference import predict
from pisa_jax.ops import compiler_options


def alternate(programs: dict, repeats: int) -> dict[str, float]:
    """Median seconds of each program, run in turn; the first round warms up and its results are compared."""
    seconds, first = {name: [] for name in programs}, {}
    for index in range(repeats + 1):
        for name, program in programs.items():
            start = time.perf_counter()
            result = np.asarray(jax.block_until_ready(program()))
            seconds[name].append(time.perf_counter() - start)
            if index == 0:
                first[name] = result
    reference = next(iter(first.values()))
    for name, result in first.items():
        print(f"  {name}: largest difference from the first {np.abs(result - reference).max():.1e}")
    return {name: statistics.median(values[1:]) for name, values in seconds.items()}


def report(title: str, programs: dict, repeats: int) -> None:
    """Medians, and their ratios to the first program's."""
    print(title)
    medians = alternate(programs, repeats)
    reference = next(iter(medians.values()))
    for name, value in medians.items():
        print(f"  {name}: {value:.2f} s ({value / reference:.2f})", flush=True)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a folder of make_checkpoint.py, or any other with --adapters")
    parser.add_argument("--adapters", type=Path)
    parser.add_argument("--size", type=int, default=128, help="side of the square input, enlarged 4 times")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--vae-dtype", default="float32")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, {args.dtype}, VAE {args.vae_dtype}")
    adapters = args.adapters or Path(args.model) / "adapters.safetensors"
    upscaler = Upscaler.load(args.model, adapters, dtype=args.dtype, vae_dtype=args.vae_dtype)
    modules, weights, spec = upscaler.backbone, upscaler.weights, upscaler.sem_spec
    side = 4 * args.size // modules.factor
    latents = jax.random.normal(jax.random.key(0), (1, side, side, modules.latent_channels))
    compiled = functools.partial(jax.jit, compiler_options=compiler_options())

    pair = compiled(functools.partial(predict, modules, spec, (0.0, 1.0)))
    alone = compiled(lambda unet: bb.eps(modules, unet, latents, model.TIMESTEP, weights.prompt))
    low_rank = compiled(functools.partial(predict, modules, spec, (1.0,)))
    trained = convert.load_adapters(adapters)
    full = lora.merge(weights.unet_pix, {"sem": trained.trees["sem"]}, trained.specs, {"sem": 1.0})

    def two(second):
        return jnp.concatenate([alone(weights.unet_pix), second()], axis=-1)

    programs = {
        "a batch of two": lambda: pair(weights, latents),
        "two calls, merged": lambda: two(lambda: alone(full)),
        "two calls, low-rank": lambda: two(lambda: low_rank(weights, latents)),
    }
    report("UNet", programs, args.repeats)

    decode = compiled(functools.partial(bb.decode, modules))
    twice = jnp.concatenate([latents, -latents])
    programs = {
        "two decodes": lambda: jnp.concatenate([decode(weights.vae, latents), decode(weights.vae, -latents)]),
        "a batch of two": lambda: decode(weights.vae, twice),
    }
    report("decoder", programs, args.repeats)


if __name__ == "__main__":
    main()
