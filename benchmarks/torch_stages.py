"""The stages of inference in PyTorch: a process that computes one whenever benchmarks/against_torch.py asks.

Runs in an environment of its own (benchmarks/requirements-torch.txt). Every line on its input names a stage; every line
of its output is the seconds that took.
"""

import sys
import time

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel

TIMESTEP = 1


def main() -> None:
    """Arguments: model folder, side of the picture in pixels, "channels_last" or "contiguous_format"."""
    folder, side, layout = sys.argv[1], int(sys.argv[2]), getattr(torch, sys.argv[3])
    unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet").eval().to(memory_format=layout)
    vae = AutoencoderKL.from_pretrained(folder, subfolder="vae").eval().to(memory_format=layout)
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    picture = torch.rand(1, 3, side, side).to(memory_format=layout) * 2 - 1
    latents = torch.randn(1, vae.config.latent_channels, side // factor, side // factor).to(memory_format=layout)
    prompt = torch.randn(1, 77, unet.config.cross_attention_dim)
    stages = {
        "encode": lambda: vae.encode(picture).latent_dist.mean,
        "unet": lambda: unet(latents, TIMESTEP, prompt).sample,
        "decode": lambda: vae.decode(latents).sample,
    }
    print(f"PyTorch {torch.__version__}, {torch.get_num_threads()} threads, {sys.argv[3]}", flush=True)
    with torch.inference_mode():
        for line in sys.stdin:
            start = time.perf_counter()
            stages[line.strip()]()
            print(time.perf_counter() - start, flush=True)


if __name__ == "__main__":
    main()
