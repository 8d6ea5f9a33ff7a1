"""A resumable training loop for whole networks with a time budget; adapters are trained by `pisa_jax.training`."""

import argparse
import json
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax import contrib

from pisa_jax.runtime.checkpoint import Checkpoints, Progress
from pisa_jax.runtime.compilation import compiler_options

# A half-life of 700 steps smooths the last part of a short training.
AVERAGE_DECAY = 0.999
WARMUP = 100
# Root mean square of Muon's update at a learning rate of 1 (Liu et al. 2025, eq. 4).
UPDATE_SIZE = 0.2
LOG_EVERY, SAVE_SECONDS = 50, 30
# Batches that are prepared in the background, each in a thread.
AHEAD = max(2, (os.cpu_count() or 1) // 2)


class State(NamedTuple):
    """The training state; `average` is the moving average of the parameters, which is the result."""

    step: jax.Array
    params: Any
    optimizer: Any
    average: Any


def cpu_clock() -> float:
    """Processor time of this process divided by the number of cores, in seconds."""
    return time.process_time() / (os.cpu_count() or 1)


def add_time_options(parser: argparse.ArgumentParser) -> None:
    """Add --minutes and --cpu-time, the `minutes` and the `clock` of `fit`."""
    parser.add_argument("--minutes", type=float, required=True, help="duration")
    parser.add_argument(
        "--cpu-time",
        dest="clock",
        action="store_const",
        const=cpu_clock,
        default=time.perf_counter,
        help="count processor time",
    )


def learning_rate(peak: float, step: int, progress: float) -> float:
    """Compute a linear rise over WARMUP steps times a cosine that falls to 0 at progress 1."""
    return float(peak * min(1.0, (step + 1) / WARMUP) * 0.5 * (1 + jnp.cos(jnp.pi * min(progress, 1.0))))


def make_optimizer() -> optax.GradientTransformation:
    """Create Muon (Jordan et al. 2024) for matrices and convolutions, Adam for the rest, at a learning rate of 1."""

    def dimensions(params):
        def of_leaf(x):
            return contrib.MuonDimensionNumbers(tuple(range(x.ndim - 1)), x.ndim - 1) if x.ndim > 1 else None

        return jax.tree.map(of_leaf, params)

    muon = contrib.muon(
        1.0, consistent_rms=UPDATE_SIZE, muon_weight_dimension_numbers=dimensions, adam_b2=0.99, adam_learning_rate=0.3
    )
    return optax.chain(optax.clip_by_global_norm(1.0), muon)


def make_step(loss: Callable, optimizer: optax.GradientTransformation, average_decay: float) -> Callable:
    """Compile the step (state, batch, key, learning rate) -> (state, measurements)."""

    def step(state: State, batch: Any, key: jax.Array, rate: jax.Array) -> tuple[State, dict[str, jax.Array]]:
        value_and_grad = jax.value_and_grad(loss, has_aux=True)
        (total, parts), grads = value_and_grad(state.params, batch, jax.random.fold_in(key, state.step))
        updates, optimizer_state = optimizer.update(grads, state.optimizer, state.params)
        params = jax.tree.map(lambda x, update: x + rate * update, state.params, updates)
        # The average follows closely at first; otherwise it would keep the random initialization for long.
        decay = jnp.minimum(average_decay, (1 + state.step) / (10 + state.step))
        average = optax.incremental_update(params, state.average, 1 - decay)
        return State(state.step + 1, params, optimizer_state, average), {"total": total, **parts}

    return jax.jit(step, donate_argnums=0, compiler_options=compiler_options())


def prepared(batch_of: Callable[[int], Any], first: int) -> Iterator[Any]:
    """Yield batch_of(first), batch_of(first + 1), ..., computed ahead in threads."""
    with ThreadPoolExecutor(AHEAD) as pool:
        waiting = [pool.submit(batch_of, first + index) for index in range(AHEAD)]
        while True:
            first += 1
            waiting.append(pool.submit(batch_of, first + AHEAD - 1))
            yield waiting.pop(0).result()


def fit(
    out: Path,
    minutes: float,
    params: Any,
    loss: Callable[[Any, Any, jax.Array], tuple[jax.Array, dict[str, jax.Array]]],
    batch_of: Callable[[int], Any],
    peak: float,
    clock: Callable[[], float] = time.perf_counter,
    optimizer: optax.GradientTransformation | None = None,
    average_decay: float = AVERAGE_DECAY,
) -> Any:
    """Minimize `loss(params, batch_of(step), key)` for `minutes` of training; return the averaged parameters.

    Batches depend only on the step. A run that was interrupted continues from its newest checkpoint when it is started
    again, also with another number of minutes: the learning rate depends on the share of the time that has passed.
    `clock` measures the time in seconds; `cpu_clock` is for cores that other programs use as well. `optimizer` is that
    of `make_optimizer` by default; its updates are multiplied by the learning rate. Mean measurements are appended to
    log.jsonl.
    """
    out.mkdir(parents=True, exist_ok=True)
    optimizer = optimizer or make_optimizer()
    state = State(jnp.zeros((), jnp.int32), params, optimizer.init(params), jax.tree.map(jnp.copy, params))
    checkpoints, spent = Checkpoints(out), 0.0
    if checkpoints.latest:
        _, state = checkpoints.restore(params, state)
        spent = checkpoints.progress().loader["seconds"]
    step, key, now = make_step(loss, optimizer, average_decay), jax.random.key(0), int(state.step)
    batches = prepared(batch_of, now)
    start = saved = clock()
    before, recent = spent, []
    while spent < 60 * minutes:
        rate = learning_rate(peak, now, spent / (60 * minutes))
        state, measured = step(state, next(batches), key, rate)
        now += 1
        recent.append(measured)
        if now % LOG_EVERY == 0:  # waits for the device
            recent = jax.device_get(recent)
            log(out, now, spent, {"rate": rate, **{name: np.mean([m[name] for m in recent]) for name in measured}})
            recent = []
        spent = before + clock() - start
        if clock() - saved > SAVE_SECONDS or spent >= 60 * minutes:
            checkpoints.save(now, state.average, state, Progress(0, {"seconds": spent}))
            saved = clock()
    batches.close()
    checkpoints.close()
    return state.average


def log(out: Path, step: int, seconds: float, measured: dict[str, float]) -> None:
    """Write a line to the terminal and to the run's log."""
    values = {name: float(f"{float(value):.5g}") for name, value in measured.items()}
    line = json.dumps({"step": step, "seconds": round(seconds), **values})
    print(line, flush=True)
    with (out / "log.jsonl").open("a") as file:
        file.write(line + "\n")
