"""Training: one loop over a list of stages, from images to adapters."""

import contextlib
import functools
import time
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from pisa_jax.adapters import files, fit, injection, registry
from pisa_jax.adapters.adapter_tree import Adapters, AdapterTree, select_factors
from pisa_jax.adapters.start import load_start
from pisa_jax.config import AdapterSpec, Config, Data, Stage
from pisa_jax.data import loader, sources
from pisa_jax.data.degradation import degrade
from pisa_jax.data.latents import LatentSource, latent_source
from pisa_jax.data.prompts import report_long_prompts
from pisa_jax.data.tfds import tfds_source
from pisa_jax.metrics import validation
from pisa_jax.model import LoadedModel
from pisa_jax.runtime import distributed
from pisa_jax.runtime.checkpoint import Checkpoints, Progress
from pisa_jax.runtime.compilation import compiler_options
from pisa_jax.runtime.imports import import_function
from pisa_jax.runtime.run_directory import check_run_directory, claim_run_directory
from pisa_jax.runtime.run_log import RunLog
from pisa_jax.runtime.stop_signals import StopSignals
from pisa_jax.runtime.weights_digest import weights_digest
from pisa_jax.train_step import Batch, Objective, State, init_state, jit_train_step, make_frozen
from pisa_jax.training_model import (
    check,
    crop_in_latents,
    load_model,
    load_perceptual,
    make_random_model,
    random_shapes,
)
from pisa_jax.weights import base_difference

ADAPTERS_FILE = "adapters.safetensors"


class Stop(Exception):
    """The run was asked to stop, and its state is saved."""


class Run(NamedTuple):
    """Everything that the stages of a run share."""

    config: Config
    folder: Path
    mesh: jax.sharding.Mesh
    model: LoadedModel
    # Adapters that the run starts from; none without `config.start`.
    start: Adapters
    # Weights of the perceptual loss on the devices; None if no stage uses it.
    perceptual: Any
    loader: loader.Loader
    checkpoints: Checkpoints
    validation: list[validation.ValidationImage]
    # None in all processes but the first.
    log: RunLog | None
    # `weights_digest` of all parts of the model.
    digest: str
    # None: signals are not handled, or (with several processes) by jax.distributed.
    stop: StopSignals | None

    @property
    def total(self) -> int:
        """Steps of all stages."""
        return sum(stage.steps for stage in self.config.stages)

    def before(self, index: int) -> int:
        """Steps of the stages before stage `index`."""
        return sum(stage.steps for stage in self.config.stages[:index])


def train(
    config: Config,
    resume: bool = False,
    overwrite: bool = False,
    *,
    model: LoadedModel | None = None,
    stop: StopSignals | None = None,
) -> Path:
    """Train all stages, or the rest of a resumed run; returns the path of the exported adapters.

    `model` takes the place of the one that `config.model` names. The run is saved and ends after `stop` has received a
    signal.

    Raises:
        ValueError, OSError: unusable input, before anything is trained.
        FloatingPointError: too many steps in a row were not finite, or the trained adapter is not.
        Stop: a signal was received and the run is saved.
    """
    # Validate everything before creating the run directory, and refuse one that is in use before loading anything.
    check_run_directory(config, resume, overwrite)
    mesh = distributed.make_mesh(config.mesh_data, config.mesh_fsdp)
    batches, given = training_loader(config, model), load_start(config)
    images = validation.validation_images(config.validation, config.data.crop)
    perceptual = load_perceptual(config, mesh)
    if model is None and config.model != "random":
        model = load_model(config, config.model)
    base, unet = (model.base, model.params["unet"]) if model else random_shapes()
    check(config, base, unet, mesh)
    if given.trees:
        fit.check_adapters(given.trees, given.specs, injection.target_shapes(unet))
    with contextlib.ExitStack() as closing:  # each is closed, whatever the others raise
        closing.callback(batches.close)
        folder = claim_run_directory(config, resume, overwrite, closing)
        model = model or load_model(config, make_random_model(config, folder))
        if batches.prompts and jax.process_index() == 0:
            report_long_prompts(batches.prompts, model.count_tokens, model.tokenize([""]).shape[1])
        checkpoints = Checkpoints(folder)
        closing.callback(checkpoints.close)
        first = (checkpoints.recover() or 0) if resume else 0
        total = sum(stage.steps for stage in config.stages)
        log = RunLog(folder, config.batch_size, total, first) if jax.process_index() == 0 else None
        if log:
            closing.callback(log.close)
            if resume:
                log.print_line(f"continuing after step {first} of {total}")
            if difference := base_difference(model, given):
                log.print_line(f"{config.start} (start): {difference}")
        closing.enter_context(jax.set_mesh(mesh))
        digest = weights_digest(model.params)
        run = Run(config, folder, mesh, model, given, perceptual, batches, checkpoints, images, log, digest, stop)
        index, trained, state = restore_run(run) if first else (0, dict(given.trees), None)
        for position in range(index, len(config.stages)):
            state = train_stage(run, position, trained, state if position == index else None)
            adapter = config.stages[position].adapter
            trained[adapter] = distributed.to_host(exported(state))
            require_finite(run, adapter, trained[adapter])
            if jax.process_index() == 0:
                export(run, trained)
    return folder / ADAPTERS_FILE


def train_stage(run: Run, index: int, trained: dict[str, AdapterTree], state: State | None) -> State:
    """Train one stage, from `state` or from its start, on top of the adapters `trained`; returns the last state."""
    config, stage, before = run.config, run.config.stages[index], run.before(index)
    specs = run.start.specs | {earlier.adapter: earlier.spec for earlier in config.stages}
    base, objective = run.model.base, make_objective(config, stage, specs)
    below = {name: trained[name] for name in stage.frozen}
    frozen = make_frozen(
        run.model,
        run.mesh,
        below,
        specs,
        negative_prompt=config.negative_prompt,
        perceptual=run.perceptual if stage.perceptual else None,
        teacher=bool(stage.csd),
        prompts=bool(config.data.prompts),
    )
    state = new_state(run, index, frozen.unet, below) if state is None else state
    optimizer = make_optimizer(config, stage, below)
    step_function = jit_train_step(base, objective, optimizer, frozen, run.mesh, state)
    upscale = jax.jit(
        functools.partial(validation.upscale_image, base=base, spec=stage.spec, specs_below=objective.below),
        out_shardings=distributed.replicated(run.mesh),
        compiler_options=compiler_options(),
    )

    def validate(step):
        if run.validation:
            weights = (frozen.unet, frozen.vae, state.adapter, frozen.null_prompt, frozen.below)
            log_validation(run, stage, step, functools.partial(upscale, *weights))

    key = jax.random.fold_in(jax.random.key(config.seed), index)
    step = int(state.step)
    if before + step == 0:  # the base model without any adapter
        validate(0)
    if stop_received(run):  # before the first step of this start, which would be compiled first
        raise Stop(f"stopped at step {before + step} of {run.total}; continue with --resume")
    while step < stage.steps:
        start = time.perf_counter()
        batch = place_batch(run, next(run.loader))
        if run.log:
            run.log.add_data_wait(time.perf_counter() - start)
        state, measured = step_function(frozen, state, batch, key)
        step += 1
        last = step == stage.steps
        if last or step % config.log_every == 0:
            log_step(run, stage, before + step, jax.device_get(measured))
        if last or step % config.validation.every == 0:
            validate(before + step)
        stop = asked_to_stop(run, before + step)
        if last or stop or step % config.save_every == 0:
            save(run, index, trained, state)
        if stop and before + step < run.total:
            raise Stop(f"stopped and saved at step {before + step} of {run.total}; continue with --resume")
    return state


def make_objective(config: Config, stage: Stage, specs: Mapping[str, AdapterSpec]) -> Objective:
    """Collect what the training step of a stage needs; `specs` are those of the adapters below it, at least."""
    return Objective(
        spec=stage.spec,
        l2=stage.l2,
        perceptual=stage.perceptual,
        csd=stage.csd,
        latent=stage.latent,
        latent_window=stage.latent_window,
        latents=config.data.source == "latents",
        guidance=config.guidance,
        csd_timesteps=config.csd_timesteps,
        accumulate=config.accumulate,
        remat=config.remat,
        ema=config.ema,
        below=tuple(specs[name] for name in stage.frozen if not fit.is_mergeable(specs[name])),
    )


def make_optimizer(
    config: Config, stage: Stage, below: Mapping[str, AdapterTree] = MappingProxyType({})
) -> optax.GradientTransformation:
    """Build AdamW with global-norm clipping and the learning-rate schedule of a stage, or what `stage.optimizer` makes.

    `below` are the frozen adapters; to restore a run, arrays of the same shapes.
    """
    b1, b2 = config.betas
    no_decay = registry.get_decomposition(stage.spec).no_decay
    decayed = functools.partial(select_factors, lambda name: name not in no_decay) if no_decay else None
    adamw = optax.adamw(learning_rate(stage), b1, b2, weight_decay=config.weight_decay, mask=decayed)
    default = optax.chain(optax.clip_by_global_norm(config.clip), adamw)
    return import_function(stage.optimizer)(default, below) if stage.optimizer else default


def learning_rate(stage: Stage) -> optax.Schedule:
    """Build the schedule: a linear increase from 0 over `warmup` steps, then constant or half a cosine down to 0."""
    peak = stage.learning_rate
    after = optax.constant_schedule(peak)
    if stage.schedule == "cosine":
        after = optax.cosine_decay_schedule(peak, stage.steps - stage.warmup)
    if stage.warmup == 0:  # optax's increase over 0 steps would stay at 0
        return after
    return optax.join_schedules([optax.linear_schedule(0.0, peak, stage.warmup), after], [stage.warmup])


def log_step(run: Run, stage: Stage, step: int, measured: dict[str, Any]) -> None:
    """Log the measurements of a step.

    Raises:
        FloatingPointError: too many steps in a row were not finite.
    """
    values = {name: float(value) for name, value in measured.items()}
    if run.log:
        run.log.log(step, {f"{stage.adapter}/{name}": value for name, value in values.items()})
    if values["bad_streak"] >= run.config.max_bad_steps:
        raise FloatingPointError(
            f"{values['bad_streak']:.0f} steps in a row, up to step {step}, had a loss or gradient that is not finite; "
            f"{how_to_continue(run)}"
        )


def log_validation(run: Run, stage: Stage, step: int, upscale: Any) -> None:
    """Measure the validation images; log the metrics and a contact sheet."""
    found, sheet = validation.evaluate(upscale, run.validation, run.perceptual, stage)
    if run.log:
        run.log.log_scalars(step, {f"validation/{name}": value for name, value in found.items()})
        run.log.log_image(step, "validation", sheet)
        values = ", ".join(f"{name} {value:.4f}" for name, value in found.items())
        run.log.print_line(f"step {step}: validation {values}")


def stop_received(run: Run) -> bool:
    """Return True if this process received a signal to stop."""
    return run.stop is not None and run.stop.received is not None


def asked_to_stop(run: Run, step: int) -> bool:
    """Return True if the run stops after this step because of a signal; several processes agree on one step."""
    return stop_received(run) if jax.process_count() == 1 else run.checkpoints.preempted(step)


def exported(state: State) -> AdapterTree:
    """Return the adapter that inference will use: the moving average where there is one."""
    return state.adapter if state.ema is None else state.ema


def save(run: Run, index: int, trained: dict[str, AdapterTree], state: State) -> None:
    """Save a checkpoint of stage `index`, with the adapters `trained` in earlier stages.

    Raises:
        FloatingPointError: the adapter is not finite: a run that continues from it could not recover.
        OSError: the checkpoint cannot be written.
    """
    adapter = run.config.stages[index].adapter
    for tree in (state.adapter, state.ema):
        if tree is not None:
            require_finite(run, adapter, distributed.to_host(tree))
    progress = Progress(index, run.loader.get_state(), run.digest)
    step = run.before(index) + int(state.step)
    run.checkpoints.save(step, {**trained, adapter: exported(state)}, state, progress)


def require_finite(run: Run, name: str, tree: AdapterTree) -> None:
    """Raise FloatingPointError if an adapter that would be saved or exported has values that are not finite."""
    if broken := list(dict.fromkeys(path for path, _ in fit.not_finite(tree))):
        raise FloatingPointError(
            f"adapter {name} has values that are not finite in {len(broken)} of {len(tree)} layers, such as "
            f"{broken[0]}, and is neither saved nor exported; {how_to_continue(run)}"
        )


def how_to_continue(run: Run) -> str:
    """Describe for an error message how to continue after values that are not finite."""
    latest = run.checkpoints.latest
    intact = "no checkpoint was written yet" if latest is None else f"checkpoint {latest} is intact"
    return f"{intact}; continue with --resume and a lower learning rate, or with float32"


def export(run: Run, trained: dict[str, AdapterTree]) -> None:
    """Write the trained adapters for inference."""
    stages = [stage for stage in run.config.stages if stage.adapter in trained]
    specs = run.start.specs | {stage.adapter: stage.spec for stage in stages}
    below = {**run.start.trained_on, **{stage.adapter: stage.frozen for stage in stages if stage.frozen}}
    adapters = Adapters(trained, specs, run.config.model, below, weights_digest(run.model.params["unet"]))
    files.save_adapters(run.folder / ADAPTERS_FILE, adapters)


def new_state(run: Run, index: int, unet: Any, below: Mapping[str, AdapterTree]) -> State:
    """Return the state before the first step of a stage on the weights `unet`, with large factors sharded."""
    # Not under jit: hundreds of draws inlined into one program take longer to compile than the draws themselves.
    adapter = jax.device_get(new_adapter(run, index, unet))
    make = functools.partial(make_state, run, index)
    layout = distributed.factor_shardings(run.mesh, jax.eval_shape(make, adapter, below))
    if run.config.stages[index].optimizer:
        # Not under jit: on CPUs, a program with many QR or singular value decompositions can wait for itself.
        return distributed.make_global_arrays(jax.device_get(make(adapter, below)), layout)
    adapter = distributed.make_global_arrays(adapter, distributed.factor_shardings(run.mesh, adapter))
    return jax.jit(make, out_shardings=layout)(adapter, below)


def new_adapter(run: Run, index: int, unet: Any) -> AdapterTree:
    """Return the adapter that a stage starts from; under `jax.eval_shape`, `unet` may be shapes."""
    stage = run.config.stages[index]
    key = jax.random.fold_in(jax.random.key(run.config.seed + 1), index)
    given = run.start.trees.get(stage.adapter)
    return injection.init_adapter(key, unet, stage.spec) if given is None else jax.tree.map(jnp.array, given)


def make_state(run: Run, index: int, adapter: AdapterTree, below: Mapping[str, AdapterTree]) -> State:
    """Make the state before the first step of a stage, which starts from `adapter` on top of the adapters `below`."""
    config, stage = run.config, run.config.stages[index]
    return init_state(adapter, make_optimizer(config, stage, below), ema=bool(config.ema), spec=stage.spec)


def restore_run(run: Run) -> tuple[int, dict[str, AdapterTree], State]:
    """Restore the newest sound checkpoint: its stage, the adapters finished before it, and the training state.

    Raises:
        ValueError: the checkpoint belongs to a longer run, or to another model, other data or adapters.
    """
    progress = run.checkpoints.progress()
    if progress.model not in (None, run.digest):
        raise ValueError(
            f"{run.config.model} is not the model of this run: its weights are {run.digest}, and checkpoint "
            f"{run.checkpoints.latest} was trained on {progress.model}; give the model that the run was started with"
        )
    if (latest := run.checkpoints.latest or 0) > run.total:
        raise ValueError(
            f"checkpoint {latest} is from a later step than the {run.total} steps of this run; move it to another "
            "folder to continue from an older one"
        )
    run.loader.set_state(progress.loader)

    def state_of(index):
        adapter = jax.eval_shape(functools.partial(new_adapter, run, index), run.model.params["unet"])
        below = {name: shapes[name] for name in run.config.stages[index].frozen}
        return jax.eval_shape(functools.partial(make_state, run, index), adapter, below)

    names = [stage.adapter for stage in run.config.stages[: progress.stage + 1]]
    shapes = dict(run.start.trees)
    for index, name in enumerate(names):  # a stage may be on top of those before it
        shapes[name] = exported(state_of(index))
    adapters, state = run.checkpoints.restore(
        *(distributed.factor_shapes(run.mesh, tree) for tree in (shapes, state_of(progress.stage)))
    )
    before = {name: tree for name, tree in adapters.items() if name != names[-1]}
    return progress.stage, distributed.to_host(before), state


def place_batch(run: Run, batch: dict[str, np.ndarray]) -> Batch:
    """Place the images of this process as its part of the global batch."""
    prompts = list(batch["prompt"])
    ids = run.model.tokenize(prompts) if run.config.data.prompts else np.zeros((len(prompts), 1), np.int32)
    layout = distributed.batch_sharding(run.mesh)
    arrays = Batch(batch["lq"], batch["gt"], ids, batch["use_prompt"])
    return jax.tree.map(lambda array: jax.make_array_from_process_local_data(layout, array), arrays)


def training_source(config: Data) -> sources.Source:
    """Open the source of training images that `config` names."""
    if config.source == "fake":
        return sources.fake_source(64, 2 * config.crop)
    if config.source == "list":
        return sources.list_source(config.path, config.hq_path, config.hq_probability)
    if config.source == "tfds":
        return tfds_source(config.path, config.split)
    kinds = {"folder": sources.folder_source, "pairs": sources.pair_source, "latents": latent_source}
    return kinds[config.source](config.path)


def training_loader(config: Config, model: LoadedModel | None = None) -> loader.Loader:
    """Build the loader for this process's share of the training batches."""
    source = training_source(config.data)
    batches = loader.make_loader(
        source,
        batch_size=config.batch_size // jax.process_count(),
        crop=crop_in_latents(config, source, model) if isinstance(source, LatentSource) else config.data.crop,
        seed=config.seed,
        degrade=degrade,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        workers=config.data.workers,
        prompts=loader.read_prompts(config.data.prompts) if config.data.prompts else None,
        null_prompt_probability=config.data.null_prompt_probability,
        max_bad_share=config.data.max_bad_share,
        min_size_share=config.data.min_size_share,
    )
    batches.check_files()
    return batches
