"""Validation of a training run on fixed images: metrics and a contact sheet."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from PIL import Image

from pisa_jax.adapters.adapter_tree import AdapterTree
from pisa_jax.config import AdapterSpec, Stage, Validation
from pisa_jax.data.degradation import degrade
from pisa_jax.data.sources import Source, folder_source, pair_source
from pisa_jax.imaging.contact_sheet import contact_sheet
from pisa_jax.imaging.ranges import signed_to_uint8, uint8_to_signed, uint8_to_unit, unit_to_uint8
from pisa_jax.metrics import lpips, psnr_ssim
from pisa_jax.model import BaseModel, Params, predict

logger = logging.getLogger(__name__)


class ValidationImage(NamedTuple):
    """An LQ/GT pair, uint8 RGB."""

    name: str
    lq: np.ndarray
    gt: np.ndarray


def validation_images(config: Validation, crop: int) -> list[ValidationImage]:
    """Read the validation images: the center `crop` x `crop` of each, degraded with its index as seed unless paired.

    Images that are unreadable or smaller than the crop are reported and skipped.

    Raises:
        ValueError: there is no image, or none can be used.
    """
    if config.path is None:
        return []
    source = (pair_source if (Path(config.path) / "lq").is_dir() else folder_source)(config.path)
    images, skipped = [], []
    for index in range(len(source)):
        if len(images) == config.count:
            break
        try:
            images.append(_validation_image(source, index, crop))
        except (OSError, ValueError) as error:
            skipped.append(str(error))
            logger.warning("skipped validation image: %s", error)
    if not images:
        raise ValueError(
            f"validation.path {config.path}: none of its {len(source)} images can be used, such as: {skipped[0]}"
        )
    return images


def _validation_image(source: Source, index: int, crop: int) -> ValidationImage:
    record = source[index]
    height, width, _ = record.image.shape
    if min(height, width) < crop:
        raise ValueError(f"{record.path} is {width} x {height}, smaller than data.crop {crop}")
    y, x = (height - crop) // 2, (width - crop) // 2
    gt = record.image[y : y + crop, x : x + crop]
    if record.lq is not None:
        return ValidationImage(record.path, record.lq[y : y + crop, x : x + crop], gt)
    lq = unit_to_uint8(degrade(uint8_to_unit(gt), np.random.default_rng(index)))
    return ValidationImage(record.path, lq, gt)


def upscale_image(
    unet: Params,
    vae: Params,
    adapter: AdapterTree,
    prompt: Float[Array, "1 n d"],
    below: tuple[AdapterTree, ...],
    lq: Float[Array, "1 h w 3"],
    *,
    base: BaseModel,
    spec: AdapterSpec,
    specs_below: tuple[AdapterSpec, ...] = (),
) -> Float[Array, "2 h w 3"]:
    """Upscale an image in [-1, 1] without and with the adapter, at scales 0 and 1, on top of those `below`."""
    latents = base.encode(vae, lq, None)
    pairs = tuple(zip(below, specs_below, strict=True))
    both = predict(base, unet, adapter, spec, latents, prompt, (0.0, 1.0), below=pairs)
    return jnp.clip(jnp.concatenate([base.decode(vae, latents - eps) for eps in both]), -1, 1)


def evaluate(
    upscale: Callable[[Float[Array, "1 h w 3"]], Float[Array, "2 h w 3"]],
    images: list[ValidationImage],
    perceptual: Any,
    stage: Stage,
) -> tuple[dict[str, float], Image.Image]:
    """Measure mean l2, PSNR and SSIM (of Y) and perceptual distance; also returns a contact sheet.

    The columns of the sheet are LQ, without the adapter that trains (in the semantic stage: pix only), with it, GT.
    """
    rows, found = [], []
    before, after = " + ".join(stage.frozen) or "no adapter", " + ".join([*stage.frozen, stage.adapter])
    for image in images:
        lq = jnp.asarray(uint8_to_signed(image.lq)[None])
        without, result = map(signed_to_uint8, np.asarray(upscale(lq)))
        values = {"l2": float(np.mean(np.square((np.float32(result) - image.gt) / 127.5)))}
        values |= {"psnr": psnr_ssim.psnr(result, image.gt), "ssim": psnr_ssim.ssim(result, image.gt)}
        if perceptual is not None:
            pair = (uint8_to_signed(array)[None] for array in (result, image.gt))
            values["perceptual"] = float(_distance(perceptual, *pair)[0])
        found.append(values)
        rows += [("LQ", image.lq), (before, without), (after, result), ("GT", image.gt)]
    sheet = contact_sheet([(label, Image.fromarray(array)) for label, array in rows], columns=4, longest=256)
    return {name: float(np.mean([values[name] for values in found])) for name in found[0]}, sheet


_distance = jax.jit(lpips.distance)
