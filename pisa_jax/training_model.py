"""The base model and the perceptual loss of a training run: loading, and checks of the config against them."""

import shutil
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import multihost_utils

from pisa_jax.adapters import fit, injection, registry
from pisa_jax.config import Config
from pisa_jax.data.latents import LatentSource
from pisa_jax.metrics import lpips
from pisa_jax.model import BaseModel, LoadedModel
from pisa_jax.runtime import distributed
from pisa_jax.runtime.console import say
from pisa_jax.runtime.imports import import_function
from pisa_jax.sd import backbone, pretrained, random_model
from pisa_jax.sd.base_model import make_base_model

# Size of the model that `model="random"` makes.
RANDOM_SIZE = "nano"


def load_model(config: Config, model: str | Path) -> LoadedModel:
    """Load a base model that computes in the dtypes of the run."""
    return pretrained.load_pretrained(model, jnp.dtype(config.dtype), jnp.dtype(config.vae_dtype))


def random_shapes() -> tuple[BaseModel, Any]:
    """Return the functions of the model that `make_random_model` writes, and the shapes of its UNet."""
    modules = backbone.build_modules(*random_model.model_configs(RANDOM_SIZE))
    return random_model.base_model_of_size(RANDOM_SIZE), backbone.param_shapes(modules)["unet"]


def make_random_model(config: Config, folder: Path) -> Path:
    """Write a random base model into the run directory, from one process, unless it exists; returns its folder."""
    made = folder / "model"
    if jax.process_index() == 0 and not made.exists():
        unfinished = made.with_suffix(".part")  # left over by a killed run, or ours
        shutil.rmtree(unfinished, ignore_errors=True)
        random_model.write_random_model(unfinished, RANDOM_SIZE, config.seed)
        unfinished.rename(made)
    multihost_utils.sync_global_devices("model written")
    return made


def load_perceptual(config: Config, mesh: jax.sharding.Mesh) -> Any:
    """Load the weights of the perceptual loss onto every device; None where no stage uses it.

    Raises:
        ValueError, OSError: unusable weights, or a crop that is too small for the network.
    """
    if not any(stage.perceptual for stage in config.stages):
        return None
    weights = lpips.load_weights(config.perceptual_weights, config.perceptual)
    crop = jax.ShapeDtypeStruct((1, config.data.crop, config.data.crop, 3), jnp.float32)
    try:
        jax.eval_shape(lpips.features, weights, crop)
    except ValueError as error:
        raise ValueError(f"data.crop {config.data.crop} is too small for the perceptual loss: {error}") from error
    if jax.process_index() == 0:
        say(f"perceptual loss: {lpips.distance_name(weights)}", sys.stdout)
    return jax.tree.map(lambda leaf: distributed.make_global_arrays(leaf, distributed.replicated(mesh)), weights)


def crop_in_latents(config: Config, latents: LatentSource, model: LoadedModel | None) -> int:
    """Return the side of the crops in latents; reads the config files of the VAE unless there is a `model`.

    Raises:
        ValueError: the VAE has another number of latent channels than `latents`.
    """
    if model:
        base = model.base
    elif config.model == "random":
        base, _ = random_shapes()
    else:
        base = make_base_model(pretrained.load_backbone(pretrained.locate_model(config.model)))
    if latents.shape[-1] != base.latent_channels:
        raise ValueError(
            f"the latents in {latents.root} have {latents.shape[-1]} channels, and those of the VAE of {config.model} "
            f"{base.latent_channels}; encode the images with this VAE"
        )
    return config.data.crop // base.vae_scale_factor


def check(config: Config, base: BaseModel, unet: Any, mesh: jax.sharding.Mesh) -> None:
    """Check all stages of the config against the model, whose UNet has the leaves (or shapes) `unet`, and the mesh.

    Raises:
        ValueError: an unknown decomposition, option or optimizer, layers that it cannot adapt, targets that match no
            layer, an adapter that depends on the weights on top of one that cannot be merged, a crop that is not a
            multiple of the VAE's scale factor or is smaller than `latent_window`, or a batch that cannot be divided
            over the devices.
    """
    if config.data.crop % base.vae_scale_factor:
        raise ValueError(f"data.crop {config.data.crop} is not a multiple of {base.vae_scale_factor}, the VAE's factor")
    latents = config.data.crop // base.vae_scale_factor
    for stage in config.stages:
        try:
            registry.import_decomposition(stage.spec.decomposition)
            injection.check_spec(unet, stage.spec)
            if registry.get_decomposition(stage.spec).needs_kernel == "delta":
                below = {each.adapter: each.spec for each in config.stages if each.adapter in stage.frozen}
                fit.check_mergeable(below)
            if stage.optimizer:
                import_function(stage.optimizer)
        except ValueError as error:
            raise ValueError(f"stage {stage.adapter}: {error}") from error
        if stage.latent_window > latents:
            raise ValueError(
                f"stage {stage.adapter}: latent_window {stage.latent_window} is more than the {latents} latents along "
                f"a crop of {config.data.crop} pixels"
            )
    parts = mesh.size * config.accumulate
    if config.batch_size % parts:
        raise ValueError(
            f"batch_size {config.batch_size} cannot be divided over {mesh.size} devices x accumulate "
            f"{config.accumulate}: give a multiple of {parts}"
        )
