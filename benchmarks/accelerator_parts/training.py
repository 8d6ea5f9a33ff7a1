"""Part 4: the training step of both stages, with random weights: batches, with and without rematerialization."""

import functools
import gc
import time
from typing import Any

import jax
from step_case import STAGES, StepCase, argument_shapes, random_arguments

from accelerator_parts import random_sd
from accelerator_parts.operations import operations
from accelerator_parts.random_sd import Program
from pisa_jax import train_step
from pisa_jax.runtime import distributed
from pisa_jax.sd.base_model import make_base_model

# As in configs/sd21.py.
DTYPES = ("bfloat16", "float32")
# Stage, index of the batch size, rematerialization: most important first.
ORDER = (
    ("pix", 0, False),
    ("sem", 0, False),
    ("sem", 1, True),
    ("pix", 1, False),
    ("sem", 1, False),
    ("pix", 2, True),
    ("sem", 2, True),
    ("pix", 1, True),
    ("pix", 2, False),
    ("sem", 2, False),
    ("pix", 0, True),
    ("sem", 0, True),
)
TIMED = 5.0


def run(rows, size: str) -> None:
    """Compile groups of steps, several at a time, and time the steps of each group."""
    setting = random_sd.SETTINGS[size]
    counted = operations(size, setting.side)
    cases = [StepCase(STAGES[stage], setting.side, setting.batches[i], remat, *DTYPES) for stage, i, remat in ORDER]
    slowest = 0.0
    for group in random_sd.groups(cases):
        start, programs = time.perf_counter(), {}
        names = "; ".join(map(name_of, group))
        rows.attempt(f"compile: {names}", functools.partial(build, programs, size, group), 1.2 * slowest)
        slowest = max(slowest, time.perf_counter() - start)
        for case, program in programs.items():
            if isinstance(program, Exception):
                rows.add_failure(name_of(case), program)
            else:
                rows.attempt(name_of(case), functools.partial(measure, size, case, program, counted))
            gc.collect()


def name_of(case: StepCase) -> str:
    """Name of the row of a case."""
    remat = "remat" if case.remat else "no remat"
    return f"{case.stage.adapter}, {case.crop}x{case.crop}, batch {case.batch_size}, {remat}"


def build(programs: dict[StepCase, Program | Exception], size: str, group: list[StepCase]) -> dict[str, Any]:
    """Compile a group of steps into `programs`; an error takes the place of a step that does not compile."""

    def one(case):
        try:
            return compile_step(size, case)
        except Exception as error:  # the others of the group are wanted
            return error

    programs.update(random_sd.compile_all({case: functools.partial(one, case) for case in group}))
    compiled = [program for program in programs.values() if isinstance(program, Program)]
    return {f"compile_{index}_s": program.seconds for index, program in enumerate(compiled)}


def compile_step(size: str, case: StepCase) -> Program:
    """Compile the step of a training run on one device."""
    modules, mesh = random_sd.modules(size, *DTYPES), distributed.make_mesh(data=1)
    frozen, state, batch, key = argument_shapes(modules, random_sd.shapes(size), case)
    placed = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=distributed.replicated(mesh)), frozen
    )
    step = train_step.jit_train_step(make_base_model(modules), case.objective, case.optimizer, placed, mesh)
    start = time.perf_counter()
    return Program(step.lower(placed, state, batch, key).compile(), time.perf_counter() - start)


def measure(size: str, case: StepCase, program: Program, counted: dict[str, float]) -> dict[str, Any]:
    """Time a step; every step starts from the state that the one before returned."""
    shapes = argument_shapes(random_sd.modules(size, *DTYPES), random_sd.shapes(size), case)
    mesh = distributed.make_mesh(data=1)
    frozen, state, batch, key = jax.device_put(random_arguments(shapes, case), distributed.replicated(mesh))
    holder = [state]
    del state

    def step():
        holder[0], measured = program.compiled(frozen, holder[0], batch, key)
        return measured

    losses = {name: float(value) for name, value in step().items()}
    values = random_sd.timed(step, TIMED, most=5)
    images = 1000 * case.batch_size / values["ms"]
    values |= {"images_per_s": images, "TFLOP_per_s": images * counted[case.stage.adapter] / 1e12}
    values |= {"compile_s": program.seconds, "program_GiB": program.memory_gib()}
    # A random model's loss is not 0; a step that was skipped would be measured all the same.
    return values | {"loss": losses["total"], "status": "wrong" if losses["skipped"] else "ok"}
