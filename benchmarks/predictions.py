"""Time of the two noise predictions: one UNet call with a batch of two, or two calls.

    python benchmarks/make_checkpoint.py sd21 && python benchmarks/predictions.py --model sd21 --size 128

"a batch of two" is the implementation of `Upscaler`: the low-rank path of sem applies to the second half of the batch.
"two calls, merged" needs a second UNet with both adapters merged; "two calls, low-rank" needs one. The benchmark also
compares two decodes with one decode of a batch of two. Runs alternate.
"""

import functools
import statistics
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from timing import alternate, model_parser, seconds

from pisa_jax import Upscaler, model
from pisa_jax.adapters import files, injection
from pisa_jax.runtime.compilation import compiler_options
from pisa_jax.stages import predict


def compare(title: str, programs: dict, repeats: int) -> None:
    """Print the median time of each program, and its ratio and largest difference to the first program."""
    print(title)
    results = {name: np.asarray(program()) for name, program in programs.items()}
    found = alternate({name: functools.partial(seconds, program) for name, program in programs.items()}, repeats)
    medians = {name: statistics.median(values) for name, values in found.items()}
    first = next(iter(programs))
    for name, value in medians.items():
        difference = np.abs(results[name] - results[first]).max()
        print(
            f"  {name}: {value:.2f} s ({value / medians[first]:.2f}), largest difference {difference:.1e}", flush=True
        )


def main() -> None:
    """Run the command line."""
    args = model_parser(__doc__).parse_args()
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, {args.dtype}, VAE {args.vae_dtype}")
    adapters = args.adapters or Path(args.model) / "adapters.safetensors"
    upscaler = Upscaler.load(args.model, adapters, dtype=args.dtype, vae_dtype=args.vae_dtype)
    pipeline = upscaler.pipeline
    base, weights, specs = pipeline.base, pipeline.runner.weights, tuple(pipeline.specs.values())[1:]
    side = 4 * args.size // base.vae_scale_factor
    latents = jax.random.normal(jax.random.key(0), (1, side, side, base.latent_channels))
    compiled = functools.partial(jax.jit, compiler_options=compiler_options())

    pair = compiled(functools.partial(predict, base, specs, ((0.0,), (1.0,))))
    alone = compiled(lambda unet: base.predict_noise(unet, latents, model.TIMESTEP, weights.prompt))
    low_rank = compiled(functools.partial(predict, base, specs, ((1.0,),)))
    trained = files.load_adapters(adapters)
    full = injection.merge(weights.unet, {"sem": trained.trees["sem"]}, trained.specs, {"sem": 1.0})

    def two(second):
        return jnp.concatenate([alone(weights.unet), second()], axis=-1)

    programs = {
        "a batch of two": lambda: pair(weights, latents),
        "two calls, merged": lambda: two(lambda: alone(full)),
        "two calls, low-rank": lambda: two(lambda: low_rank(weights, latents)),
    }
    compare("UNet", programs, args.repeats)

    decode = compiled(base.decode)
    twice = jnp.concatenate([latents, -latents])
    programs = {
        "two decodes": lambda: jnp.concatenate([decode(weights.vae, latents), decode(weights.vae, -latents)]),
        "a batch of two": lambda: decode(weights.vae, twice),
    }
    compare("decoder", programs, args.repeats)


if __name__ == "__main__":
    main()
