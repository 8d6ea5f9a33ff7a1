"""Seconds of encoder, UNet (one pass) and decoder here and in PyTorch on the same machine, in turn.

    python -m venv torch && torch/bin/pip install -r benchmarks/requirements-torch.txt
    python benchmarks/make_checkpoint.py sd21
    python benchmarks/against_torch.py --model sd21 --torch torch/bin/python

Both read the same weights; both use all cores. PyTorch runs eagerly, in the better of its two memory layouts.
"""

import argparse
import functools
import statistics
import subprocess
import time

import jax
import numpy as np

from pisa_jax import backbone as bb
from pisa_jax import model, pretrained
from pisa_jax.inference import on_device
from pisa_jax.ops import compiler_options

STAGES = ("encode", "unet", "decode")
LAYOUTS = ("contiguous_format", "channels_last")


class Torch:
    """benchmarks/torch_stages.py in its own interpreter."""

    def __init__(self, python: str, folder: str, side: int, layout: str):
        command = [python, __file__.replace("against_torch", "torch_stages"), folder, str(side), layout]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        print(self._process.stdout.readline().strip(), flush=True)

    def seconds(self, stage: str) -> float:
        """Seconds of a stage."""
        print(stage, file=self._process.stdin, flush=True)
        return float(self._process.stdout.readline())

    def close(self) -> None:
        """End the process."""
        self._process.communicate()


def programs(folder: str, side: int) -> dict:
    """The same stages here, as functions without arguments."""
    loaded = pretrained.load(folder)
    modules = loaded.backbone
    unet, vae = (on_device(loaded.params[part], np.float32) for part in ("unet", "vae"))
    rng = np.random.default_rng(0)
    picture = jax.numpy.asarray(rng.uniform(-1, 1, (1, side, side, 3)), "float32")
    small = side // modules.factor
    latents = jax.numpy.asarray(rng.standard_normal((1, small, small, modules.latent_channels)), "float32")
    prompt = jax.numpy.asarray(rng.standard_normal((1, 77, modules.unet.cross_attention_dim)), "float32")
    compiled = functools.partial(jax.jit, compiler_options=compiler_options())
    encode = compiled(lambda vae, picture: bb.encode(modules, vae, picture))
    eps = compiled(lambda unet, latents, prompt: bb.eps(modules, unet, latents, model.TIMESTEP, prompt))
    decode = compiled(lambda vae, latents: bb.decode(modules, vae, latents))
    return {
        "encode": lambda: encode(vae, picture),
        "unet": lambda: eps(unet, latents, prompt),
        "decode": lambda: decode(vae, latents),
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a diffusers folder")
    parser.add_argument("--torch", required=True, help="the interpreter of an environment with PyTorch and diffusers")
    parser.add_argument("--sides", type=int, nargs="+", default=[256, 512], help="of the enlarged picture, in pixels")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, float32")
    for side in args.sides:
        here = programs(args.model, side)
        there = {layout: Torch(args.torch, args.model, side, layout) for layout in LAYOUTS}
        for stage in STAGES:
            seconds = {name: [] for name in ("pisa_jax", *LAYOUTS)}
            for _ in range(args.repeats + 1):
                start = time.perf_counter()
                jax.block_until_ready(here[stage]())
                seconds["pisa_jax"].append(time.perf_counter() - start)
                for layout, process in there.items():
                    seconds[layout].append(process.seconds(stage))
            medians = {name: statistics.median(values[1:]) for name, values in seconds.items()}
            best = min(medians[layout] for layout in LAYOUTS)
            figures = ", ".join(f"{name} {value:.2f} s" for name, value in medians.items())
            print(f"{side}, {stage}: {figures}; {medians['pisa_jax'] / best:.2f} of PyTorch's better", flush=True)
        for process in there.values():
            process.close()


if __name__ == "__main__":
    main()
