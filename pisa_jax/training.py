"""Training: one loop over a list of stages, from pictures to adapters."""

import contextlib
import functools
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from pisa_jax import losses, train_step, validation
from pisa_jax.adapters import files, injection, registry
from pisa_jax.adapters.adapter_tree import Adapters, AdapterTree
from pisa_jax.config import Config, Data, Stage
from pisa_jax.data import loader, sources
from pisa_jax.data.degradation import degrade
from pisa_jax.data.tfds import tfds_source
from pisa_jax.metrics import lpips
from pisa_jax.runtime import distributed, run_log
from pisa_jax.runtime.checkpoint import Checkpoints, Progress, claim_run_directory
from pisa_jax.runtime.compilation import compiler_options
from pisa_jax.sd import backbone as bb
from pisa_jax.sd import pretrained, random_model
from pisa_jax.train_step import Batch, Frozen, State

ADAPTERS_FILE = "adapters.safetensors"
# What `model="random"` makes.
RANDOM_SIZE = "nano"


class Stop(Exception):
    """The run was told to stop, and has saved."""


class Run(NamedTuple):
    """What all stages of a run share."""

    config: Config
    folder: Path
    mesh: jax.sharding.Mesh
    model: pretrained.Pretrained
    # Weights of the perceptual distance, on the devices; None if no stage uses it.
    perceptual: Any
    loader: loader.Loader
    checkpoints: Checkpoints
    validation: list[validation.Pair]
    # None in all processes but the first.
    watcher: run_log.RunLog | None
    terminated: threading.Event

    @property
    def total(self) -> int:
        """Steps of all stages."""
        return sum(stage.steps for stage in self.config.stages)

    def before(self, index: int) -> int:
        """Steps of the stages before one."""
        return sum(stage.steps for stage in self.config.stages[:index])


def run(config: Config, resume: bool = False, overwrite: bool = False) -> Path:
    """Train all stages, or what is left of them; the file with the adapters.

    Raises:
        ValueError, OSError: what cannot be used, before anything is trained.
        FloatingPointError: too many steps in a row were not finite. Stop: SIGTERM came and the run was saved.
    """
    terminated = _on_sigterm()
    # What can be wrong is looked at before the folder is touched.
    mesh = distributed.make_mesh(config.mesh_data, config.mesh_fsdp)
    loader, pairs = make_loader(config), validation.validation_pairs(config.validation, config.data.crop)
    perceptual = load_perceptual(config, mesh)
    model = None if config.model == "random" else load_model(config, config.model)
    check(config, model.backbone if model else bb.build_modules(*random_model.model_configs(RANDOM_SIZE)), mesh)
    folder = claim_run_directory(config, resume, overwrite)
    model = model or load_model(config, make_random_model(config, folder))
    checkpoints = Checkpoints(folder)
    first = (checkpoints.latest or 0) if resume else 0
    total = sum(stage.steps for stage in config.stages)
    watcher = run_log.RunLog(folder, config.batch_size, total, first) if jax.process_index() == 0 else None
    this = Run(config, folder, mesh, model, perceptual, loader, checkpoints, pairs, watcher, terminated)
    with contextlib.ExitStack() as closing:  # each, whatever the others raise
        for opened in (watcher, checkpoints, loader) if watcher else (checkpoints, loader):
            closing.callback(opened.close)
        closing.enter_context(jax.set_mesh(mesh))
        index, trained, state = restore(this) if first else (0, {}, None)
        for position in range(index, len(config.stages)):
            state = train_stage(this, position, trained, state if position == index else None)
            trained[config.stages[position].adapter] = jax.device_get(exported(state))
            if jax.process_index() == 0:
                export(this, trained)
    return folder / ADAPTERS_FILE


def train_stage(run: Run, index: int, trained: dict[str, AdapterTree], state: State | None) -> State:
    """Train one stage from `state`, or from its start, on top of the adapters `trained`; the last state."""
    config, stage, before = run.config, run.config.stages[index], run.before(index)
    state = new_state(run, index) if state is None else state
    frozen = place_frozen(run, stage, trained)
    step_function = compile_step(run, stage, frozen)
    view = jax.jit(
        functools.partial(validation.restore, backbone=run.model.backbone, stage=stage),
        out_shardings=distributed.replicated(run.mesh),
        compiler_options=compiler_options(),
    )
    key = jax.random.fold_in(jax.random.key(config.seed), index)
    step = int(state.step)
    if run.validation and before + step == 0:  # what the base model alone gives
        validate(run, stage, 0, functools.partial(view, frozen, state.adapter))
    while step < stage.steps:
        start = time.perf_counter()
        batch = place_batch(run, next(run.loader))
        if run.watcher:
            run.watcher.add_data_wait(time.perf_counter() - start)
        state, measured = step_function(frozen, state, batch, key)
        step += 1
        last = step == stage.steps
        if last or step % config.log_every == 0:
            report(run, stage, before + step, jax.device_get(measured))
        if run.validation and (last or step % config.validation.every == 0):
            validate(run, stage, before + step, functools.partial(view, frozen, state.adapter))
        stop = told_to_stop(run, before + step)
        if last or stop or step % config.save_every == 0:
            adapters = {**trained, stage.adapter: exported(state)}
            run.checkpoints.save(before + step, adapters, state, Progress(index, run.loader.get_state()))
        if stop and before + step < run.total:
            raise Stop(f"stopped and saved at step {before + step} of {run.total}; go on with --resume")
    return state


def report(run: Run, stage: Stage, step: int, measured: dict[str, Any]) -> None:
    """Log what a step measured.

    Raises:
        FloatingPointError: too many steps in a row were not finite.
    """
    values = {name: float(value) for name, value in measured.items()}
    if run.watcher:
        run.watcher.log(step, {f"{stage.adapter}/{name}": value for name, value in values.items()})
    if values["bad_streak"] >= run.config.max_bad_steps:
        latest = run.checkpoints.latest
        intact = "No checkpoint was written yet" if latest is None else f"Checkpoint {latest} is intact"
        raise FloatingPointError(
            f"{values['bad_streak']:.0f} steps in a row, up to step {step}, had a loss or gradient that is not finite. "
            f"{intact}; lower the learning rate, or use float32"
        )


def validate(run: Run, stage: Stage, step: int, restore: Any) -> None:
    """Measure the validation pictures and log figures and pictures."""
    found, sheet = validation.validate(restore, run.validation, run.perceptual, stage)
    if run.watcher:
        run.watcher.log_scalars(step, {f"validation/{name}": value for name, value in found.items()})
        run.watcher.log_image(step, sheet)
        run.watcher.print(
            f"step {step}: validation " + ", ".join(f"{name} {value:.4f}" for name, value in found.items())
        )


def told_to_stop(run: Run, step: int) -> bool:
    """Whether SIGTERM came; several processes agree on one step."""
    if jax.process_count() == 1:
        return run.terminated.is_set()
    return run.checkpoints.preempted(step)


def _on_sigterm() -> threading.Event:
    event = threading.Event()
    # With several processes, jax.distributed listens itself and the processes agree on a step.
    if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, lambda *_: event.set())
    return event


def exported(state: State) -> AdapterTree:
    """The adapter that is used later: the average, where there is one."""
    return state.adapter if state.ema is None else state.ema


def export(run: Run, trained: dict[str, AdapterTree]) -> None:
    """Write the adapters for `infer.py`."""
    specs = {stage.adapter: stage.spec for stage in run.config.stages if stage.adapter in trained}
    files.save_adapters(run.folder / ADAPTERS_FILE, Adapters(trained, specs, run.config.model))


def new_state(run: Run, index: int) -> State:
    """The state before a stage's first step, on every device."""
    # Not under jit: hundreds of draws inlined into one program take longer to compile than the draws themselves.
    state = _state_maker(run, index)()
    return distributed.make_global_arrays(
        jax.device_get(state), jax.tree.map(lambda _: distributed.replicated(run.mesh), state)
    )


def _state_maker(run: Run, index: int) -> Any:
    stage, key = run.config.stages[index], jax.random.fold_in(jax.random.key(run.config.seed + 1), index)
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.float32), run.model.params["unet"])
    return lambda: train_step.init_state(injection.init_adapter(key, shapes, stage.spec), run.config, stage)


def restore(run: Run) -> tuple[int, dict[str, AdapterTree], State]:
    """The stage that the newest checkpoint is in, the adapters finished before it, and its state."""
    progress = run.checkpoints.progress()
    run.loader.set_state(progress.loader)
    everywhere = distributed.replicated(run.mesh)

    def abstract(index):
        shapes = jax.eval_shape(_state_maker(run, index))
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=everywhere), shapes)

    names = [stage.adapter for stage in run.config.stages[: progress.stage + 1]]
    shapes = {name: exported(abstract(index)) for index, name in enumerate(names)}
    adapters, state = run.checkpoints.restore(shapes, abstract(progress.stage))
    return progress.stage, jax.device_get({name: adapters[name] for name in names[:-1]}), state


def place_frozen(run: Run, stage: Stage, trained: dict[str, AdapterTree]) -> Frozen:
    """The weights that a stage needs, cut over the mesh, earlier adapters merged in."""
    config, backbone = run.config, run.model.backbone
    specs = {s.adapter: s.spec for s in config.stages}
    merged = {name: trained[name] for name in stage.frozen}

    def place(part, dtype):
        host = run.model.params[part]
        return distributed.make_global_arrays(host, distributed.weight_shardings(run.mesh, host), dtype)

    base, text = place("unet", config.dtype), place("text", "float32")
    encode = jax.jit(functools.partial(bb.encode_text, backbone))
    null, negative = (
        encode(text, jnp.asarray(run.model.tokenize([prompt]))) for prompt in ("", config.negative_prompt)
    )
    return Frozen(
        unet=injection.merge(base, merged, specs, dict.fromkeys(merged, 1.0)) if merged else base,
        teacher=base if stage.csd else None,
        vae=place("vae", config.vae_dtype),
        text=text if config.data.prompts else None,
        null_prompt=null,
        negative_prompt=negative,
        perceptual=run.perceptual if stage.perceptual else None,
        alphas_cumprod=_schedule(run.model.schedule).alphas_cumprod,
    )


def _schedule(described: dict[str, Any]) -> losses.Schedule:
    if described.get("beta_schedule", "scaled_linear") != "scaled_linear":
        raise ValueError(f"the model's scheduler has beta_schedule {described['beta_schedule']!r}, not 'scaled_linear'")
    names = {"beta_start": "beta_start", "beta_end": "beta_end", "num_train_timesteps": "steps"}
    return losses.ddpm_schedule(**{ours: described[theirs] for theirs, ours in names.items() if theirs in described})


def compile_step(run: Run, stage: Stage, frozen: Frozen) -> Any:
    """`train_step.train_step` for this stage: weights as they lie, the batch over all devices, the state donated."""
    everywhere = distributed.replicated(run.mesh)
    step = functools.partial(train_step.train_step, backbone=run.model.backbone, config=run.config, stage=stage)
    return jax.jit(
        step,
        in_shardings=(
            jax.tree.map(lambda leaf: leaf.sharding, frozen),
            everywhere,
            distributed.batch_sharding(run.mesh),
            None,
        ),
        out_shardings=(everywhere, everywhere),
        donate_argnums=1,
        compiler_options=compiler_options(),
    )


def place_batch(run: Run, batch: dict[str, np.ndarray]) -> Batch:
    """This process's pictures as its part of the global batch."""
    prompts = list(batch["prompt"])
    ids = run.model.tokenize(prompts) if run.config.data.prompts else np.zeros((len(prompts), 1), np.int32)
    layout = distributed.batch_sharding(run.mesh)
    arrays = Batch(batch["lq"], batch["gt"], ids, batch["use_prompt"])
    return jax.tree.map(lambda array: jax.make_array_from_process_local_data(layout, array), arrays)


def load_model(config: Config, model: str | Path) -> pretrained.Pretrained:
    """A base model that computes in the run's dtypes."""
    return pretrained.load_pretrained(model, jnp.dtype(config.dtype), jnp.dtype(config.vae_dtype))


def make_random_model(config: Config, folder: Path) -> Path:
    """A folder in the run's folder with a random base model, made by one process if it is not there."""
    made = folder / "model"
    if jax.process_index() == 0 and not made.exists():
        unfinished = made.with_suffix(".part")  # of a run that was killed here, or ours
        shutil.rmtree(unfinished, ignore_errors=True)
        random_model.write_random_model(unfinished, RANDOM_SIZE, config.seed)
        unfinished.rename(made)
    multihost_utils.sync_global_devices("model written")
    return made


def load_perceptual(config: Config, mesh: jax.sharding.Mesh) -> Any:
    """Weights of the perceptual distance on every device, or None where no stage uses it."""
    if not any(stage.perceptual for stage in config.stages):
        return None
    weights = lpips.load_weights(config.perceptual_weights, config.perceptual)
    if jax.process_index() == 0:
        print(f"perceptual loss: {lpips.describe(weights)}")
    return jax.tree.map(lambda leaf: distributed.make_global_arrays(leaf, distributed.replicated(mesh)), weights)


def make_source(config: Data) -> sources.Source:
    """The pictures that `config` names."""
    if config.source == "fake":
        return sources.fake_source(64, 2 * config.crop)
    if config.source == "list":
        return sources.list_source(config.path, config.hq_path, config.hq_probability)
    if config.source == "tfds":
        return tfds_source(config.path, config.split)
    return {"folder": sources.folder_source, "pairs": sources.pair_source}[config.source](config.path)


def make_loader(config: Config) -> loader.Loader:
    """This process's share of the training batches."""
    return loader.make_loader(
        make_source(config.data),
        batch_size=config.batch_size // jax.process_count(),
        crop=config.data.crop,
        seed=config.seed,
        degrade=degrade,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        workers=config.data.workers,
        prompts=loader.read_prompts(config.data.prompts) if config.data.prompts else None,
        null_prompt_probability=config.data.null_prompt_probability,
        max_bad_share=config.data.max_bad_share,
    )


def check(config: Config, backbone: bb.Backbone, mesh: jax.sharding.Mesh) -> None:
    """ValueError unless adapters are known, crops fit VAE and losses, and batches can be cut over the devices."""
    if config.data.crop % backbone.vae_scale_factor:
        raise ValueError(
            f"data.crop {config.data.crop} is not a multiple of {backbone.vae_scale_factor}, the VAE's factor"
        )
    latents = config.data.crop // backbone.vae_scale_factor
    for stage in config.stages:
        registry.get_decomposition(stage.spec)
        if stage.latent_window > latents:
            raise ValueError(
                f"stage {stage.adapter}: latent_window {stage.latent_window} is more than the {latents} latents along "
                f"a crop of {config.data.crop} pixels"
            )
    parts = mesh.size * config.accumulate
    if config.batch_size % parts:
        raise ValueError(
            f"batch_size {config.batch_size} cannot be cut over {mesh.size} devices x accumulate "
            f"{config.accumulate}: give a multiple of {parts}"
        )
