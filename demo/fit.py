"""A resumable training loop for whole networks; adapters have `pisa_jax.training`."""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from pisa_jax.data.degradation import degrade
from pisa_jax.data.loader import make_loader
from pisa_jax.data.sources import FileSource, SourceImage
from pisa_jax.runtime.checkpoint import Checkpoints, Progress
from pisa_jax.runtime.compilation import compiler_options

# A half-life of 350 steps smooths the last part of a short training.
AVERAGE_DECAY = 0.998
LOG_EVERY, SAVE_EVERY = 20, 100


@dataclass(frozen=True)
class Phase:
    """Steps at one size: `pairs` crops of `crop` x `crop` pixels, each clean and degraded."""

    steps: int
    crop: int
    pairs: int


class State(NamedTuple):
    """What a step changes; `average` is the moving average of the parameters, and what ships."""

    step: jax.Array
    params: Any
    optimizer: Any
    average: Any


class Remembered:
    """A source that decodes every picture once."""

    def __init__(self, source: FileSource):
        self.names, self.paired, self.identity = source.names, source.paired, source.identity
        self._source, self._records = source, {}

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> SourceImage:
        if index not in self._records:
            self._records[index] = self._source[index]
        return self._records[index]


def make_optimizer(learning_rate: float, steps: int) -> optax.GradientTransformation:
    """Adam behind a clipped norm; the rate rises over the first 100 steps and falls to 0 along a cosine."""
    rate = optax.warmup_cosine_decay_schedule(0.0, learning_rate, min(100, steps // 2), steps)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate, 0.9, 0.99))


def make_step(loss: Callable, optimizer: optax.GradientTransformation) -> Callable:
    """The compiled step (state, batch, key) -> (state, measured)."""

    def step(state: State, batch: Any, key: jax.Array) -> tuple[State, dict[str, jax.Array]]:
        value_and_grad = jax.value_and_grad(loss, has_aux=True)
        (total, parts), grads = value_and_grad(state.params, batch, jax.random.fold_in(key, state.step))
        updates, optimizer_state = optimizer.update(grads, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        # At first the average follows closely, or it would remember the random start.
        decay = jnp.minimum(AVERAGE_DECAY, (1 + state.step) / (10 + state.step))
        average = optax.incremental_update(params, state.average, 1 - decay)
        return State(state.step + 1, params, optimizer_state, average), {"total": total, **parts}

    return jax.jit(step, donate_argnums=0, compiler_options=compiler_options())


def fit(
    out: Path,
    phases: tuple[Phase, ...],
    source: FileSource,
    prompts: dict[str, str] | None,
    params: Any,
    loss: Callable[[Any, Any, jax.Array], tuple[jax.Array, dict[str, jax.Array]]],
    prepare: Callable[[dict[str, np.ndarray], int], Any],
    learning_rate: float,
) -> Any:
    """Minimise `loss(params, prepare(batch, step), key)` over all phases; the averaged parameters.

    Batches are those of `data.make_loader`. A run that was killed goes on from its newest checkpoint when started
    again. Measurements are appended to log.jsonl.
    """
    out.mkdir(parents=True, exist_ok=True)
    optimizer = make_optimizer(learning_rate, sum(phase.steps for phase in phases))
    state = State(jnp.zeros((), jnp.int32), params, optimizer.init(params), jax.tree.map(jnp.copy, params))
    checkpoints, first, loader_state = Checkpoints(out), 0, None
    if checkpoints.latest:
        _, state = checkpoints.restore(params, state)
        first, loader_state = checkpoints.progress()
    step, key, remembered, end = make_step(loss, optimizer), jax.random.key(0), Remembered(source), 0
    for index, phase in enumerate(phases):
        end += phase.steps
        if index < first:
            continue
        options = {"batch_size": phase.pairs, "crop": phase.crop, "seed": index, "degrade": degrade}
        loader = make_loader(remembered, prompts=prompts, **options)
        if loader_state and index == first:
            loader.set_state(loader_state)
        start = time.perf_counter()
        while (now := int(state.step)) < end:
            state, measured = step(state, prepare(next(loader), now), key)
            now += 1
            if now % LOG_EVERY == 0:
                seconds, start = (time.perf_counter() - start) / LOG_EVERY, time.perf_counter()
                log(out, now, seconds, measured)
            if now % SAVE_EVERY == 0 or now == end:
                checkpoints.save(now, state.average, state, Progress(index, loader.get_state()))
        loader.close()
    checkpoints.close()
    return state.average


def log(out: Path, step: int, seconds: float, measured: dict[str, jax.Array]) -> None:
    """A line on the terminal and in the run's log."""
    line = {"step": step, "seconds": round(seconds, 3), **{name: float(value) for name, value in measured.items()}}
    print(json.dumps(line), flush=True)
    with (out / "log.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")
