"""The record of a training run that its stages share: its optimizers, its states, and its files."""

import functools
import signal
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from pisa_jax.adapters import files, fit, injection, registry
from pisa_jax.adapters.adapter_tree import Adapters, AdapterTree, select_factors
from pisa_jax.config import AdapterSpec, Config, Stage
from pisa_jax.data.loader import Loader
from pisa_jax.metrics.validation import ValidationImage
from pisa_jax.model import LoadedModel
from pisa_jax.runtime import distributed
from pisa_jax.runtime.checkpoint import Checkpoints, Progress
from pisa_jax.runtime.imports import import_function
from pisa_jax.runtime.performance import DataWait
from pisa_jax.runtime.profiling import Profiler
from pisa_jax.runtime.remote_paths import AnyPath, uploaded
from pisa_jax.runtime.run_directory import require_run_directory
from pisa_jax.runtime.run_log import RunLog
from pisa_jax.runtime.stop_step import StopStep
from pisa_jax.runtime.watchdog import Watchdog
from pisa_jax.runtime.weights_digest import weights_digest
from pisa_jax.train_step import Objective, State, init_state

ADAPTERS_FILE = "adapters.safetensors"
# The adapters of the best checkpoint, with `config.keep_best`.
BEST_FILE = "best.safetensors"


class Stop(Exception):
    """The run was asked to stop, and its state is saved; `number` is the signal."""

    def __init__(self, message: str, number: signal.Signals | None = None):
        super().__init__(message)
        self.number = number


class Run(NamedTuple):
    """Everything that the stages of a run share."""

    config: Config
    folder: AnyPath
    mesh: jax.sharding.Mesh
    model: LoadedModel
    # `weights_digest` of all parts of the model.
    digest: str
    # Adapters that the run starts from; none without `config.start`.
    start: Adapters
    # Weights of the perceptual loss on the devices; None if no stage uses it.
    perceptual: Any
    loader: Loader
    checkpoints: Checkpoints
    validation: list[ValidationImage]
    # None in all processes but the first.
    log: RunLog | None
    stop: StopStep
    watchdog: Watchdog
    profiler: Profiler
    wait: DataWait

    @property
    def total(self) -> int:
        """Steps of all stages."""
        return sum(stage.steps for stage in self.config.stages)

    def before(self, index: int) -> int:
        """Steps of the stages before stage `index`."""
        return sum(stage.steps for stage in self.config.stages[:index])


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


def specs_of(config: Config, start: Adapters) -> dict[str, AdapterSpec]:
    """Return the specifications of all adapters of a run that starts from the adapters `start`."""
    return start.specs | {stage.adapter: stage.spec for stage in config.stages}


def learning_rate(stage: Stage) -> optax.Schedule:
    """Build the schedule: a linear increase from 0 over `warmup` steps, then constant or half a cosine down to 0."""
    peak = stage.learning_rate
    after = optax.constant_schedule(peak)
    if stage.schedule == "cosine":
        after = optax.cosine_decay_schedule(peak, stage.steps - stage.warmup)
    if stage.warmup == 0:  # optax's increase over 0 steps would stay at 0
        return after
    return optax.join_schedules([optax.linear_schedule(0.0, peak, stage.warmup), after], [stage.warmup])


def new_state(run: Run, index: int, unet: Any, below: Mapping[str, AdapterTree]) -> State:
    """Return the state before the first step of a stage on the weights `unet`, with large factors sharded."""
    # Not under jit: hundreds of draws inlined into one program take longer to compile than the draws themselves.
    adapter = jax.device_get(new_adapter(run.config, index, run.start.trees, unet))
    make = functools.partial(make_state, run.config, index)
    layout = distributed.factor_shardings(run.mesh, jax.eval_shape(make, adapter, below))
    if run.config.stages[index].optimizer:
        # Not under jit: on CPUs, a program with many QR or singular value decompositions can wait for itself.
        return distributed.make_global_arrays(jax.device_get(make(adapter, below)), layout)
    adapter = distributed.make_global_arrays(adapter, distributed.factor_shardings(run.mesh, adapter))
    return jax.jit(make, out_shardings=layout)(adapter, below)


def new_adapter(config: Config, index: int, start: Mapping[str, AdapterTree], unet: Any) -> AdapterTree:
    """Return the adapter that a stage starts from; under `jax.eval_shape`, `unet` may be shapes.

    `start` has the adapters that the run starts from.
    """
    stage = config.stages[index]
    key = jax.random.fold_in(jax.random.key(config.seed + 1), index)
    given = start.get(stage.adapter)
    return injection.init_adapter(key, unet, stage.spec) if given is None else jax.tree.map(jnp.array, given)


def make_state(config: Config, index: int, adapter: AdapterTree, below: Mapping[str, AdapterTree]) -> State:
    """Make the state before the first step of a stage, which starts from `adapter` on top of the adapters `below`."""
    stage = config.stages[index]
    return init_state(adapter, make_optimizer(config, stage, below), ema=bool(config.ema), spec=stage.spec)


def adapter_shapes(config: Config, count: int, start: Mapping[str, AdapterTree], unet: Any) -> dict[str, AdapterTree]:
    """Return the shapes of all adapters after the first `count` stages; `start` as for `new_adapter`."""
    found = dict(start)
    for index, stage in enumerate(config.stages[:count]):
        found[stage.adapter] = jax.eval_shape(functools.partial(new_adapter, config, index, start), unet)
    return found


def state_shapes(config: Config, index: int, start: Mapping[str, AdapterTree], unet: Any) -> State:
    """Return the shapes of the state of a stage; `start` as for `new_adapter`."""
    before = adapter_shapes(config, index, start, unet)
    below = {name: before[name] for name in config.stages[index].frozen}
    adapter = jax.eval_shape(functools.partial(new_adapter, config, index, start), unet)
    return jax.eval_shape(functools.partial(make_state, config, index), adapter, below)


def exported(state: State) -> AdapterTree:
    """Return the adapter that inference will use: the moving average where there is one."""
    return state.adapter if state.ema is None else state.ema


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

    given, unet = run.start.trees, run.model.params["unet"]

    names = [stage.adapter for stage in run.config.stages[: progress.stage + 1]]
    shapes = (
        adapter_shapes(run.config, len(names), given, unet),
        state_shapes(run.config, progress.stage, given, unet),
    )
    adapters, state = run.checkpoints.restore(*(distributed.factor_shapes(run.mesh, tree) for tree in shapes))
    before = {name: tree for name, tree in adapters.items() if name != names[-1]}
    return progress.stage, distributed.to_host(before), state


def save(
    run: Run, index: int, trained: dict[str, AdapterTree], state: State, metrics: dict[str, float] | None = None
) -> None:
    """Save a checkpoint of stage `index`, with the adapters `trained` in earlier stages; export it if it is the best.

    `metrics` are those of a validation at this step.

    Raises:
        FloatingPointError: the adapter is not finite: a run that continues from it could not recover.
        OSError: the checkpoint cannot be written, or a program that was started later uses the run directory.
    """
    require_run_directory(run.config)
    adapter = run.config.stages[index].adapter
    for tree in (state.adapter, state.ema):
        if tree is not None:
            require_finite(run, adapter, distributed.to_host(tree))
    progress = Progress(index, run.loader.get_state(), run.digest)
    step = run.before(index) + int(state.step)
    run.checkpoints.save(step, {**trained, adapter: exported(state)}, state, progress, metrics)
    if run.checkpoints.best == step:
        best = distributed.to_host(exported(state))  # of all processes
        if jax.process_index() == 0:
            export(run, {**trained, adapter: best}, BEST_FILE)


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


def export(run: Run, trained: dict[str, AdapterTree], name: str = ADAPTERS_FILE) -> None:
    """Write the trained adapters for inference."""
    stages = [stage for stage in run.config.stages if stage.adapter in trained]
    specs = run.start.specs | {stage.adapter: stage.spec for stage in stages}
    below = {**run.start.trained_on, **{stage.adapter: stage.frozen for stage in stages if stage.frozen}}
    digest = weights_digest(run.model.params["unet"])
    with uploaded(run.folder / name) as file:
        files.save_adapters(file, Adapters(trained, specs, run.config.model, below, digest))
