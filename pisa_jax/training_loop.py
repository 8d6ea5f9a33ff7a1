"""The loop over the steps of one stage."""

import functools
import time
from typing import Any

import jax
import numpy as np

from pisa_jax.adapters.adapter_tree import AdapterTree
from pisa_jax.config import Stage
from pisa_jax.metrics import validation
from pisa_jax.runtime import distributed
from pisa_jax.runtime.compilation import compiler_options
from pisa_jax.train_step import Batch, State, jit_train_step, make_frozen
from pisa_jax.training_run import Run, Stop, how_to_continue, make_objective, make_optimizer, new_state, save


def train_stage(run: Run, index: int, trained: dict[str, AdapterTree], state: State | None) -> State:
    """Train one stage, from `state` or from its start, on top of the adapters `trained`; returns the last state."""
    config, stage, before = run.config, run.config.stages[index], run.before(index)
    base, objective = run.model.base, make_objective(config, stage)
    frozen = make_frozen(
        run.model,
        run.mesh,
        {name: trained[name] for name in stage.frozen},
        run.start.specs | {earlier.adapter: earlier.spec for earlier in config.stages},
        negative_prompt=config.negative_prompt,
        perceptual=run.perceptual if stage.perceptual else None,
        teacher=bool(stage.csd),
        prompts=bool(config.data.prompts),
    )
    state = new_state(run, index, frozen.unet) if state is None else state
    step_function = jit_train_step(base, objective, make_optimizer(config, stage), frozen, run.mesh)
    upscale = jax.jit(
        functools.partial(validation.upscale_image, base=base, spec=stage.spec),
        out_shardings=distributed.replicated(run.mesh),
        compiler_options=compiler_options(),
    )

    def validate(step):
        if run.validation:
            weights = (frozen.unet, frozen.vae, state.adapter, frozen.null_prompt)
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


def place_batch(run: Run, batch: dict[str, np.ndarray]) -> Batch:
    """Place the images of this process as its part of the global batch."""
    prompts = list(batch["prompt"])
    ids = run.model.tokenize(prompts) if run.config.data.prompts else np.zeros((len(prompts), 1), np.int32)
    layout = distributed.batch_sharding(run.mesh)
    arrays = Batch(batch["lq"], batch["gt"], ids, batch["use_prompt"])
    return jax.tree.map(lambda array: jax.make_array_from_process_local_data(layout, array), arrays)


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
