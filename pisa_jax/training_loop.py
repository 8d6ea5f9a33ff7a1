"""The loop over the steps of one stage."""

import collections
import contextlib
import functools
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from pisa_jax.adapters.adapter_tree import AdapterTree
from pisa_jax.config import Stage
from pisa_jax.metrics import validation
from pisa_jax.runtime import distributed
from pisa_jax.runtime.watchdog import Watchdog
from pisa_jax.train_step import Batch, State, make_frozen
from pisa_jax.training_compile import Programs
from pisa_jax.training_run import Run, Stop, how_to_continue, new_state, save, specs_of

# Steps that are dispatched and have not ended.
MAX_IN_FLIGHT = 2


def train_stage(
    run: Run, index: int, trained: dict[str, AdapterTree], state: State | None, programs: Programs
) -> State:
    """Train one stage, from `state` or from its start, on top of the adapters `trained`; returns the last state."""
    config, stage, before = run.config, run.config.stages[index], run.before(index)
    below = {name: trained[name] for name in stage.frozen}
    with outside_steps(run):
        frozen = make_frozen(
            run.model,
            run.mesh,
            below,
            specs_of(config, run.start),
            negative_prompt=config.negative_prompt,
            perceptual=run.perceptual if stage.perceptual else None,
            teacher=bool(stage.csd),
            prompts=bool(config.data.prompts),
        )
        state = new_state(run, index, frozen.unet, below) if state is None else state
    if run.log:
        run.log.step_flops = programs.operations
    step_function = watched(run, programs.step)

    def validate(step, state):
        if not programs.upscale:
            return None
        upscale = watched(run, programs.upscale)
        weights = (frozen.unet, frozen.vae, state.adapter, frozen.null_prompt, frozen.below)
        with left_out(run):
            return log_validation(run, stage, step, functools.partial(upscale, *weights))

    key = jax.random.fold_in(jax.random.key(config.seed), index)
    if before + int(state.step) == 0:  # the base model without any adapter
        validate(0, state)
    stop_before(run, before + int(state.step))
    return run_steps(
        run, index, trained, state, lambda state, batch: step_function(frozen, state, batch, key), validate
    )


def stop_before(run: Run, step: int) -> None:
    """Raise Stop if a signal was received before the first step of this start."""
    if run.stop.at_once:
        raise Stop(f"stopped at step {step} of {run.total}; continue with --resume", run.stop.number)


def run_steps(
    run: Run,
    index: int,
    trained: dict[str, AdapterTree],
    state: State,
    step_function: Callable[[State, Batch], tuple[State, dict[str, Any]]],
    validate: Callable[[int, State], dict[str, float] | None],
) -> State:
    """Run the steps of a stage that are left after `state`, with what happens between them; returns the last state."""
    config, stage, before = run.config, run.config.stages[index], run.before(index)
    step, in_flight = int(state.step), InFlight(run.watchdog)
    while step < stage.steps:
        in_flight.wait(MAX_IN_FLIGHT - 1)
        batch = next_batch(run)
        step += 1
        run.profiler.before(before + step)
        state, measured = step_function(state, batch)
        run.profiler.after(before + step, measured)
        in_flight.add(measured)
        last, metrics = step == stage.steps, None
        if last or step % config.log_every == 0:
            log_step(run, stage, before + step, jax.device_get(measured))
        if last or step % config.validation.every == 0:
            in_flight.wait(0)
            metrics = validate(before + step, state)
        stop = asked_to_stop(run, before + step)
        if last or stop or step % config.save_every == 0:
            in_flight.wait(0)
            with left_out(run):
                save(run, index, trained, state, metrics)
        if stop and before + step < run.total:
            message = f"stopped and saved at step {before + step} of {run.total}; continue with --resume"
            raise Stop(message, run.stop.number)
    return state


class InFlight:
    """The steps that were dispatched and have not ended, at most `MAX_IN_FLIGHT`.

    JAX would dispatch tens of steps ahead. Their batches would occupy the device, a signal would be obeyed after all of
    them, and the time spent waiting for data would include time in which the device computes.
    """

    def __init__(self, watchdog: Watchdog):
        self._watchdog, self._measured = watchdog, collections.deque[Any]()

    def add(self, measured: Any) -> None:
        """Add the measurements of a step that was dispatched."""
        self._measured.append(measured)

    def wait(self, most: int) -> None:
        """Wait until at most this many steps are left."""
        while len(self._measured) > most:
            jax.block_until_ready(self._measured.popleft())
            self._watchdog.beat()


def watched(run: Run, function: Callable[..., Any]) -> Callable[..., Any]:
    """Make each call of a compiled function a beat of the watchdog."""

    def call(*arguments):
        run.watchdog.beat()
        return function(*arguments)

    return call


@contextlib.contextmanager
def outside_steps(run: Run) -> Iterator[None]:
    """Neither limit the time of the body, such as a compilation, nor count it as time of steps."""
    with run.watchdog.paused(), left_out(run):
        yield


def left_out(run: Run) -> contextlib.AbstractContextManager[None]:
    """Leave the time of the body out of the logged time per step."""
    return run.log.left_out() if run.log else contextlib.nullcontext()


def next_batch(run: Run) -> Batch:
    """Load the next batch and place it on the devices; the time is logged."""
    start = time.perf_counter()
    batch = place_batch(run, next(run.loader))
    run.wait.add(time.perf_counter() - start)
    return batch


def place_batch(run: Run, batch: dict[str, np.ndarray]) -> Batch:
    """Place the images of this process as its part of the global batch."""
    prompts, size = list(batch["prompt"]), run.config.batch_size
    ids = run.model.tokenize(prompts) if run.config.data.prompts else np.zeros((len(prompts), 1), np.int32)
    arrays = Batch(batch["lq"], batch["gt"], ids, batch["use_prompt"])
    return distributed.place_batch(run.mesh, size, distributed.batch_rows(run.mesh, size), arrays)


def log_step(run: Run, stage: Stage, step: int, measured: dict[str, Any]) -> None:
    """Log the measurements of a step.

    Raises:
        FloatingPointError: too many steps in a row were not finite.
    """
    values, waited = {name: float(value) for name, value in measured.items()}, run.wait.gather()
    if run.log:
        run.log.log(step, {f"{stage.adapter}/{name}": value for name, value in values.items()}, waited)
    if values["bad_streak"] >= run.config.max_bad_steps:
        raise FloatingPointError(
            f"{values['bad_streak']:.0f} steps in a row, up to step {step}, had a loss or gradient that is not finite; "
            f"{how_to_continue(run)}"
        )


def log_validation(run: Run, stage: Stage, step: int, upscale: Any) -> dict[str, float]:
    """Measure the validation images; log the metrics, which are returned, and a contact sheet."""
    found, sheet = validation.evaluate(upscale, run.validation, run.perceptual, stage)
    if run.log:
        run.log.log_scalars(step, {f"validation/{name}": value for name, value in found.items()})
        run.log.log_image(step, "validation", sheet)
        values = ", ".join(f"{name} {value:.4f}" for name, value in found.items())
        run.log.print_line(f"step {step}: validation {values}")
    return found


def asked_to_stop(run: Run, step: int) -> bool:
    """Return True if the run stops after this step because of a signal; several processes agree on one step."""
    return run.stop.reached(step)
