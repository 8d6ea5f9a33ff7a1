"""Part 6: the operations on which an adjustable run and a training step of `sem` spend most time."""

import collections
import functools
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
from step_case import STAGES, StepCase, argument_shapes, random_arguments

from accelerator_parts import inference, random_sd, training
from pisa_jax.model import Predictions
from pisa_jax.runtime import distributed

LARGEST = 10
RUNS = 3
NAME_LENGTH = 90


def run(rows, size: str) -> None:
    """Profile an adjustable run, then a training step."""
    side = random_sd.SETTINGS[size].side
    case = inference.Case(side, 1, "float32")
    report(rows, f"{case.name}, adjustable", functools.partial(adjustable_run, size, case))
    step = StepCase(STAGES["sem"], side, 1, False, *training.DTYPES)
    report(rows, training.name_of(step), functools.partial(training_step, size, step))


def adjustable_run(size: str, case: inference.Case) -> Callable[[], Any]:
    """Return the function that runs the three stages."""
    model = inference.make_models(size)[case.vae_dtype]
    stages = inference.stages(model, case)
    del stages["predict"]
    tasks = {
        name: functools.partial(random_sd.compile_program, function, *arguments)
        for name, (function, arguments) in stages.items()
    }
    calls = {name: program.compiled for name, program in random_sd.compile_all(tasks).items()}
    (_, images, _), (unet, _), (*_, scales, _) = (stages[name][1] for name in calls)

    def run():
        latents = calls["encode"](model.weights, images, None)
        both = calls["predict_both"](unet, latents)
        predictions = Predictions(latents, tuple(jax.numpy.split(both, 2, axis=-1)))
        return calls["render"](model.weights, predictions, scales, images)

    return run


def training_step(size: str, case: StepCase) -> Callable[[], Any]:
    """Return the function that runs a training step."""
    compiled = training.compile_step(size, case).compiled
    shapes = argument_shapes(random_sd.modules(size, *training.DTYPES), random_sd.shapes(size), case)
    mesh = distributed.make_mesh(data=1)
    frozen, state, batch, key = jax.device_put(random_arguments(shapes, case), distributed.replicated(mesh))
    holder = [state]

    def run():
        holder[0], measured = compiled(frozen, holder[0], batch, key)
        return measured

    return run


def report(rows, name: str, make: Callable[[], Callable[[], Any]]) -> None:
    """Trace a few runs, and report the whole and the largest operations."""
    found: list[tuple[str, float, int]] = []

    def trace():
        function = make()
        with tempfile.TemporaryDirectory() as folder:
            jax.block_until_ready(function())
            with jax.profiler.trace(folder):
                for _ in range(RUNS):
                    jax.block_until_ready(function())
            times, counts = self_times(Path(folder))
        total = sum(times.values())
        if not total:
            raise ValueError("the profile has no operations of this device")
        found.extend((op, seconds, counts[op]) for op, seconds in times.most_common(LARGEST))
        return {
            "busy_ms": 1000 * total / RUNS,
            "operations": len(times),
            "largest_ten": sum(s for _, s, _ in found) / total,
        }

    whole = rows.attempt(f"{name}, profile", trace)
    for rank, (op, seconds, count) in enumerate(found, 1):
        values = {
            "ms": 1000 * seconds / RUNS,
            "share": 1000 * seconds / RUNS / whole["busy_ms"],
            "calls": count // RUNS,
        }
        rows.add(f"{name}, {rank}: {op[:NAME_LENGTH]}", "ok", values=values)


def self_times(folder: Path) -> tuple[collections.Counter, collections.Counter]:
    """Return operation -> seconds without the operations inside it, and operation -> number of calls, of a trace."""
    times: collections.Counter = collections.Counter()
    counts: collections.Counter = collections.Counter()
    for path in folder.rglob("*.xplane.pb"):
        for line in device_lines(jax.profiler.ProfileData.from_file(str(path))):
            for name, nanoseconds in without_children(line):
                times[name] += nanoseconds / 1e9
                counts[name] += 1
    return times, counts


def device_lines(profile) -> Iterable[list[tuple[str, float, float]]]:
    """Yield the events (name, start, end) of every line of a device that has operations."""
    planes = list(profile.planes)
    devices = [plane for plane in planes if plane.name.startswith("/device:") and "CUSTOM" not in plane.name]
    for plane in devices or [plane for plane in planes if plane.name == "/host:CPU"]:
        for line in plane.lines:
            events = [
                (name, event.start_ns, event.start_ns + event.duration_ns)
                for event in line.events
                if (name := operation_name(event, bool(devices)))
            ]
            # Of a device, the other lines repeat the same time as steps and modules.
            if events and (not devices or line.name == "XLA Ops" or line.name.startswith("Stream")):
                yield events


def operation_name(event, on_device: bool) -> str | None:
    """Name of an event: program, operation and kernel; None for what is no operation of a program."""
    stats = dict(event.stats)
    operation, program = (str(stats.get(key, "")) for key in ("hlo_op", "hlo_module"))
    if not operation and not on_device:
        return None
    return ", ".join(dict.fromkeys(filter(None, (program, operation, event.name if on_device else ""))))


def without_children(events: list[tuple[str, float, float]]) -> Iterable[tuple[str, float]]:
    """Yield (name, duration without the events inside it) for the events of one line."""
    stack: list[list] = []
    for name, start, end in sorted(events, key=lambda event: (event[1], -event[2])):
        while stack and stack[-1][1] <= start:
            yield stack[-1][0], stack.pop()[2]
        if stack:
            stack[-1][2] -= end - start
        stack.append([name, end, end - start])
    yield from ((name, left) for name, _, left in stack)
