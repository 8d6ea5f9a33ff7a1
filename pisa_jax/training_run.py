"""The record of a training run that its stages share: its optimizers, its states, and its files."""

import functools
import signal
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from pisa_jax.adapters import files, fit, injection, registry
from pisa_jax.adapters.adapter_tree import Adapters, AdapterTree, select_factors
from pisa_jax.config import Config, Stage
from pisa_jax.data.loader import Loader
from pisa_jax.metrics.validation import ValidationImage
from pisa_jax.model import LoadedModel
from pisa_jax.runtime import distributed
from pisa_jax.runtime.checkpoint import Checkpoints, Progress
from pisa_jax.runtime.performance import DataWait
from pisa_jax.runtime.profiling import Profiler
from pisa_jax.runtime.remote_paths import uploaded
from pisa_jax.runtime.run_directory import require_run_directory
from pisa_jax.runtime.run_log import RunLog
from pisa_jax.runtime.stop_step import StopStep
from pisa_jax.runtime.watchdog import Watchdog
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
    folder: Path
    mesh: jax.sharding.Mesh
    model: LoadedModel
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


def make_objective(config: Config, stage: Stage) -> Objective:
    """Collect what the training step of a stage needs."""
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
    )


def make_optimizer(config: Config, stage: Stage) -> optax.GradientTransformation:
    """Build AdamW with global-norm clipping and the learning-rate schedule of a stage."""
    b1, b2 = config.betas
    no_decay = registry.get_decomposition(stage.spec).no_decay
    decayed = functools.partial(select_factors, lambda name: name not in no_decay) if no_decay else None
    adamw = optax.adamw(learning_rate(stage), b1, b2, weight_decay=config.weight_decay, mask=decayed)
    return optax.chain(optax.clip_by_global_norm(config.clip), adamw)


def learning_rate(stage: Stage) -> optax.Schedule:
    """Build the schedule: a linear increase from 0 over `warmup` steps, then constant or half a cosine down to 0."""
    peak = stage.learning_rate
    after = optax.constant_schedule(peak)
    if stage.schedule == "cosine":
        after = optax.cosine_decay_schedule(peak, stage.steps - stage.warmup)
    if stage.warmup == 0:  # optax's increase over 0 steps would stay at 0
        return after
    return optax.join_schedules([optax.linear_schedule(0.0, peak, stage.warmup), after], [stage.warmup])


def new_state(run: Run, index: int, unet: Any) -> State:
    """Return the state before the first step of a stage on the weights `unet`, replicated over the devices."""
    # Not under jit: hundreds of draws inlined into one program take longer to compile than the draws themselves.
    state = make_state(run, index, unet)
    return distributed.make_global_arrays(
        jax.device_get(state), jax.tree.map(lambda _: distributed.replicated(run.mesh), state)
    )


def make_state(run: Run, index: int, unet: Any) -> State:
    """Make the state before the first step of a stage; under `jax.eval_shape`, `unet` may be shapes."""
    config, stage = run.config, run.config.stages[index]
    key = jax.random.fold_in(jax.random.key(config.seed + 1), index)
    given = run.start.trees.get(stage.adapter)
    adapter = injection.init_adapter(key, unet, stage.spec) if given is None else jax.tree.map(jnp.array, given)
    return init_state(adapter, make_optimizer(config, stage), ema=bool(config.ema), spec=stage.spec)


def exported(state: State) -> AdapterTree:
    """Return the adapter that inference will use: the moving average where there is one."""
    return state.adapter if state.ema is None else state.ema


def restore_run(run: Run) -> tuple[int, dict[str, AdapterTree], State]:
    """Restore the newest sound checkpoint: its stage, the adapters finished before it, and the training state.

    Raises:
        ValueError: the checkpoint belongs to a longer run, or to other data or adapters.
    """
    progress = run.checkpoints.progress()
    if (latest := run.checkpoints.latest or 0) > run.total:
        raise ValueError(
            f"checkpoint {latest} is from a later step than the {run.total} steps of this run; move it to another "
            "folder to continue from an older one"
        )
    run.loader.set_state(progress.loader)
    replicated = distributed.replicated(run.mesh)

    def abstract(index):
        shapes = jax.eval_shape(functools.partial(make_state, run, index), run.model.params["unet"])
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=replicated), shapes)

    names = [stage.adapter for stage in run.config.stages[: progress.stage + 1]]
    shapes = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=replicated), run.start.trees
    )
    shapes |= {name: exported(abstract(index)) for index, name in enumerate(names)}
    adapters, state = run.checkpoints.restore(shapes, abstract(progress.stage))
    return progress.stage, jax.device_get({name: tree for name, tree in adapters.items() if name != names[-1]}), state


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
            require_finite(run, adapter, jax.device_get(tree))
    progress = Progress(index, run.loader.get_state())
    step = run.before(index) + int(state.step)
    run.checkpoints.save(step, {**trained, adapter: exported(state)}, state, progress, metrics)
    if run.checkpoints.best == step and jax.process_index() == 0:
        export(run, {**trained, adapter: jax.device_get(exported(state))}, BEST_FILE)


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
    with uploaded(run.folder / name) as file:
        files.save_adapters(file, Adapters(trained, specs, run.config.model, below))
