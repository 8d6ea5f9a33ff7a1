"""The stages of inference in PyTorch, as a process that benchmarks/against_torch.py controls.

It runs in its own environment (benchmarks/requirements-torch.txt). Every input line has a stage and the side of an
image in pixels; every output line has the seconds of that stage.
"""

import functools
import sys
import time

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel

TIMESTEP = 1


def main() -> None:
    """Run the process; arguments: model folder, "channels_last" or "contiguous_format"."""
    folder, layout = sys.argv[1], getattr(torch, sys.argv[2])
    unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet").eval().to(memory_format=layout)
    vae = AutoencoderKL.from_pretrained(folder, subfolder="vae").eval().to(memory_format=layout)
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    prompt = torch.randn(1, 77, unet.config.cross_attention_dim)

    @functools.cache
    def normal(channels, side):
        return torch.randn(1, channels, side, side).to(memory_format=layout)

    def latents(side):
        return normal(vae.config.latent_channels, side // factor)

    stages = {
        "encode": lambda side: vae.encode(normal(3, side)).latent_dist.mean,
        "unet": lambda side: unet(latents(side), TIMESTEP, prompt).sample,
        "decode": lambda side: vae.decode(latents(side)).sample,
    }
    print(f"PyTorch {torch.__version__}, {torch.get_num_threads()} threads, {sys.argv[2]}", flush=True)
    with torch.inference_mode():
        for line in sys.stdin:
            stage, side = line.split()
            start = time.perf_counter()
            stages[stage](int(side))
            print(time.perf_counter() - start, flush=True)


if __name__ == "__main__":
    main()
