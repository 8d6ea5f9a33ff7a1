"""Train the demo model's diffusion prior: a latent UNet and a text encoder, on the latents of latents.py.

    python demo/prior.py --latents runs/demo_latents --vae runs/demo_vae --out runs/demo_prior --model runs/demo_model
        --minutes 60

Clean latents train with the prompts in prompts.jsonl of --latents, degraded ones with negative words, and one in ten of
both with the empty prompt. The model is written to --model as a diffusers folder. A run that was interrupted continues
when it is started again.
"""

import argparse
import functools
import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import words
from fit import cpu_clock, fit
from safetensors.numpy import load_file
from shapes import TEXT, UNET

from pisa_jax import losses
from pisa_jax.data.latents import LatentSource, latent_source
from pisa_jax.data.prompts import read_prompts
from pisa_jax.runtime.trees import flatten, unflatten
from pisa_jax.sd import backbone as bb
from pisa_jax.sd import pretrained, random_model

# Latents along a crop, and crops per step: half clean, half degraded.
SIDE, BATCH = 16, 16
LEARNING_RATE = 3e-3
EMPTY_PROMPT = 0.1
# Half of the timesteps are drawn from the first ones: the adapters use the UNet at t = 1.
EARLY = 200


class Batch(NamedTuple):
    """Scaled latents and the token ids of their prompts."""

    latents: jax.Array
    token_ids: jax.Array


def draw_timesteps(key: jax.Array, count: int, steps: int) -> jax.Array:
    """Draw half of the timesteps from U{0..EARLY-1} and half from U{0..steps-1}."""
    for_early, for_all = jax.random.split(key)
    early = jax.random.randint(for_early, (count,), 0, EARLY)
    return jnp.where(jnp.arange(count) % 2 == 0, early, jax.random.randint(for_all, (count,), 0, steps))


def loss(params, batch, key, backbone, alphas_cumprod):
    """Compute |n - eps(z_t, t, c)|^2 (Ho et al. 2020, eq. 14)."""
    for_noise, for_time = jax.random.split(key)
    noise = jax.random.normal(for_noise, batch.latents.shape)
    timesteps = draw_timesteps(for_time, len(batch.latents), len(alphas_cumprod))
    prompt = bb.encode_text(backbone, params["text"], batch.token_ids)
    noisy = losses.add_noise(batch.latents, noise, timesteps, alphas_cumprod)
    square = (noise - bb.predict_noise(backbone, params["unet"], noisy, timesteps, prompt)) ** 2
    each = square.mean(axis=(1, 2, 3))
    early = timesteps < EARLY
    return each.mean(), {"early": jnp.sum(each * early) / jnp.maximum(early.sum(), 1)}


def make_batch(source: LatentSource, prompts: dict[str, str], tokenize, side: int, count: int, step: int) -> Batch:
    """Draw clean crops with their prompts and degraded crops with negative words; some have the empty prompt."""
    rng = np.random.default_rng(step)
    latents, texts = [], []
    for index in rng.integers(len(source), size=count):
        record, clean = source[index], len(latents) < count // 2
        image = record.image if clean else record.lq
        top, left = (rng.integers(length - side + 1) for length in image.shape[:2])
        latents.append(np.float32(image[top : top + side, left : left + side]))
        text = prompts.get(record.path, "") if clean else words.negative_prompt(rng)
        texts.append("" if rng.random() < EMPTY_PROMPT else text)
    return Batch(np.stack(latents), tokenize(texts))


def initial_params(shapes: dict) -> dict:
    """Draw weights; residual branches, transformers and the last convolution start at 0."""
    rng = np.random.default_rng(0)
    random = flatten({part: random_model.random_params(shapes[part], rng) for part in ("unet", "text")})
    silent = re.compile("unet/(.*/(conv2|proj_out)|conv_out)/")
    return unflatten({path: jnp.asarray(0 * x if silent.search(path) else x) for path, x in random.items()})


def train(
    latents: Path,
    vae: Path,
    out: Path,
    model: Path,
    minutes: float,
    clock: Callable[[], float] = time.perf_counter,
    unet: dict = UNET,
    side: int = SIDE,
    batch: int = BATCH,
) -> None:
    """Train for `minutes` of `clock` and write the model."""
    prompts = read_prompts(latents / "prompts.jsonl")
    every_word = [*sorted(set(prompts.values())), *[", ".join(words.NEGATIVE)] * len(prompts)]
    words.train_tokenizer(model / "tokenizer", every_word, TEXT["vocab_size"])
    configs = {"unet": unet, "vae": json.loads((vae / "config.json").read_text()), "text": TEXT}
    backbone = bb.build_modules(**configs)
    shapes = bb.param_shapes(backbone)
    objective = functools.partial(loss, backbone=backbone, alphas_cumprod=losses.ddpm_schedule().alphas_cumprod)
    tokenize = bb.Tokenizer(model / "tokenizer")
    batch_of = functools.partial(make_batch, latent_source(latents / "pix"), prompts, tokenize, side, batch)
    trained = fit(out, minutes, initial_params(shapes), objective, batch_of, LEARNING_RATE, clock)
    vae_params = pretrained.params_from_torch(load_file(vae / "vae.safetensors"), shapes["vae"], str(vae))
    weights = jax.device_get({**trained, "vae": vae_params})
    pretrained.write_pretrained(model, configs, weights, random_model.SCHEDULER, "float16")
    print(f"wrote {model}")


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--latents", type=Path, required=True, help="--out of latents.py")
    parser.add_argument("--vae", type=Path, required=True, help="--out of vae.py")
    parser.add_argument("--out", type=Path, required=True, help="checkpoints")
    parser.add_argument("--model", type=Path, required=True, help="the diffusers folder that is written")
    parser.add_argument("--minutes", type=float, required=True, help="of training")
    parser.add_argument("--cpu-time", action="store_true", help="count processor time")
    args = parser.parse_args()
    clock = cpu_clock if args.cpu_time else time.perf_counter
    train(args.latents, args.vae, args.out, args.model, args.minutes, clock)


if __name__ == "__main__":
    main()
