"""Time of the encoder, one UNet pass and the decoder in this package and in PyTorch on the same machine.

    python -m venv .venv-torch && .venv-torch/bin/pip install -r benchmarks/requirements-torch.txt
    python benchmarks/make_checkpoint.py sd21
    python benchmarks/against_torch.py --model sd21 --torch .venv-torch/bin/python

Both use the same weights and all cores, and their runs alternate. PyTorch runs eagerly, with both memory layouts.
"""

import argparse
import functools
import itertools
import statistics
import subprocess
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from timing import alternate, environment, seconds

from pisa_jax import model
from pisa_jax.runtime.compilation import compiler_options
from pisa_jax.runtime.distributed import on_device
from pisa_jax.sd import pretrained

LAYOUTS = ("contiguous_format", "channels_last")


class Torch:
    """A process of benchmarks/torch_stages.py in another interpreter."""

    def __init__(self, python: str, folder: str, layout: str):
        command = [python, Path(__file__).with_name("torch_stages.py"), folder, layout]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment()
        )
        print(self._process.stdout.readline().strip(), flush=True)

    def seconds(self, stage: str, side: int) -> float:
        """Time a stage for an image of side x side pixels, in seconds."""
        print(stage, side, file=self._process.stdin, flush=True)
        return float(self._process.stdout.readline())

    def close(self) -> None:
        """End the process."""
        self._process.communicate()


def compiled_stages(folder: str) -> dict[str, Callable[[int], Callable[[], jax.Array]]]:
    """{stage: function of the side of the image that returns the jitted stage without arguments}."""
    loaded = pretrained.load_pretrained(folder)
    base = loaded.base
    unet, vae = (on_device(loaded.params[part], np.float32) for part in ("unet", "vae"))
    compiled = functools.partial(jax.jit, compiler_options=compiler_options())
    encode = compiled(base.encode)
    eps = compiled(lambda unet, latents, prompt: base.predict_noise(unet, latents, model.TIMESTEP, prompt))
    decode = compiled(base.decode)

    def normal(*shape):
        return jax.random.normal(jax.random.key(0), shape)

    def latents(side):
        return normal(1, side // base.vae_scale_factor, side // base.vae_scale_factor, base.latent_channels)

    prompt = normal(1, 77, pretrained.load_backbone(Path(folder)).unet.cross_attention_dim)
    return {
        "encode": lambda side: functools.partial(encode, vae, jnp.tanh(normal(1, side, side, 3)), None),
        "unet": lambda side: functools.partial(eps, unet, latents(side), prompt),
        "decode": lambda side: functools.partial(decode, vae, latents(side)),
    }


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a diffusers folder")
    parser.add_argument("--torch", required=True, help="interpreter of an environment with PyTorch and diffusers")
    parser.add_argument(
        "--sides", type=int, nargs="+", default=[256, 512], help="sides of the upscaled image in pixels"
    )
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, float32")
    ours = compiled_stages(args.model)
    torch_processes = {layout: Torch(args.torch, args.model, layout) for layout in LAYOUTS}
    for side, (stage, program) in itertools.product(args.sides, ours.items()):
        timed = {"pisa_jax": functools.partial(seconds, program(side))}
        timed |= {
            layout: functools.partial(process.seconds, stage, side) for layout, process in torch_processes.items()
        }
        medians = {name: statistics.median(values) for name, values in alternate(timed, args.repeats).items()}
        best = min(medians[layout] for layout in LAYOUTS)
        figures = ", ".join(f"{name} {value:.2f} s" for name, value in medians.items())
        print(f"{side}, {stage}: {figures}; {medians['pisa_jax'] / best:.2f} of the faster PyTorch layout", flush=True)
    for process in torch_processes.values():
        process.close()


if __name__ == "__main__":
    main()
