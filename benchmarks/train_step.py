"""FLOPs, memory and time of the training step, with adapters as a low-rank path or merged into the weights.

    python benchmarks/train_step.py --size half --crop 256                # compiles both and runs them alternately
    python benchmarks/train_step.py --stages pix sem --batch-sizes 1 4    # SD 2.1 at 512: compiles only
    python benchmarks/train_step.py --topology v5p:2x2x1 --dtype bfloat16 # ... for a TPU without having one (libtpu)
    python benchmarks/train_step.py --paths low-rank --decompositions all # the table of docs/decompositions.md

Weights are random. Memory is that of one device during a step, according to the analysis of the compiled program:
arguments (weights, optimizer state, batch), results that do not reuse the memory of an argument, and temporaries. With
merged weights, the step computes W + dW and differentiates through it.
"""

import argparse
import contextlib
import dataclasses
import functools
import itertools
import os
import statistics
import time
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
from step_case import STAGES, StepCase, argument_shapes, random_arguments
from timing import alternate, seconds

from pisa_jax import train_step
from pisa_jax.adapters import injection
from pisa_jax.adapters.registry import DECOMPOSITIONS
from pisa_jax.config import AdapterSpec
from pisa_jax.runtime.compilation import compiler_options
from pisa_jax.runtime.messages import error_text
from pisa_jax.sd import backbone as bb
from pisa_jax.sd import random_model
from pisa_jax.sd.base_model import make_base_model

ADDITIVE = train_step.loss


def merged_loss(adapter, frozen, batch, draws, base, objective):
    """`train_step.loss` with merged weights W + dW instead of the low-rank path."""
    unet = injection.merge(frozen.unet, {"": adapter}, {"": objective.spec}, {"": 1.0})
    return ADDITIVE({}, frozen._replace(unet=unet), batch, draws, base, objective)


PATHS = {"low-rank": ADDITIVE, "merged": merged_loss}


def lower_step(path: str, modules: bb.Backbone, case: StepCase, shapes: Any, device: Any) -> Any:
    """Trace the step and lower it for a device."""
    step = functools.partial(
        train_step.train_step,
        base=make_base_model(modules),
        objective=case.objective,
        optimizer=case.optimizer,
    )
    on_cpu = device.platform == "cpu"
    options = {**compiler_options(), "xla_cpu_enable_concurrency_optimized_scheduler": not case.remat}
    # The implementation of attention is chosen by the default backend, which is not the one that runs the program.
    backend = (
        contextlib.nullcontext() if on_cpu else mock.patch.object(jax, "default_backend", return_value=device.platform)
    )
    with mock.patch.object(train_step, "loss", PATHS[path]), backend:
        jitted = jax.jit(
            lambda *arrays: step(*arrays),
            in_shardings=jax.sharding.SingleDeviceSharding(device),
            donate_argnums=1,
            compiler_options=options if on_cpu else None,
        )
        return jitted.lower(*shapes)


def summarize(compiled: Any) -> str:
    """Format the FLOPs and the memory of a compiled program."""
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    whole = held + memory.temp_size_in_bytes
    return f"{cost['flops'] / 1e12:6.2f} TFLOP, {whole / 2**30:6.2f} GiB ({held / 2**30:.2f} held)"


def summarize_lowered(lowered: Any, shapes: Any) -> str:
    """Format the FLOPs of a program that is not compiled, and the memory of its arguments."""
    held = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))
    return f"{lowered.cost_analysis()['flops'] / 1e12:6.2f} TFLOP, {held / 2**30:.2f} GiB held"


def step_seconds(program: Any, arrays: tuple[Any, ...]) -> float:
    """Time one step, in seconds; every step starts from the same state."""
    state = jax.block_until_ready(jax.tree.map(jnp.copy, arrays[1]))  # the step donates its memory
    return seconds(lambda: program(arrays[0], state, *arrays[2:]))


def device_for(topology: str | None) -> Any:
    """The first local device, or one of a TPU topology such as "v5p:2x2x1", for compilation only."""
    if topology is None:
        return jax.devices()[0]
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"  # libtpu otherwise looks for local TPUs first
    from jax.experimental import topologies

    return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[0]


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(random_model.SIZES), default="sd21")
    parser.add_argument("--crop", type=int, default=512)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1])
    parser.add_argument("--stages", nargs="+", choices=list(STAGES), default=["pix"])
    parser.add_argument("--paths", nargs="+", choices=list(PATHS), default=list(PATHS))
    parser.add_argument("--decompositions", nargs="+", choices=[*DECOMPOSITIONS, "all"], default=["lora"])
    parser.add_argument("--remat", choices=["no", "yes", "both"], default="no")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="dtype of UNet and VAE")
    parser.add_argument("--lower-only", action="store_true", help="operations before compilation, in seconds")
    parser.add_argument("--topology", help="compile for this TPU instead of the local device")
    parser.add_argument("--repeats", type=int, default=5, help="number of timed steps; size sd21 is not run on a CPU")
    args = parser.parse_args()
    device = device_for(args.topology)
    print(f"{device.device_kind}, jax {jax.__version__}, {args.size}, crops of {args.crop}, {args.dtype}")
    compiles_only = args.topology or (args.size == "sd21" and device.platform == "cpu")
    modules = bb.build_modules(*random_model.model_configs(args.size), jnp.dtype(args.dtype), jnp.dtype(args.dtype))
    param_shapes = bb.param_shapes(modules)
    remats = {"no": [False], "yes": [True], "both": [False, True]}[args.remat]
    kinds = list(DECOMPOSITIONS) if "all" in args.decompositions else args.decompositions
    for name, kind, batch_size, remat in itertools.product(args.stages, kinds, args.batch_sizes, remats):
        stage = dataclasses.replace(STAGES[name], spec=AdapterSpec(kind))
        case = StepCase(stage, args.crop, batch_size, remat, args.dtype, args.dtype)
        shapes, programs = argument_shapes(modules, param_shapes, case), {}
        for path in args.paths:
            what = f"{name}, {kind:6s}, batch {batch_size}, {'remat' if remat else 'no remat'}, {path:8s}"
            start = time.perf_counter()
            lowered = lower_step(path, modules, case, shapes, device)
            if args.lower_only:
                print(f"{what}: {summarize_lowered(lowered, shapes)}", flush=True)
                continue
            try:
                programs[path] = lowered.compile()
            except jax.errors.JaxRuntimeError as error:
                print(f"{what}: {error_text(error)[:200]}", flush=True)
                continue
            compiling = time.perf_counter() - start
            print(f"{what}: compiled in {compiling:5.1f} s, {summarize(programs[path])}", flush=True)
        if compiles_only or args.lower_only:
            continue
        arrays = random_arguments(shapes, case)
        timed = {path: functools.partial(step_seconds, program, arrays) for path, program in programs.items()}
        for path, taken in alternate(timed, args.repeats).items():
            middle = statistics.median(taken)
            print(f"  {path:8s} {middle:.3f} s median of {len(taken)} ({min(taken):.3f} to {max(taken):.3f})")


if __name__ == "__main__":
    main()
