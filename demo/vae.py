"""Train the demo model's VAE on crops of the images of pairs.py and teacher.py.

    python demo/vae.py --pairs runs/demo_pairs --out runs/demo_vae --minutes 90

The output folder contains `vae.safetensors` (averaged weights) and `config.json`. A run that was interrupted continues
when it is started again.
"""

import argparse
import functools
import json
import re
import time
from collections.abc import Callable
from pathlib import Path

import crops
import jax
import jax.numpy as jnp
import numpy as np
from fit import add_time_options, fit
from safetensors.numpy import load_file
from shapes import TEXT, UNET, VAE

from pisa_jax.data.sources import folder_source
from pisa_jax.imaging.ranges import signed_to_uint8, uint8_to_signed
from pisa_jax.metrics import lpips, psnr_ssim
from pisa_jax.runtime.tensor_files import write_safetensors
from pisa_jax.runtime.trees import flatten, unflatten
from pisa_jax.sd import backbone as bb
from pisa_jax.sd import pretrained, random_model

# Pixels along a crop, and crops per step.
SIDE, BATCH = 64, 8
LEARNING_RATE = 4e-3
# The perceptual distance (SqueezeNet features) of a good reconstruction is about 0.5, its squared error 0.003. The KL
# term holds the latents' scale and gives them a noise of about a twentieth of it, at little cost in accuracy.
PERCEPTUAL, KL = 1e-3, 3e-5


def loss(params, images, key, backbone, perceptual):
    """Sum the squared error, the perceptual distance and KL(posterior | N(0, 1)) (Rombach et al. 2022, appendix G)."""
    params = without_attention(params)
    mean, std = bb.posterior(backbone, params, images)
    latents = mean + std * jax.random.normal(key, mean.shape)
    restored = bb.decode(backbone, params, latents * backbone.latent_scale)
    square = jnp.mean((restored - images) ** 2)
    distance = lpips.distance(perceptual, restored, images).mean()
    kl = 0.5 * jnp.mean(mean**2 + std**2 - 2 * jnp.log(std) - 1)
    parts = {"psnr": -10 * jnp.log10(square / 4), "perceptual": distance, "kl": kl, "std": jnp.mean(std)}
    return square + PERCEPTUAL * distance + KL * kl, parts


def without_attention(params):
    """Stop the gradient of the attention's output projection, which starts as 0 and stays so.

    Attention that was trained on crops of 64 latents does not carry over to whole images; convolutions do.
    """
    leaves = {path: jax.lax.stop_gradient(x) if "proj_attn" in path else x for path, x in flatten(params).items()}
    return unflatten(leaves)


def initial_params(backbone: bb.Backbone) -> dict:
    """Draw weights with residual branches and attention that add 0 at first, and little posterior noise."""
    random = flatten(random_model.random_params(bb.param_shapes(backbone)["vae"], np.random.default_rng(0)))
    random["quant_conv/bias"][backbone.latent_channels :] = -5  # log variance
    silent = re.compile("/conv2/|/proj_attn/")
    return unflatten({path: jnp.asarray(0 * x if silent.search(path) else x) for path, x in random.items()})


def scaling_factor(backbone: bb.Backbone, params: dict, images: list) -> float:
    """Compute 1 / (standard deviation of the latents of 64 clean images).

    The inputs of the UNet then have the variance of the noise.
    """
    clean = uint8_to_signed(np.stack(images[:64]))
    mean, _ = jax.jit(functools.partial(bb.posterior, backbone))(params, clean)
    return round(float(1 / jnp.std(mean)), 5)


def save(out: Path, params: dict, config: dict) -> None:
    """Write the weights with PyTorch names and the config."""
    tensors = {name: np.asarray(tensor, np.float32) for name, tensor in pretrained.params_to_torch(params).items()}
    write_safetensors(out / "vae.safetensors", tensors, {"format": "pt"})
    (out / "config.json").write_text(json.dumps(config, indent=1))


def load(folder: Path) -> tuple[bb.Backbone, dict]:
    """Load the modules and the weights of a VAE that `save` wrote."""
    backbone = bb.build_modules(UNET, json.loads((folder / "config.json").read_text()), TEXT)
    shapes = bb.param_shapes(backbone)["vae"]
    tensors = load_file(folder / "vae.safetensors")
    return backbone, jax.tree.map(jnp.asarray, pretrained.params_from_torch(tensors, shapes, str(folder)))


def check(folder: Path, images: Path) -> dict[str, float]:
    """Measure reconstructions: the mean PSNR (luma) and perceptual distance over all images of a folder."""
    backbone, params = load(folder)
    perceptual = jax.device_put(lpips.load_weights(None, "squeeze"))

    @jax.jit
    def reconstruct(image):
        restored = jnp.clip(bb.decode(backbone, params, bb.encode(backbone, params, image)), -1, 1)
        return restored, lpips.distance(perceptual, restored, image)[0]

    found = []
    factor = backbone.vae_scale_factor
    for record in folder_source(images):
        height, width = (side // factor * factor for side in record.image.shape[:2])
        image = record.image[:height, :width]
        restored, distance = reconstruct(uint8_to_signed(image)[None])
        found.append((psnr_ssim.psnr(signed_to_uint8(np.asarray(restored[0])), image), float(distance)))
    psnr, distance = np.mean(found, axis=0)
    return {"psnr": float(psnr), "perceptual": float(distance)}


def train(
    pairs: Path,
    out: Path,
    minutes: float,
    clock: Callable[[], float] = time.perf_counter,
    config: dict = VAE,
    side: int = SIDE,
    batch: int = BATCH,
) -> None:
    """Train for `minutes` of `clock` and write the weights."""
    backbone = bb.build_modules(UNET, config, TEXT)
    images = crops.read_pairs(pairs)
    perceptual = jax.device_put(lpips.load_weights(None, "squeeze"))
    objective = functools.partial(loss, backbone=backbone, perceptual=perceptual)
    batch_of = functools.partial(crops.mixed_crops, images, side, batch)
    params = fit(out, minutes, initial_params(backbone), objective, batch_of, LEARNING_RATE, clock)
    factor = scaling_factor(backbone, params, images["gt"])
    save(out, params, config | {"scaling_factor": factor})
    print(f"scaling factor {factor}; weights in {out}")


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=Path, required=True, help="--out of pairs.py")
    parser.add_argument("--out", type=Path, required=True)
    add_time_options(parser)
    parser.add_argument("--check", type=Path, nargs="*", default=[], help="folders of images to reconstruct at the end")
    args = parser.parse_args()
    train(args.pairs, args.out, args.minutes, args.clock)
    for folder in args.check:
        print(folder, check(args.out, folder))


if __name__ == "__main__":
    main()
