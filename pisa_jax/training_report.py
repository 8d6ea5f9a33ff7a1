"""Reports on the compiled steps of a run, for devices that need not be there: memory, operations, collectives, time."""

import collections
import importlib.util
import math
import os
import re
import time
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from pisa_jax.adapters.adapter_tree import Adapters
from pisa_jax.adapters.start import load_start
from pisa_jax.config import Config
from pisa_jax.runtime import distributed
from pisa_jax.runtime.chips import chip_of
from pisa_jax.runtime.compilation import compiling_for
from pisa_jax.runtime.operations import count_operations
from pisa_jax.training_compile import Shapes, explain_out_of_memory, stage_shapes, trace_step
from pisa_jax.training_mesh import check_mesh
from pisa_jax.training_model import check, expected_shapes, perceptual_shapes

# libtpu otherwise asks the metadata server for the TPUs of this machine, and allows one process at a time.
LIBTPU_ENVIRONMENT = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
}
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_COLLECTIVE = re.compile(rf"= (.*?) ({'|'.join(COLLECTIVES)})(?:-start)?\(")
_ARRAY = re.compile(r"\b(pred|[a-z]+(\d+)\w*)\[([\d,]*)\]")


def topology_devices(name: str) -> Sequence[Any]:
    """Return the devices of a TPU slice that is not there, such as "v5e:4x4" or "v5p:2x2x4".

    Raises:
        ValueError: libtpu is not installed, or does not know the topology.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError("--topology compiles with libtpu, which is not installed: pip install libtpu")
    from jax.experimental import topologies

    missing = {name: value for name, value in LIBTPU_ENVIRONMENT.items() if name not in os.environ}
    os.environ.update(missing)
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=name).devices
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"--topology {name!r}: expected a TPU and its chips, such as v5e:4x4, v6e:8x8 or v5p:2x2x4 ({error})"
        ) from error
    finally:
        for name in missing:
            del os.environ[name]


def report_compiled(config: Config, topology: str | None, peak_share: float) -> None:
    """Compile the step of every stage, for the local devices or a topology, and print a report of each.

    No weights and no images are read.

    Raises:
        ValueError: a config that no run would accept, or a step that does not fit into the memory of a device.
    """
    mesh = distributed.make_mesh(config.mesh_data, config.mesh_fsdp, topology_devices(topology) if topology else None)
    check_mesh(config, mesh)
    base, params, tokens = expected_shapes(config)
    check(config, base, params["unet"])
    start = load_start(config)
    shapes = Shapes(base, params, tokens, perceptual_shapes(config))
    for index in range(len(config.stages)):
        print("\n".join(report_stage(config, index, shapes, mesh, start, peak_share)), flush=True)


def report_stage(
    config: Config, index: int, shapes: Shapes, mesh: Mesh, start: Adapters, peak_share: float
) -> list[str]:
    """Compile the step of a stage; returns the lines of its report."""
    stage, device = config.stages[index], mesh.devices.flat[0]
    began = time.perf_counter()
    with compiling_for(device.platform), jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        arguments = stage_shapes(config, index, shapes, mesh, start)
        traced = trace_step(config, index, shapes.base, mesh, start, arguments)
        with explain_out_of_memory(config, mesh, f"stage {stage.adapter}"):
            compiled = traced.lower().compile()
    seconds = time.perf_counter() - began
    chip, memory = chip_of(device), compiled.memory_analysis()
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    whole = held + memory.temp_size_in_bytes + memory.generated_code_size_in_bytes
    tflop = count_operations(traced.jaxpr) / mesh.size / 1e12
    name = chip.name if chip else device.device_kind
    layout = f"data {mesh.shape['data']} x fsdp {mesh.shape['fsdp']}"
    lines = [
        f"stage {stage.adapter} on {mesh.size} x {name} ({layout}), batch {config.batch_size}, crops of "
        f"{config.data.crop}, UNet {config.dtype}, VAE {config.vae_dtype}, remat {'on' if config.remat else 'off'}",
        f"  memory per chip: {whole / 2**30:.2f} GiB{f' of {chip.memory:g}' if chip else ''}, {held / 2**30:.2f} held",
        f"  operations per chip: {tflop:.3g} TFLOP",
        f"  collectives: {format_collectives(compiled.as_text())}",
    ]
    if chip:
        step = tflop / (chip.tflops * peak_share)
        lines.append(
            f"  expected at {peak_share:.0%} of the peak of {chip.tflops:g} TFLOP/s: {step:.3g} s per step, "
            f"{stage.steps * step / 3600:.2f} hours for {stage.steps} steps"
        )
    return [*lines, f"  compiled in {seconds:.0f} s"]


def format_collectives(text: str) -> str:
    """Count the collectives of a compiled program and the bytes of their results: "2 all-reduce (1.5 MiB)"."""
    counts: collections.Counter[str] = collections.Counter()
    sizes: collections.Counter[str] = collections.Counter()
    for shape, name in _COLLECTIVE.findall(text):
        counts[name] += 1
        sizes[name] += sum(_bytes(bits, sides) for _, bits, sides in _ARRAY.findall(shape))
    return ", ".join(f"{counts[name]} {name} ({sizes[name] / 2**20:.1f} MiB)" for name in counts) or "none"


def _bytes(bits: str, sides: str) -> int:
    return max(int(bits or 8) // 8, 1) * math.prod(int(side) for side in sides.split(",") if side)
