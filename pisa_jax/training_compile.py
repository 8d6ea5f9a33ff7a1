"""Compilation of all stages before the first step: for the devices of the run, or for others ahead of time."""

import contextlib
import functools
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from pisa_jax.adapters.adapter_tree import Adapters
from pisa_jax.adapters.fit import is_mergeable
from pisa_jax.config import Config
from pisa_jax.metrics import validation
from pisa_jax.model import BaseModel, LoadedModel
from pisa_jax.runtime import distributed
from pisa_jax.runtime.compilation import compiler_options
from pisa_jax.runtime.operations import count_operations
from pisa_jax.train_step import Batch, Frozen, State, jit_train_step
from pisa_jax.training_run import adapter_shapes, make_objective, make_optimizer, specs_of, state_shapes


class Shapes(NamedTuple):
    """The base model of a run with the shapes of its weights."""

    base: BaseModel
    # "unet", "vae" and "text", in any dtype.
    params: Mapping[str, Any]
    # Token ids of a prompt.
    tokens: int
    # Weights of the perceptual loss; None without that loss.
    perceptual: Any


class Programs(NamedTuple):
    """The compiled functions of one stage."""

    step: jax.stages.Compiled
    # Of the step, on each device, in FLOP.
    operations: float
    # (unet, vae, adapter, prompt, below, lq) -> images, of `validation.upscale_image`; None without validation.
    upscale: jax.stages.Compiled | None


def shapes_of(model: LoadedModel, perceptual: Any) -> Shapes:
    """Return the shapes of a model in memory."""
    return Shapes(model.base, model.params, model.tokenize([""]).shape[1], perceptual)


def _placed(tree: Any, shardings: Any, dtype: Any = None) -> Any:
    def shape(leaf, sharding):
        return jax.ShapeDtypeStruct(leaf.shape, dtype or leaf.dtype, sharding=sharding)

    if isinstance(shardings, jax.sharding.Sharding):
        shardings = jax.tree.map(lambda _: shardings, tree)
    return jax.tree.map(shape, tree, shardings)


def frozen_shapes(config: Config, index: int, shapes: Shapes, mesh: Mesh, start: Adapters) -> Frozen:
    """Return the shapes and shardings of what `train_step.make_frozen` makes for a stage."""
    stage, base, replicated = config.stages[index], shapes.base, distributed.replicated(mesh)

    def part(name, dtype):
        tree = shapes.params[name]
        return _placed(tree, distributed.weight_shardings(mesh, tree), dtype)

    unet, text = part("unet", base.unet_dtype), part("text", jnp.float32)
    prompt = jax.eval_shape(base.encode_text, text, jax.ShapeDtypeStruct((1, shapes.tokens), jnp.int32))
    prompt, specs = _placed(prompt, replicated), specs_of(config, start)
    trained = adapter_shapes(config, index, start.trees, unet)
    return Frozen(
        unet=unet,
        teacher=unet if stage.csd else None,
        vae=part("vae", base.vae_dtype),
        text=text if config.data.prompts else None,
        null_prompt=prompt,
        negative_prompt=prompt,
        perceptual=_placed(shapes.perceptual, replicated) if stage.perceptual else None,
        alphas_cumprod=jax.ShapeDtypeStruct((1000,), jnp.float32, sharding=replicated),
        below=tuple(_placed(trained[name], replicated) for name in stage.frozen if not is_mergeable(specs[name])),
    )


def stage_shapes(
    config: Config, index: int, shapes: Shapes, mesh: Mesh, start: Adapters
) -> tuple[Frozen, State, Batch, Any]:
    """Return the shapes and shardings of the arguments of a stage's step; `start` has the adapters given to the run."""
    frozen = frozen_shapes(config, index, shapes, mesh, start)
    state = state_shapes(config, index, start.trees, frozen.unet)
    state = _placed(state, distributed.factor_shardings(mesh, state))
    side, channels, size = config.data.crop, 3, config.batch_size
    if config.data.source == "latents":
        side, channels = side // shapes.base.vae_scale_factor, shapes.base.latent_channels
    images = jax.ShapeDtypeStruct((size, side, side, channels), jnp.float32)
    ids = jax.ShapeDtypeStruct((size, shapes.tokens if config.data.prompts else 1), jnp.int32)
    batch = Batch(images, images, ids, jax.ShapeDtypeStruct((size,), jnp.bool_))
    return frozen, state, _placed(batch, distributed.batch_sharding(mesh)), jax.eval_shape(jax.random.key, 0)


def trace_step(
    config: Config,
    index: int,
    base: BaseModel,
    mesh: Mesh,
    start: Adapters,
    arguments: tuple[Frozen, State, Batch, Any],
) -> jax.stages.Traced:
    """Trace the step of a stage for the `arguments` that `stage_shapes` returned."""
    stage, (frozen, state, *_) = config.stages[index], arguments
    trained = adapter_shapes(config, index, start.trees, frozen.unet)
    optimizer = make_optimizer(config, stage, {name: trained[name] for name in stage.frozen})
    objective = make_objective(config, stage, specs_of(config, start))
    return jit_train_step(base, objective, optimizer, frozen, mesh, state).trace(*arguments)


def _compile_upscale(
    config: Config, index: int, base: BaseModel, mesh: Mesh, start: Adapters, frozen: Frozen, state: State
) -> jax.stages.Compiled:
    stage = config.stages[index]
    below = make_objective(config, stage, specs_of(config, start)).below
    upscale = functools.partial(validation.upscale_image, base=base, spec=stage.spec, specs_below=below)
    jitted = jax.jit(upscale, out_shardings=distributed.replicated(mesh), compiler_options=compiler_options())
    image = jax.ShapeDtypeStruct((1, config.data.crop, config.data.crop, 3), jnp.float32)
    return jitted.lower(frozen.unet, frozen.vae, state.adapter, frozen.null_prompt, frozen.below, image).compile()


def compile_stage(config: Config, index: int, shapes: Shapes, mesh: Mesh, start: Adapters, validated: bool) -> Programs:
    """Compile the functions of one stage from shapes.

    Raises:
        ValueError: the step does not fit into the memory of a device.
    """
    with explain_out_of_memory(config, mesh, f"stage {config.stages[index].adapter}"):
        frozen, state, *_ = arguments = stage_shapes(config, index, shapes, mesh, start)
        traced = trace_step(config, index, shapes.base, mesh, start, arguments)
        step, operations = traced.lower().compile(), count_operations(traced.jaxpr) / mesh.size
        upscale = _compile_upscale(config, index, shapes.base, mesh, start, frozen, state) if validated else None
    return Programs(step, operations, upscale)


@contextlib.contextmanager
def explain_out_of_memory(config: Config, mesh: Mesh, what: str) -> Iterator[None]:
    """Raise ValueError with the settings to lower in place of XLA's error about memory."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        found = re.search(r"Used ([\d.]+\w) of ([\d.]+\w)", str(error))
        needed = f" (it needs {found[1]} of {found[2]})" if found else ""
        raise ValueError(
            f"{what} does not fit into the memory of a device{needed}; {_remedies(config, mesh)}"
        ) from error


def _remedies(config: Config, mesh: Mesh) -> str:
    """Name the settings that lower the memory of a step, in the order of their cost."""
    images = config.batch_size // (mesh.size * config.accumulate)
    found = []
    if images > 1:
        found.append(f"raise accumulate (now {config.accumulate}; {images} images per device at once)")
    if not config.remat:
        found.append("set remat")
    found += [f"set {name} bfloat16" for name in ("dtype", "vae_dtype") if getattr(config, name) == "float32"]
    if config.mesh_fsdp < mesh.size:
        found.append(f"shard the weights with mesh_fsdp (now {config.mesh_fsdp}, at most {mesh.size})")
    if config.batch_size > mesh.size:
        found.append(f"lower batch_size (now {config.batch_size})")
    return "; ".join([*found, f"or lower data.crop (now {config.data.crop})"])
