"""Train the demo model's diffusion prior: a latent UNet and a text encoder, on the VAE of vae.py.

    python demo/prior.py --data runs/demo_pictures --vae runs/demo_vae --out runs/demo_prior --model runs/demo_model

Clean crops come with the prompts of --data's prompts.jsonl, degraded ones with negative words, one in ten of both with
the empty prompt. Leaves a diffusers folder in --model; killed, it goes on when started again.
"""

import argparse
import functools
import json
import re
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import words
from fit import Phase, fit
from safetensors.numpy import load_file
from shapes import TEXT, UNET, VAE

from pisa_jax import losses
from pisa_jax.data.loader import read_prompts
from pisa_jax.data.sources import folder_source
from pisa_jax.runtime.trees import flatten, unflatten
from pisa_jax.sd import backbone as bb
from pisa_jax.sd import pretrained, random_model

PHASES = (Phase(1000, 64, 16), Phase(150, 128, 4))
# Once more, from a high learning rate.
LAST_PHASES = (Phase(1000, 64, 16), Phase(300, 128, 4))
LEARNING_RATE = 1e-3
EMPTY_PROMPT = 0.1


class Batch(NamedTuple):
    """Images in [-1, 1] and the token ids of their prompts."""

    images: jax.Array
    token_ids: jax.Array


def loss(params, batch, key, backbone, vae, alphas_cumprod):
    """|n - eps(z_t, t, c)|^2 for t ~ U{0..999} (Ho et al. 2020, eq. 14), over z = the posterior's mean."""
    latents = bb.encode(backbone, vae, batch.images)
    for_noise, for_time = jax.random.split(key)
    noise = jax.random.normal(for_noise, latents.shape)
    timesteps = jax.random.randint(for_time, latents.shape[:1], 0, len(alphas_cumprod))
    prompt = bb.encode_text(backbone, params["text"], batch.token_ids)
    noisy = losses.add_noise(latents, noise, timesteps, alphas_cumprod)
    square = (noise - bb.predict_noise(backbone, params["unet"], noisy, timesteps, prompt)) ** 2
    each = square.mean(axis=(1, 2, 3))
    late = timesteps >= len(alphas_cumprod) // 2
    mean_late = jnp.sum(each * late) / jnp.maximum(late.sum(), 1)
    return each.mean(), {"t >= 500": mean_late}


def label(batch: dict[str, np.ndarray], step: int, tokenize) -> Batch:
    """The clean half with its prompts, then the degraded half with negative words; some of both with none."""
    rng = np.random.default_rng(step)
    texts = [*batch["prompt"], *(words.negative_prompt(rng) for _ in batch["lq"])]
    texts = ["" if rng.random() < EMPTY_PROMPT else str(text) for text in texts]
    return Batch(jnp.concatenate([batch["gt"], batch["lq"]]), jnp.asarray(tokenize(texts)))


def initial_params(shapes: dict) -> dict:
    """Random weights, with residual branches, transformers and the last convolution that start at 0."""
    rng = np.random.default_rng(0)
    random = flatten({part: random_model.random_params(shapes[part], rng) for part in ("unet", "text")})
    silent = re.compile("unet/(.*/(conv2|proj_out)|conv_out)/")
    return unflatten({path: jnp.asarray(0 * x if silent.search(path) else x) for path, x in random.items()})


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="--out of pictures.py")
    parser.add_argument("--vae", type=Path, required=True, help="--out of vae.py")
    parser.add_argument("--out", type=Path, required=True, help="checkpoints")
    parser.add_argument("--model", type=Path, required=True, help="the diffusers folder that is written")
    args = parser.parse_args()
    prompts = read_prompts(args.data / "prompts.jsonl")
    every_word = [*prompts.values(), *[", ".join(words.NEGATIVE)] * len(prompts)]
    words.train_tokenizer(args.model / "tokenizer", every_word, TEXT["vocab_size"])

    factor = json.loads((args.vae / "scaling_factor.json").read_text())
    configs = {"unet": UNET, "vae": VAE | {"scaling_factor": factor}, "text": TEXT}
    backbone = bb.build_modules(**configs)
    shapes = bb.param_shapes(backbone)
    vae = pretrained.params_from_torch(load_file(args.vae / "vae.safetensors"), shapes["vae"], str(args.vae))
    objective = functools.partial(
        loss,
        backbone=backbone,
        vae=jax.tree.map(jnp.asarray, vae),
        alphas_cumprod=losses.ddpm_schedule().alphas_cumprod,
    )
    prepare = functools.partial(label, tokenize=bb.load_tokenizer(args.model / "tokenizer"))
    source = folder_source(args.data)
    first = fit(args.out / "first", PHASES, source, prompts, initial_params(shapes), objective, prepare, LEARNING_RATE)
    trained = fit(args.out / "last", LAST_PHASES, source, prompts, first, objective, prepare, LEARNING_RATE)
    weights = jax.device_get({**trained, "vae": vae})
    pretrained.write_pretrained(args.model, configs, weights, random_model.SCHEDULER, "float16")
    print(f"wrote {args.model}")


if __name__ == "__main__":
    main()
