"""Checks of a run against its devices, before anything is downloaded or loaded, and the expected duration of runs."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from pisa_jax.config import Config, Stage
from pisa_jax.model import BaseModel, LoadedModel
from pisa_jax.runtime import distributed
from pisa_jax.runtime.chips import Chip, chip_of
from pisa_jax.training_model import expected_shapes, perceptual_shapes

# TFLOP of a training step of Stable Diffusion 2.1 per image of 512 x 512 pixels, counted by `count_operations`: for l2,
# and what the other losses add. VGG16 needs 0.16 for an image, and three times as much for the distance of two and its
# gradient in one of them.
STEP_TFLOP, PERCEPTUAL_TFLOP, CSD_TFLOP = 6.88, 0.48, 1.43
# Fraction of the peak that a step is expected to reach.
PEAK_SHARE = 0.4
# Fraction of the bytes of large weights that "fsdp" may fail to divide.
UNDIVIDED = 0.1


def check_mesh(config: Config, mesh: Mesh, model: LoadedModel | None = None) -> None:
    """Check that the batch can be divided over the mesh, and that the weights fit into its devices.

    `model` takes the place of the one that `config.model` names.

    Raises:
        ValueError: otherwise; the message has what fits.
    """
    check_batch(config, mesh)
    if mesh.shape["fsdp"] > 1 or chip_of(mesh.devices.flat[0]):
        base, params = (model.base, model.params) if model else expected_shapes(config)[:2]
        check_weights(config, mesh, base, params)


def check_batch(config: Config, mesh: Mesh) -> None:
    """Raise ValueError unless every device gets the same number of images; the message has sizes that fit."""
    parts = mesh.size * config.accumulate
    if config.batch_size % parts == 0:
        return
    chip = chip_of(mesh.devices.flat[0])
    allowed = config.batch_size // config.accumulate
    sizes = [size for size in (chip.sizes if chip else range(1, allowed + 1)) if allowed % size == 0]
    per_size = _listed(f"{size}{_duration(config, config.batch_size, size, chip)}" for size in sizes)
    batches = _listed(
        f"{count * parts}{_duration(config, count * parts, mesh.size, chip)}" for count in (1, 2, 4) if count * parts
    )
    estimate = f" (times of the whole run, expected at {PEAK_SHARE:.0%} of the peak)" if chip else ""
    raise ValueError(
        f"batch_size {config.batch_size} cannot be divided over {mesh.size} devices x accumulate {config.accumulate}: "
        f"use a slice of {per_size} devices for this batch, where a larger one is no gain, or --batch-size {batches} "
        f"here{estimate}"
    )


def _listed(items: Iterable[str]) -> str:
    *most, last = items
    return f"{', '.join(most)} or {last}" if most else last


def _duration(config: Config, batch_size: int, devices: int, chip: Chip | None) -> str:
    """Format the expected duration of a run in brackets; empty for unknown devices."""
    if chip is None:
        return ""
    hours = run_hours(config, batch_size, devices, chip)
    return f" ({hours:.1f} hours)" if hours >= 2 else f" ({math.ceil(hours * 60)} minutes)"


def step_tflop(config: Config, stage: Stage) -> float:
    """Return the expected operations of a step per image, in TFLOP, for Stable Diffusion 2.1."""
    losses = STEP_TFLOP + PERCEPTUAL_TFLOP * bool(stage.perceptual) + CSD_TFLOP * bool(stage.csd)
    return losses * (config.data.crop / 512) ** 2


def run_hours(config: Config, batch_size: int, devices: int, chip: Chip, share: float = PEAK_SHARE) -> float:
    """Return the expected hours of all steps at a share of the peak, without loading, compilation and validation."""
    tflop = sum(stage.steps * step_tflop(config, stage) for stage in config.stages) * batch_size
    return tflop / (devices * chip.tflops * share) / 3600


def check_weights(config: Config, mesh: Mesh, base: BaseModel, params: Mapping[str, Any]) -> None:
    """Raise ValueError if "fsdp" does not divide the weights, or if those of a device exceed its memory."""
    fsdp = mesh.shape["fsdp"]
    large = [leaf for leaf in jax.tree.leaves(params) if leaf.size >= distributed.MIN_SIZE_TO_SHARD]
    whole = sum(leaf.size for leaf in large if all(side % fsdp for side in leaf.shape))
    if whole > UNDIVIDED * sum(leaf.size for leaf in large):
        fitting = _listed(str(2**power) for power in range(8) if mesh.size % 2**power == 0)
        raise ValueError(
            f"mesh_fsdp {fsdp} does not divide the sides of most weights, so every device would hold them completely; "
            f"use {fitting}"
        )
    chip = chip_of(mesh.devices.flat[0])
    bytes_held = held_bytes(config, mesh, base, params)
    if chip and bytes_held > chip.memory * 2**30:
        raise ValueError(
            f"the weights need {bytes_held / 2**30:.1f} GiB per device, and a {chip.name} has {chip.memory:g}: raise "
            f"mesh_fsdp (now {fsdp}, at most {mesh.size}), or set dtype and vae_dtype bfloat16"
        )


def held_bytes(config: Config, mesh: Mesh, base: BaseModel, params: Mapping[str, Any]) -> int:
    """Return the bytes of the frozen weights on each device in the stage that holds most."""

    def part(tree, dtype):
        shardings = jax.tree.leaves(distributed.weight_shardings(mesh, tree))
        leaves = jax.tree.leaves(tree)
        return sum(
            math.prod(sharding.shard_shape(leaf.shape)) * dtype.itemsize
            for leaf, sharding in zip(leaves, shardings, strict=True)
        )

    single = jnp.dtype("float32")
    copies = 1 + any(stage.csd and stage.frozen for stage in config.stages)
    held = copies * part(params["unet"], jnp.dtype(base.unet_dtype))
    held += part(params["vae"], jnp.dtype(base.vae_dtype))
    held += part(params["text"], single) if config.data.prompts else 0
    return held + sum(leaf.size * 4 for leaf in jax.tree.leaves(perceptual_shapes(config)))
