"""Validation of a training run on fixed images: metrics and a contact sheet."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from PIL import Image

from pisa_jax import model
from pisa_jax.adapters.adapter_tree import AdapterTree
from pisa_jax.config import Stage, Validation
from pisa_jax.data.degradation import degrade
from pisa_jax.data.sources import folder_source, pair_source
from pisa_jax.imaging.contact_sheet import contact_sheet
from pisa_jax.metrics import lpips, psnr_ssim
from pisa_jax.sd import backbone as bb
from pisa_jax.train_step import Frozen

# Measurements that are shown on the terminal only where they are not 0.
COUNTERS = ("skipped", "bad_streak")


class Pair(NamedTuple):
    """A validation picture, uint8."""

    name: str
    lq: np.ndarray
    gt: np.ndarray


def validation_pairs(config: Validation, crop: int) -> list[Pair]:
    """The fixed pictures: the middle `crop` x `crop` of each, degraded with its index as the seed unless paired.

    Raises:
        ValueError: a picture is smaller than the crop. OSError: one cannot be read.
    """
    if config.path is None:
        return []
    source = (pair_source if (Path(config.path) / "lq").is_dir() else folder_source)(config.path)
    pairs = []
    for index in range(min(config.count, len(source))):
        record = source[index]
        height, width, _ = record.image.shape
        if min(height, width) < crop:
            raise ValueError(f"validation picture {record.path} is {width} x {height}, smaller than data.crop {crop}")
        y, x = (height - crop) // 2, (width - crop) // 2
        gt = record.image[y : y + crop, x : x + crop]
        if record.lq is not None:
            lq = record.lq[y : y + crop, x : x + crop]
        else:
            lq = np.rint(degrade(np.float32(gt) / np.float32(255), np.random.default_rng(index)) * 255).astype(np.uint8)
        pairs.append(Pair(record.path, lq, gt))
    return pairs


def restore(
    frozen: Frozen, adapter: AdapterTree, lq: Float[Array, "1 h w 3"], *, backbone: bb.Backbone, stage: Stage
) -> Float[Array, "2 h w 3"]:
    """A picture in [-1, 1] restored without and with the adapter that trains, at scale 1 and the empty prompt."""
    latents = bb.encode(backbone, frozen.vae, lq)
    both = model.predict(backbone, frozen.unet, adapter, stage.spec, latents, frozen.null_prompt)
    images = [bb.decode(backbone, frozen.vae, latents - eps) for eps in both]
    return jnp.clip(jnp.concatenate(images), -1, 1)


def validate(
    restore: Callable[[Float[Array, "1 h w 3"]], Float[Array, "2 h w 3"]],
    pairs: list[Pair],
    perceptual: Any,
    stage: Stage,
) -> tuple[dict[str, float], Image.Image]:
    """Mean l2, PSNR and SSIM (of Y) and perceptual distance of the restored pictures, and a sheet of them.

    The sheet's columns are LQ, without the adapter that trains (in the semantic stage: pix only), with it, GT.
    """
    rows, found = [], []
    before, after = " + ".join(stage.frozen) or "no adapter", " + ".join([*stage.frozen, stage.adapter])
    for pair in pairs:
        without, restored = (to_uint8(image) for image in np.asarray(restore(to_float(pair.lq)[None])))
        values = {"l2": float(np.mean(np.square((np.float32(restored) - pair.gt) / 127.5)))}
        values |= {"psnr": psnr_ssim.psnr(restored, pair.gt), "ssim": psnr_ssim.ssim(restored, pair.gt)}
        if perceptual is not None:
            values["perceptual"] = float(_distance(perceptual, to_float(restored)[None], to_float(pair.gt)[None])[0])
        found.append(values)
        rows += [("LQ", pair.lq), (before, without), (after, restored), ("GT", pair.gt)]
    sheet = contact_sheet([(label, Image.fromarray(image)) for label, image in rows], columns=4, longest=256)
    return {name: float(np.mean([values[name] for values in found])) for name in found[0]}, sheet


_distance = jax.jit(lpips.distance)


def to_float(image: np.ndarray) -> jax.Array:
    """uint8 to float32 in [-1, 1]."""
    return jnp.asarray(np.float32(image) / 127.5 - 1)


def to_uint8(image: np.ndarray) -> np.ndarray:
    """[-1, 1] to uint8, rounded."""
    return np.rint((np.clip(image, -1, 1) + 1) * 127.5).astype(np.uint8)
