"""Memory by size of image and tile: XLA's plan of every stage, and peak memory of runs.

    python benchmarks/make_checkpoint.py tiny --size tiny
    python benchmarks/memory.py runs --model tiny --sizes 512 1024 2048
    python benchmarks/memory.py plan
    python benchmarks/memory.py plot

`plan` compiles the decoder and the encoder of Stable Diffusion 2.1's VAE, whole and in tiles, without running them.
`runs` processes one image of each size with encoder, decoder and color fix, each in a separate process. Both append to
--records, from which `plot` draws docs/memory.png.
"""

import argparse
import functools
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from pisa_jax import Upscaler
from pisa_jax.inference import Weights
from pisa_jax.model import Predictions
from pisa_jax.runtime import distributed
from pisa_jax.runtime.compilation import compiler_options
from pisa_jax.sd import backbone, random_model, vae_tiling
from pisa_jax.tiling import memory, placements, samples, vae_tiles

GIB = 2**30


def plan(pixels: int) -> list[dict]:
    """Bytes of temporaries of one call of each stage; attention is computed in chunks, as on CPUs."""
    modules = backbone.build_modules(*random_model.model_configs("sd21"))
    params = backbone.param_shapes(modules)["vae"]
    weights, mesh = Weights(None, None, params, None), distributed.local_mesh(1)
    tile, side = (length // modules.vae_scale_factor for length in (pixels, 2**13))  # tiles of an 8192-pixel image

    def temporaries(function, *arrays):
        jitted = jax.jit(function, compiler_options=compiler_options())
        return jitted.lower(*arrays).compile().memory_analysis().temp_size_in_bytes

    latents = array(1, tile, tile, modules.latent_channels)
    found = {"whole decoder": temporaries(functools.partial(backbone.decode, modules), params, latents)}
    head = array(vae_tiles.MAX_KEYS, 1, 1)  # the levels have no attention
    keys = vae_tiles.AttentionKeys(head, head, integers())

    def run(stage, static, *arrays):
        return temporaries(functools.partial(stage, *static), weights, *arrays)

    decoder, encoder = (
        make(modules, params, mesh, run) for make in (vae_tiling.tiled_decoder, vae_tiling.tiled_encoder)
    )
    features = modules.vae.block_out_channels[-2:]
    found["trunk of the decoder"] = decoder[0].process_whole(array(1, tile, tile, modules.latent_channels))
    found["trunk of the encoder"] = encoder[1].process_whole(array(1, tile, tile, features[0]))
    for name, functions, channels in (("decoder", decoder[1], features[1]), ("encoder", encoder[0], 3)):

        def windows(count, length, margin, functions=functions, channels=channels):
            window = placements.window_length(length, side, margin) * functions.input_scale
            placement = placements.TilePlacement(*[integers(count, 2)] * 4)
            return array(count, window, window, channels), placement

        statistics = array(*functions.statistics_shape)
        tiles = windows(1, tile, functions.margin)
        found[f"tile of the {name}"] = functions.process_tiles((tile, tile), *tiles, statistics, keys)
        patch, margin, count = samples.sample_shape((side, side), (tile, tile))
        patches = windows(count, patch[0], margin)
        found[f"sample of the {name}"] = functions.measure_sample(patch, *patches, array(count), statistics, None)
    return [{"kind": "plan", "what": what, "pixels": pixels, "bytes": size} for what, size in found.items()]


def array(*shape: int) -> jax.ShapeDtypeStruct:
    """Shape of a float32 array."""
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def integers(*shape: int) -> jax.ShapeDtypeStruct:
    """Shape of an int32 array."""
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def one_run(model: str, pixels: int, tile: int) -> dict:
    """Peak resident memory for one image (encoder, decoder, color fix), minus that of the loaded model."""
    # One pass over the tiles and few keys: both reduce the time and do not affect the memory.
    vae_tiles.MAX_PASSES, vae_tiles.MAX_KEYS = 1, 2**12
    upscaler = Upscaler.load(model, Path(model) / "adapters.safetensors", vae_tile=tile)
    before, start = _peak(), time.perf_counter()
    rng = np.random.default_rng(0)
    batch = np.repeat(np.repeat(rng.uniform(-1, 1, (1, pixels // 8, pixels // 8, 3)).astype(np.float32), 8, 1), 8, 2)
    latents = np.asarray(upscaler.pipeline.encode(batch, None))
    nothing = np.zeros_like(latents)
    upscaler.pipeline.render(Predictions(latents, (nothing, nothing)), (1.0, 1.0), batch, (pixels, pixels))
    seconds = round(time.perf_counter() - start, 1)
    what = f"tiles of {tile}" if tile else "whole"
    return {"kind": "run", "what": what, "pixels": pixels, "bytes": _peak() - before, "seconds": seconds}


def in_process(model: str, pixels: int, tile: int) -> dict:
    """Call `one_run` in a separate process: the peak is that of the whole lifetime of a process."""
    command = [sys.executable, __file__, "one", "--model", model, "--sizes", str(pixels), "--tile", str(tile)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def _peak() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def plot(records: list[dict], path: Path) -> None:
    """Plot memory against size: plans of Stable Diffusion 2.1, and runs of the small model."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), constrained_layout=True)
    titles = {"plan": "SD 2.1's VAE, one call (XLA's plan)", "run": "small model, whole process (resident)"}
    for axis, kind in zip(axes, titles, strict=True):
        for what in dict.fromkeys(record["what"] for record in records if record["kind"] == kind):
            points = sorted((r["pixels"], r["bytes"] / GIB) for r in records if (r["kind"], r["what"]) == (kind, what))
            axis.loglog(*zip(*points, strict=True), "o-", base=2, label=what)
        if kind == "run":
            sides = sorted({r["pixels"] for r in records if r["kind"] == kind})
            axis.loglog(sides, [24 * s**2 / GIB for s in sides], "k:", base=2, label="input and output")
        of = "the tile" if kind == "plan" else "the image"
        axis.set(title=titles[kind], xlabel=f"pixels a side of {of}", ylabel="GiB")
        axis.legend()
    figure.savefig(path, dpi=110)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["plan", "runs", "plot", "one"])
    parser.add_argument("--model", help="a folder of make_checkpoint.py")
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 512, 1024])
    parser.add_argument("--tile", type=int, default=512, help="side of the tiles in pixels; 0: no tiles")
    parser.add_argument("--records", type=Path, default=Path("memory.jsonl"))
    parser.add_argument("--plot", type=Path, default=Path("docs/memory.png"))
    args = parser.parse_args()
    if args.what == "one":
        print(json.dumps(one_run(args.model, args.sizes[0], args.tile)))
        return
    if args.what == "plot":
        plot([json.loads(line) for line in args.records.read_text().splitlines()], args.plot)
        return
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, {memory.free_bytes(jax.devices()[0]) / GIB:.1f} GiB")
    for pixels in args.sizes:
        found = plan(pixels) if args.what == "plan" else [in_process(args.model, pixels, args.tile)]
        with args.records.open("a") as file:
            for record in found:
                print(f"{record['what']}, {pixels} pixels: {record['bytes'] / GIB:.2f} GiB", flush=True)
                file.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
