"""Train the demo model's prior: a latent UNet and a text encoder, on the latents of latents.py.

    python demo/prior.py --latents runs/demo_latents --vae runs/demo_vae --out runs/demo_prior
        --model runs/demo_prior_model --minutes 60

The UNet has two tasks. The first is to predict noise: clean latents train with the prompts in prompts.jsonl of
--latents, degraded ones with negative words, and one in ten of both with the empty prompt. The second is restoration at
t = 1, the timestep of the adapters: the UNet predicts the residual to the result of Real-ESRGAN, with the prompt or the
empty one. Its losses are the squared error of latents and, for half of the crops, the perceptual distance of decoded
images. The adapters start from the features of this task. The model is written to --model as a diffusers folder. A run
that was interrupted continues when it is started again.
"""

import argparse
import functools
import json
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import words
from fit import add_time_options, fit
from safetensors.numpy import load_file
from shapes import TEXT, UNET

from pisa_jax import losses
from pisa_jax.data.latents import LatentSource, latent_source
from pisa_jax.data.prompts import read_prompts
from pisa_jax.metrics import lpips
from pisa_jax.model import TIMESTEP
from pisa_jax.runtime.trees import flatten, unflatten
from pisa_jax.sd import backbone as bb
from pisa_jax.sd import pretrained, random_model

# Latents along a crop, and crops per step: a third with noise, half of them degraded ones, and two thirds restored.
SIDE, BATCH = 16, 12
LEARNING_RATE = 4e-3
# Probability of the empty prompt: for noise, and for restoration as in the training of the adapters.
EMPTY_PROMPT, EMPTY_PROMPT_RESTORING = 0.1, 0.5
# Weights of the squared error of restored latents and of the perceptual distance of decoded ones. With 1 and 0.15, the
# results have a weave.
RESTORATION, PERCEPTUAL = 2.0, 0.06
# Timesteps of noise; those of CSD are among them.
FIRST_TIMESTEP = 20


class Batch(NamedTuple):
    """Scaled latents: of images that receive noise, and LQ ones with their targets; token ids of all prompts."""

    clean: jax.Array
    lq: jax.Array
    target: jax.Array
    token_ids: jax.Array


class Frozen(NamedTuple):
    """Weights that the loss reads: the VAE and the perceptual network."""

    vae: dict
    perceptual: dict


def predict(params, batch, key, backbone, alphas_cumprod) -> tuple[jax.Array, jax.Array]:
    """Return the loss of noise prediction, |n - eps(z_t, t, c)|^2, and the restored latents z_L - eps(z_L, 1, c)."""
    for_noise, for_time = jax.random.split(key)
    noise = jax.random.normal(for_noise, batch.clean.shape)
    timesteps = jax.random.randint(for_time, (len(noise),), FIRST_TIMESTEP, len(alphas_cumprod))
    noisy = losses.add_noise(batch.clean, noise, timesteps, alphas_cumprod)
    out = bb.predict_noise(
        backbone,
        params["unet"],
        jnp.concatenate([noisy, batch.lq]),
        jnp.concatenate([timesteps, jnp.full(len(batch.lq), TIMESTEP)]),
        bb.encode_text(backbone, params["text"], batch.token_ids),
    )
    predicted, changes = out[: len(noise)], out[len(noise) :]
    return jnp.mean((noise - predicted) ** 2), batch.lq - changes


def loss(params, batch, key, backbone, frozen, alphas_cumprod):
    """Sum the losses of both tasks.

    With r = z_L - eps(z_L, 1, c): |n - eps(z_t, t, c)|^2 (Ho et al. 2020, eq. 14) + RESTORATION |r - z_T|^2
    + PERCEPTUAL d(D(r), D(z_T)).
    """
    noise, restored = predict(params, batch, key, backbone, alphas_cumprod)
    decoded = slice(len(restored) // 2)
    images = (bb.decode(backbone, frozen.vae, latents[decoded]) for latents in (restored, batch.target))
    parts = {
        "noise": noise,
        "restoration": jnp.mean((restored - batch.target) ** 2),
        "perceptual": jnp.mean(lpips.distance(frozen.perceptual, *images)),
    }
    return parts["noise"] + RESTORATION * parts["restoration"] + PERCEPTUAL * parts["perceptual"], parts


def crop(arrays: Sequence[np.ndarray], side: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Crop arrays at the same random position: `side` along the first, more along those of a higher resolution."""
    top, left = (int(rng.integers(length - side + 1)) for length in arrays[0].shape[:2])
    crops = []
    for array in arrays:
        scale = len(array) // len(arrays[0])
        crops.append(array[scale * top : scale * (top + side), scale * left : scale * (left + side)])
    return crops


def noise_crops(
    truths: LatentSource, prompts: dict[str, str], side: int, count: int, rng: np.random.Generator
) -> tuple[list[np.ndarray], list[str]]:
    """Draw crops that receive noise, every other one degraded, and their prompts."""
    crops, texts = [], []
    for number, index in enumerate(rng.integers(len(truths), size=count).tolist()):
        record, degraded = truths[index], number % 2
        crops += crop([record.lq if degraded else record.image], side, rng)
        text = words.negative_prompt(rng) if degraded else prompts.get(record.path, "")
        texts.append("" if rng.random() < EMPTY_PROMPT else text)
    return crops, texts


def restoration_crops(
    taught: LatentSource,
    prompts: dict[str, str],
    side: int,
    count: int,
    rng: np.random.Generator,
    image_of: Callable[[str], np.ndarray] | None = None,
) -> tuple[list[list[np.ndarray]], list[str]]:
    """Draw crops of LQ latents, of their targets and of the images `image_of(name)`, and their prompts."""
    crops, texts = [], []
    for index in rng.integers(len(taught), size=count).tolist():
        record = taught[index]
        arrays = [record.lq, record.image, *([image_of(record.path)] if image_of else [])]
        crops.append(crop(arrays, side, rng))
        texts.append("" if rng.random() < EMPTY_PROMPT_RESTORING else prompts.get(record.path, ""))
    return crops, texts


def make_batch(
    truths: LatentSource, taught: LatentSource, prompts: dict[str, str], tokenize, side: int, count: int, step: int
) -> Batch:
    """Draw crops that receive noise, LQ crops with their targets, and their prompts."""
    rng = np.random.default_rng(step)
    clean, texts = noise_crops(truths, prompts, side, count // 3, rng)
    pairs, more = restoration_crops(taught, prompts, side, count - count // 3, rng)
    clean, lq, target = (np.float32(np.stack(arrays)) for arrays in (clean, *zip(*pairs, strict=True)))
    return Batch(clean, lq, target, tokenize(texts + more))


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
    vae_params = pretrained.params_from_torch(load_file(vae / "vae.safetensors"), shapes["vae"], str(vae))
    frozen = jax.device_put(Frozen(vae_params, lpips.load_weights(None, "squeeze")))
    schedule = losses.ddpm_schedule().alphas_cumprod
    objective = functools.partial(loss, backbone=backbone, frozen=frozen, alphas_cumprod=schedule)
    tokenize = bb.Tokenizer(model / "tokenizer")
    sources = (latent_source(latents / stage) for stage in ("pix", "sem"))
    batch_of = functools.partial(make_batch, *sources, prompts, tokenize, side, batch)
    trained = fit(out, minutes, initial_params(shapes), objective, batch_of, LEARNING_RATE, clock)
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
    add_time_options(parser)
    args = parser.parse_args()
    train(args.latents, args.vae, args.out, args.model, args.minutes, args.clock)


if __name__ == "__main__":
    main()
