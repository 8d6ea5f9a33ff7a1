"""Training: one loop over a list of stages, from images to adapters."""

import contextlib
import importlib.metadata
from typing import Any, Literal, NamedTuple

import jax

from pisa_jax.adapters import fit, injection
from pisa_jax.adapters.adapter_tree import Adapters
from pisa_jax.adapters.start import load_start
from pisa_jax.config import Config, Data
from pisa_jax.data import loader, sources
from pisa_jax.data.degradation import degrade
from pisa_jax.data.latents import LatentSource, latent_source
from pisa_jax.data.prompts import report_long_prompts
from pisa_jax.data.tfds import tfds_source
from pisa_jax.data.workers import default_workers
from pisa_jax.metrics import validation
from pisa_jax.model import LoadedModel
from pisa_jax.runtime import distributed
from pisa_jax.runtime.agreement import agreement
from pisa_jax.runtime.checkpoint import Checkpoints
from pisa_jax.runtime.failures import publishing_errors
from pisa_jax.runtime.performance import DataWait
from pisa_jax.runtime.profiling import Profiler
from pisa_jax.runtime.remote_paths import AnyPath
from pisa_jax.runtime.run_directory import (
    check_run_directory,
    claim_run_directory,
    config_fields,
    holds_run,
    use_compilation_cache,
)
from pisa_jax.runtime.run_log import RunLog
from pisa_jax.runtime.stop_signals import StopSignals
from pisa_jax.runtime.stop_step import StopStep
from pisa_jax.runtime.watchdog import Watchdog
from pisa_jax.runtime.weights_digest import weights_digest
from pisa_jax.tiling.host_memory import return_freed_memory
from pisa_jax.training_compile import Programs, compile_stage, explain_out_of_memory, shapes_of
from pisa_jax.training_loop import outside_steps, stop_before, train_stage
from pisa_jax.training_mesh import check_mesh
from pisa_jax.training_model import (
    check,
    crop_in_latents,
    load_model,
    load_perceptual,
    make_random_model,
    random_shapes,
)
from pisa_jax.training_run import ADAPTERS_FILE, Run, Stop, export, exported, require_finite, restore_run
from pisa_jax.weights import base_difference

# Packages whose versions must be equal in all processes of a run.
PACKAGES = ("pisa_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "diffusers", "numpy", "pillow")


class Inputs(NamedTuple):
    """What a process opens before the run directory is touched."""

    mesh: jax.sharding.Mesh
    loader: loader.Loader
    # Adapters that the run starts from.
    start: Adapters
    validation: list[validation.ValidationImage]
    perceptual: Any
    # None: the random model, which is made in the run directory.
    model: LoadedModel | None


def train(
    config: Config,
    resume: bool | Literal["auto"] = False,
    overwrite: bool = False,
    *,
    model: LoadedModel | None = None,
    stop: StopSignals | None = None,
    watchdog: Watchdog | None = None,
) -> AnyPath:
    """Train all stages, or the rest of a resumed run; returns the path of the exported adapters.

    `resume="auto"` resumes the run in `config.out` if there is one. `model` takes the place of the one that
    `config.model` names. The run is saved and ends after `stop` of any process has received a signal. `watchdog`
    receives a beat after every step.

    Raises:
        ValueError, OSError: unusable input, before anything is trained.
        Refused: unusable input in another process, or processes with different inputs.
        FloatingPointError: too many steps in a row were not finite, or the trained adapter is not.
        Stop: a signal was received and the run is saved.
    """
    with contextlib.ExitStack() as closing:  # each is closed, whatever the others raise
        use_compilation_cache(config)
        # Validate everything before creating the run directory, and refuse one that is in use before loading anything.
        with agreement() as facts:
            facts |= package_versions() | config_fields(config)
            resume = holds_run(config) if resume == "auto" else resume
            check_run_directory(config, resume, overwrite)
            inputs = open_inputs(config, model, closing)
            facts |= {f"the training data's {name}": value for name, value in inputs.loader.fingerprint.items()}
        with publishing_errors(but=Stop):
            ending = closing.enter_context(StopStep(stop)), watchdog or Watchdog(0, expired=lambda: None)
            run, first = start_run(config, resume, overwrite, inputs, ending, closing)
            index, trained, state = restore_run(run) if first else (0, dict(run.start.trees), None)
            programs = compile_stages(run, index, first)
            for position in range(index, len(config.stages)):
                stage = config.stages[position]
                with explain_out_of_memory(config, run.mesh, f"stage {stage.adapter}"):
                    state = train_stage(run, position, trained, state, programs.pop(position))
                trained[stage.adapter], state = distributed.to_host(exported(state)), None
                require_finite(run, stage.adapter, trained[stage.adapter])
                if jax.process_index() == 0:
                    export(run, trained)
    return run.folder / ADAPTERS_FILE


def compile_stages(run: Run, index: int, step: int) -> dict[int, Programs]:
    """Compile the stages from `index` on before anything is trained, so that none of them fails hours later.

    Raises:
        ValueError: a stage does not fit into the memory of a device.
        Stop: a signal was received.
    """
    shapes, programs = shapes_of(run.model, run.perceptual), {}
    for position in range(index, len(run.config.stages)):
        stop_before(run, step)
        with outside_steps(run):
            programs[position] = compile_stage(run.config, position, shapes, run.mesh, run.start, bool(run.validation))
    return_freed_memory()  # compilation needs as much memory on the host as a step of a small model
    return programs


def open_inputs(config: Config, model: LoadedModel | None, closing: contextlib.ExitStack) -> Inputs:
    """Open and check all inputs of a run; `closing` closes the loader."""
    mesh = distributed.make_mesh(config.mesh_data, config.mesh_fsdp)
    check_mesh(config, mesh, model)
    batches, given = training_loader(config, mesh, model), load_start(config)
    closing.callback(batches.close)
    images = validation.validation_images(config.validation, config.data.crop)
    perceptual = load_perceptual(config, mesh)
    if model is None and config.model != "random":
        model = load_model(config, config.model)
    base, unet = (model.base, model.params["unet"]) if model else random_shapes()
    check(config, base, unet)
    if given.trees:
        fit.check_adapters(given.trees, given.specs, injection.target_shapes(unet))
    return Inputs(mesh, batches, given, images, perceptual, model)


def start_run(
    config: Config,
    resume: bool,
    overwrite: bool,
    inputs: Inputs,
    ending: tuple[StopStep, Watchdog],
    closing: contextlib.ExitStack,
) -> tuple[Run, int]:
    """Claim the run directory and open what is in it; returns the run and the step after which it continues."""
    folder = claim_run_directory(config, resume, overwrite, closing)
    model = inputs.model or load_model(config, make_random_model(config, folder, closing))
    if inputs.loader.prompts and jax.process_index() == 0:
        report_long_prompts(inputs.loader.prompts, model.count_tokens, model.tokenize([""]).shape[1])
    checkpoints = Checkpoints(folder, config.keep, config.keep_best)
    closing.callback(checkpoints.close)
    first = (checkpoints.recover() or 0) if resume else 0
    total = sum(stage.steps for stage in config.stages)
    log = RunLog(folder, config.batch_size, total, first) if jax.process_index() == 0 else None
    if log:
        closing.callback(log.close)
        if resume:
            log.print_line(f"continuing after step {first} of {total}")
        if difference := base_difference(model, inputs.start):
            log.print_line(f"{config.start} (start): {difference}")
    closing.enter_context(jax.set_mesh(inputs.mesh))
    profiler = closing.enter_context(Profiler(folder / "tensorboard", config.profile_steps))
    mesh, batches, start, images, perceptual, _ = inputs
    digest, watching = weights_digest(model.params), (*ending, profiler, DataWait())
    run = Run(config, folder, mesh, model, digest, start, perceptual, batches, checkpoints, images, log, *watching)
    return run, first


def package_versions() -> dict[str, str]:
    """Return the versions of the installed packages that the results of a step depend on."""
    found = {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # a checkout that is not installed
            found[f"the version of {name}"] = importlib.metadata.version(name)
    return found


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


def training_loader(config: Config, mesh: jax.sharding.Mesh, model: LoadedModel | None = None) -> loader.Loader:
    """Build the loader for this process's share of the training batches."""
    source, workers = training_source(config.data), config.data.workers
    if workers is None:
        workers = default_workers(len(jax.local_devices()))
    batches = loader.make_loader(
        source,
        batch_size=config.batch_size,
        crop=crop_in_latents(config, source, model) if isinstance(source, LatentSource) else config.data.crop,
        seed=config.seed,
        degrade=degrade,
        rows=distributed.batch_rows(mesh, config.batch_size),
        workers=workers,
        prompts=loader.read_prompts(config.data.prompts) if config.data.prompts else None,
        null_prompt_probability=config.data.null_prompt_probability,
        max_bad_share=config.data.max_bad_share,
        min_size_share=config.data.min_size_share,
    )
    batches.check_files()
    return batches
