"""Train the prior and the decoder of the demo model further, on images, with an adversarial loss.

    python demo/adversarial.py --pairs runs/demo_pairs --latents runs/demo_latents --prior runs/demo_prior_model
        --out runs/demo_adversarial --model runs/demo_model --minutes 60

The losses of prior.py leave results soft and permit a weave (demo/NOTES.md). The adversarial loss compares results with
those of Real-ESRGAN and makes them crisper. The decoder was trained on latents of images (vae.py); here it is also
trained on latents that the UNet restores. The encoder does not change, so the latents of latents.py remain valid. The
model is written to --model as a diffusers folder. A run that was interrupted continues when it is started again.
"""

import argparse
import functools
import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import critic
import crops
import jax
import jax.numpy as jnp
import numpy as np
import optax
import prior
from fit import add_time_options, fit, make_optimizer
from latents import ORIENTATIONS
from vae import without_attention

from pisa_jax import losses
from pisa_jax.data.latents import latent_source
from pisa_jax.data.prompts import read_prompts
from pisa_jax.imaging.image_files import find_images
from pisa_jax.imaging.ranges import uint8_to_signed
from pisa_jax.metrics import lpips
from pisa_jax.sd import backbone as bb
from pisa_jax.sd import pretrained

# Latents along a crop, and restored crops per step. A third as many receive noise, and as many are only decoded.
SIDE, BATCH = 16, 6
LEARNING_RATE = 1.2e-3
# Factors of the learning rate: of the decoder, with Muon, and of the critic, with Adam.
DECODER_RATE, CRITIC_RATE = 0.3, 0.6
# With a half-life of 140 steps, the average follows a training of some hundred steps.
AVERAGE_DECAY = 0.995
# Weights of the losses in `loss`.
WEIGHTS = {
    "noise": 1.0,
    "restoration": 1.0,
    "perceptual": 0.03,
    "absolute": 1.0,
    "adversarial": 0.3,
    "decoded": 10.0,
    "decoded_perceptual": 0.02,
    "critic": 1.0,
    "penalty": 1.0,
}
# Parts of the VAE that train.
DECODER = ("decoder", "post_quant_conv")


class Batch(NamedTuple):
    """Scaled latents: of images that receive noise, LQ ones with their targets, and others that are only decoded.

    Images in [-1, 1] of the targets and of the latents that are only decoded; token ids of all prompts.
    """

    clean: jax.Array
    lq: jax.Array
    target: jax.Array
    decoded: jax.Array
    target_images: jax.Array
    decoded_images: jax.Array
    token_ids: jax.Array


def loss(params, batch, key, backbone, frozen, alphas_cumprod):
    """Sum the losses of the prior, of the decoder and of the critic, with WEIGHTS.

    noise: |n - eps(z_t, t)|^2. restoration: |r - z_T|^2, with restored latents r and their targets z_T. perceptual,
    absolute and adversarial compare the decoded images D(r) with the targets' images x_T. decoded: |D(z) - x|^2 with
    images x and their latents z, and decoded_perceptual the same with the perceptual distance. critic and penalty train
    the critic.
    """
    for_prior, for_critic = jax.random.split(key)
    noise, restored = prior.predict(params, batch, for_prior, backbone, alphas_cumprod)
    vae = frozen.vae | without_attention(params["decoder"])
    images = bb.decode(backbone, vae, jnp.concatenate([restored, batch.decoded]))
    # At its border, a crop of latents is decoded without its neighbours.
    edge = backbone.vae_scale_factor
    images, targets, known = (x[:, edge:-edge, edge:-edge] for x in (images, batch.target_images, batch.decoded_images))
    results, decoded = images[: len(restored)], images[len(restored) :]
    own, penalty = critic.critic_losses(params["critic"], results, targets, for_critic)
    parts = {
        "noise": noise,
        "restoration": jnp.mean((restored - batch.target) ** 2),
        "perceptual": jnp.mean(lpips.distance(frozen.perceptual, results, targets)),
        "absolute": jnp.mean(jnp.abs(results - targets)),
        "adversarial": critic.generator_loss(params["critic"], results, targets),
        "decoded": jnp.mean((decoded - known) ** 2),
        "decoded_perceptual": jnp.mean(lpips.distance(frozen.perceptual, decoded, known)),
        "critic": own,
        "penalty": penalty,
    }
    return sum(WEIGHTS[name] * part for name, part in parts.items()), parts


class PairSources:
    """Pairs of latents with the images that they were encoded from, and prompts."""

    def __init__(self, pairs: Path, latents: Path, tokenize: Callable[[Sequence[str]], np.ndarray]):
        self._truths, self._taught = (latent_source(latents / stage) for stage in ("pix", "sem"))
        self._prompts, self._tokenize = read_prompts(latents / "prompts.jsonl"), tokenize
        self._images = {
            side: dict(zip((file.stem for file in find_images(pairs / side)), images, strict=True))
            for side, images in crops.read_pairs(pairs).items()
        }

    def image(self, side: str, path: str) -> np.ndarray:
        """Return the image of the latents named `path`, in their orientation (latents.py)."""
        stem, orientation = Path(path).stem.rsplit(".", 1)
        mirrored, turns = ORIENTATIONS[int(orientation)]
        return np.rot90(self._images[side][stem][:, ::mirrored], turns)

    def batch(self, side: int, count: int, step: int) -> Batch:
        """Draw the crops of a step."""
        rng = np.random.default_rng(step)
        others = max(1, count // 3)
        clean, texts = prior.noise_crops(self._truths, self._prompts, side, others, rng)
        target_image = functools.partial(self.image, "teacher")
        pairs, more = prior.restoration_crops(self._taught, self._prompts, side, count, rng, target_image)
        known = []
        for number, index in enumerate(rng.integers(len(self._truths), size=others).tolist()):
            record = self._truths[index]
            kind, latents = (("gt", record.image), ("lq", record.lq))[number % 2]
            known.append(prior.crop([latents, self.image(kind, record.path)], side, rng))
        lq, target, target_images = map(np.stack, zip(*pairs, strict=True))
        decoded, decoded_images = map(np.stack, zip(*known, strict=True))
        latents = (np.float32(x) for x in (np.stack(clean), lq, target, decoded))
        images = map(uint8_to_signed, (target_images, decoded_images))
        return Batch(*latents, *images, self._tokenize(texts + more))


def optimizer() -> optax.GradientTransformation:
    """Create Muon for the UNet, the text encoder and, slower, the decoder, and Adam for the critic."""
    return optax.multi_transform(
        {
            "prior": make_optimizer(),
            "decoder": optax.chain(make_optimizer(), optax.scale(DECODER_RATE)),
            "critic": optax.adam(CRITIC_RATE, b1=0.5, b2=0.99),
        },
        {"unet": "prior", "text": "prior", "decoder": "decoder", "critic": "critic"},
    )


def train(
    pairs: Path,
    latents: Path,
    start: Path,
    out: Path,
    model: Path,
    minutes: float,
    clock: Callable[[], float] = time.perf_counter,
    side: int = SIDE,
    batch: int = BATCH,
) -> None:
    """Train the model in the folder `start` for `minutes` of `clock` and write it to `model`."""
    backbone, loaded = pretrained.load_backbone(start), pretrained.load_pretrained(start)
    vae = loaded.params["vae"]
    params = {
        "unet": loaded.params["unet"],
        "text": loaded.params["text"],
        "decoder": {name: vae[name] for name in DECODER},
        "critic": critic.initial_params(np.random.default_rng(0)),
    }
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)
    encoder = {name: x for name, x in vae.items() if name not in DECODER}
    frozen = prior.Frozen(encoder, lpips.load_weights(None, "squeeze"))
    alphas_cumprod = losses.ddpm_schedule().alphas_cumprod
    objective = functools.partial(loss, backbone=backbone, frozen=jax.device_put(frozen), alphas_cumprod=alphas_cumprod)
    sources = PairSources(pairs, latents, loaded.tokenize)
    batch_of = functools.partial(sources.batch, side, batch)
    trained = fit(
        out, minutes, params, objective, batch_of, LEARNING_RATE, clock, optimizer(), average_decay=AVERAGE_DECAY
    )
    weights = {"unet": trained["unet"], "text": trained["text"], "vae": vae | trained["decoder"]}
    write_model(start, model, jax.device_get(weights), loaded.schedule)


def write_model(start: Path, model: Path, weights: Mapping[str, dict], schedule: Mapping) -> None:
    """Write weights with the configs and the tokenizer of another model."""
    configs = {
        part: json.loads((start / folder / "config.json").read_text()) for part, folder in pretrained.PARTS.items()
    }
    pretrained.write_pretrained(model, configs, weights, schedule, "float16")
    shutil.copytree(start / "tokenizer", model / "tokenizer", dirs_exist_ok=True)
    print(f"wrote {model}")


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=Path, required=True, help="--out of pairs.py, with the folder teacher")
    parser.add_argument("--latents", type=Path, required=True, help="--out of latents.py")
    parser.add_argument("--prior", type=Path, required=True, help="--model of prior.py")
    parser.add_argument("--out", type=Path, required=True, help="checkpoints")
    parser.add_argument("--model", type=Path, required=True, help="the diffusers folder that is written")
    add_time_options(parser)
    args = parser.parse_args()
    train(args.pairs, args.latents, args.prior, args.out, args.model, args.minutes, args.clock)


if __name__ == "__main__":
    main()
