"""Train the demo model's VAE on clean and degraded photographs.

    python demo/vae.py --data runs/demo_pictures --out runs/demo_vae

First the whole, then the decoder alone, which has more to learn, then the whole again. Leaves `vae.safetensors`
(averaged weights) and `scaling_factor.json` in --out; killed, it goes on when started again.
"""

import argparse
import functools
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from fit import Phase, fit
from shapes import TEXT, UNET, VAE

from pisa_jax.data.degradation import degrade
from pisa_jax.data.loader import make_loader
from pisa_jax.data.sources import folder_source
from pisa_jax.metrics import lpips
from pisa_jax.runtime.tensor_files import write_safetensors
from pisa_jax.runtime.trees import flatten, unflatten
from pisa_jax.sd import backbone as bb
from pisa_jax.sd import random_model
from pisa_jax.sd.pretrained import params_to_torch

PHASES = (Phase(1000, 64, 8), Phase(250, 128, 2), Phase(50, 256, 1))
DECODER_PHASES = (Phase(400, 64, 8), Phase(100, 128, 2))
LAST_PHASES = (Phase(1200, 64, 8), Phase(300, 128, 2))
LEARNING_RATE = 8e-4
ENCODER = ("encoder", "quant_conv")
# The perceptual distance (SqueezeNet features) of a good reconstruction is some 0.5, its squared error 0.003. The KL
# term holds the latents' scale and gives them a noise of about a twentieth of it, at little cost in accuracy.
PERCEPTUAL, KL = 1e-3, 3e-5


def loss(params, images, key, fixed, backbone, perceptual):
    """Squared error + perceptual distance + KL(posterior | N(0, 1)) of reconstructions (Rombach et al. 2022, G)."""
    params = _without_attention({**fixed, **params})
    mean, std = bb.posterior(backbone, params, images)
    latents = mean + std * jax.random.normal(key, mean.shape)
    restored = bb.decode(backbone, params, latents * backbone.latent_scale)
    square = jnp.mean((restored - images) ** 2)
    distance = lpips.distance(perceptual, restored, images).mean()
    kl = 0.5 * jnp.mean(mean**2 + std**2 - 2 * jnp.log(std) - 1)
    parts = {"psnr": -10 * jnp.log10(square / 4), "perceptual": distance, "kl": kl, "std": jnp.mean(std)}
    return square + PERCEPTUAL * distance + KL * kl, parts


def _without_attention(params):
    """No gradient for the attention's output, which starts as 0 and stays so.

    Attention that has seen crops of 256 latents at most does not carry over to whole pictures; convolutions do.
    """
    leaves = {path: jax.lax.stop_gradient(x) if "proj_attn" in path else x for path, x in flatten(params).items()}
    return unflatten(leaves)


def initial_params(backbone: bb.Backbone) -> dict:
    """Random weights, with what makes the start easy: residual branches and the attention that add 0, little noise."""
    random = flatten(random_model.random_params(bb.param_shapes(backbone)["vae"], np.random.default_rng(0)))
    random["quant_conv/bias"][backbone.latent_channels :] = -5  # log variance
    silent = re.compile("/conv2/|/proj_attn/")
    return unflatten({path: jnp.asarray(0 * x if silent.search(path) else x) for path, x in random.items()})


def scaling_factor(backbone: bb.Backbone, params: dict, source) -> float:
    """1 / (standard deviation of the latents of 64 clean crops): the UNet's inputs have the variance of its noise."""
    loader = make_loader(source, batch_size=64, crop=128, seed=7, degrade=degrade)
    mean, _ = jax.jit(functools.partial(bb.posterior, backbone))(params, next(loader)["gt"])
    loader.close()
    return round(float(1 / jnp.std(mean)), 5)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="--out of pictures.py")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    backbone, source = bb.build_modules(UNET, VAE, TEXT), folder_source(args.data)
    perceptual = jax.device_put(lpips.load_weights(None, "squeeze"))

    def both(batch, step):
        return jnp.concatenate([batch["gt"], batch["lq"]])

    objective = functools.partial(loss, backbone=backbone, perceptual=perceptual)
    whole = functools.partial(objective, fixed={})
    params = fit(args.out / "whole", PHASES, source, None, initial_params(backbone), whole, both, LEARNING_RATE)
    encoder = {part: params.pop(part) for part in ENCODER}
    decode = functools.partial(objective, fixed=encoder)
    decoder = fit(args.out / "decoder", DECODER_PHASES, source, None, params, decode, both, LEARNING_RATE / 2)
    params = fit(args.out / "last", LAST_PHASES, source, None, {**encoder, **decoder}, whole, both, LEARNING_RATE)
    tensors = {name: np.asarray(tensor, np.float32) for name, tensor in params_to_torch(params).items()}
    write_safetensors(args.out / "vae.safetensors", tensors, {"format": "pt"})
    factor = scaling_factor(backbone, params, source)
    (args.out / "scaling_factor.json").write_text(json.dumps(factor))
    print(f"scaling factor {factor}; weights in {args.out}")


if __name__ == "__main__":
    main()
