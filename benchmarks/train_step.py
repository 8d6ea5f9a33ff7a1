"""FLOPs, memory and time of the training step, with adapters as a low-rank path or merged into the weights.

    python benchmarks/train_step.py --size half --crop 256                # compiles both and runs them alternately
    python benchmarks/train_step.py --stages pix sem --batch-sizes 1 4    # SD 2.1 at 512: compiles only
    python benchmarks/train_step.py --topology v5p:2x2x1 --dtype bfloat16 # ... for a TPU without having one (libtpu)

Weights are random. Memory is that of one device during a step, according to the analysis of the compiled program:
arguments (weights, optimizer state, batch), results that do not reuse the memory of an argument, and temporaries. With
merged weights, the step computes W + dW and differentiates through it.
"""

import argparse
import contextlib
import functools
import itertools
import os
import statistics
import time
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from timing import alternate, seconds

from pisa_jax import losses, train_step, training
from pisa_jax.adapters import injection
from pisa_jax.config import Config, Data, Stage
from pisa_jax.metrics import lpips
from pisa_jax.runtime.compilation import compiler_options
from pisa_jax.runtime.messages import error_text
from pisa_jax.sd import backbone as bb
from pisa_jax.sd import random_model
from pisa_jax.sd.base_model import make_base_model

STAGES = {
    "pix": Stage("pix", steps=4000),
    "sem": Stage("sem", steps=8500, frozen=("pix",), perceptual=2.0, csd=1.0),
}
PROMPT_TOKENS = 77
ADDITIVE = train_step.loss


def merged_loss(adapter, frozen, batch, draws, base, objective):
    """`train_step.loss` with merged weights W + dW instead of the low-rank path."""
    unet = injection.merge(frozen.unet, {"": adapter}, {"": objective.spec}, {"": 1.0})
    return ADDITIVE({}, frozen._replace(unet=unet), batch, draws, base, objective)


PATHS = {"low-rank": ADDITIVE, "merged": merged_loss}


def vgg_shapes() -> dict[str, Any]:
    """Shapes of the weights of LPIPS (VGG16)."""
    of = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    kernels = lpips.FEATURE_NETWORKS["vgg"].kernels
    layers = {name: {"kernel": of(shape), "bias": of(shape[-1:])} for name, shape in kernels.items()}
    heads = {f"lin{index}": of((width,)) for index, width in enumerate((64, 128, 256, 512, 512))}
    return {"vgg": {"layers": layers, "heads": heads}}


def arguments(modules: bb.Backbone, config: Config, stage: Stage) -> tuple[Any, ...]:
    """Shapes of the arguments of `train_step.train_step`: frozen weights, state, batch, key."""
    of, shapes = jax.ShapeDtypeStruct, bb.param_shapes(modules)

    def cast(tree, dtype):
        return jax.tree.map(lambda leaf: of(leaf.shape, jnp.dtype(dtype)), tree)

    prompt = of((1, PROMPT_TOKENS, modules.unet.cross_attention_dim), jnp.float32)
    unet = cast(shapes["unet"], config.dtype)
    frozen = train_step.Frozen(
        unet=unet,
        teacher=unet if stage.csd else None,
        vae=cast(shapes["vae"], config.vae_dtype),
        text=cast(shapes["text"], jnp.float32) if stage.csd else None,
        null_prompt=prompt,
        negative_prompt=prompt,
        perceptual=vgg_shapes() if stage.perceptual else None,
        alphas_cumprod=of((1000,), jnp.float32),
    )
    key, optimizer = jax.eval_shape(lambda: jax.random.key(0)), training.make_optimizer(config, stage)
    float_unet = cast(shapes["unet"], jnp.float32)
    state = jax.eval_shape(
        lambda key: train_step.init_state(injection.init_adapter(key, float_unet, stage.spec), optimizer, False), key
    )
    images = of((config.batch_size, config.data.crop, config.data.crop, 3), jnp.float32)
    ids = of((config.batch_size, PROMPT_TOKENS), jnp.int32)
    batch = train_step.Batch(images, images, ids, of((config.batch_size,), jnp.bool_))
    return frozen, state, batch, key


def filled(shapes: tuple[Any, ...], config: Config, stage: Stage) -> tuple[Any, ...]:
    """Random arrays of the shapes of `arguments`."""
    frozen, _, batch, _ = shapes
    rng, key = np.random.default_rng(0), jax.random.key(0)

    def weights(tree):
        dtype = jax.tree.leaves(tree)[0].dtype
        return jax.tree.map(jnp.asarray, random_model.random_params(tree, rng, dtype))

    def normal(leaf):
        return jnp.asarray(rng.standard_normal(leaf.shape, np.float32))

    unet = weights(frozen.unet)
    frozen = frozen._replace(
        unet=unet,
        teacher=unet if stage.csd else None,
        vae=weights(frozen.vae),
        text=weights(frozen.text) if stage.csd else None,
        null_prompt=normal(frozen.null_prompt),
        negative_prompt=normal(frozen.negative_prompt),
        perceptual=weights(frozen.perceptual) if stage.perceptual else None,
        alphas_cumprod=losses.ddpm_schedule().alphas_cumprod,
    )
    state = train_step.init_state(
        injection.init_adapter(key, frozen.unet, stage.spec), training.make_optimizer(config, stage), ema=False
    )
    images = [jnp.tanh(normal(leaf)) for leaf in (batch.lq, batch.gt)]
    ids, seen = jnp.zeros(batch.token_ids.shape, jnp.int32), jnp.ones(batch.use_prompt.shape, bool)
    return frozen, state, train_step.Batch(*images, ids, seen), key


def compile_step(path: str, modules: bb.Backbone, config: Config, stage: Stage, shapes: Any, device: Any) -> Any:
    """Compile the step; returns it and the compile time in seconds."""
    step = functools.partial(
        train_step.train_step,
        base=make_base_model(modules),
        objective=training.make_objective(config, stage),
        optimizer=training.make_optimizer(config, stage),
    )
    on_cpu = device.platform == "cpu"
    options = {**compiler_options(), "xla_cpu_enable_concurrency_optimized_scheduler": not config.remat}
    start = time.perf_counter()
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
        compiled = jitted.lower(*shapes).compile()
    return compiled, time.perf_counter() - start


def summarize(compiled: Any) -> str:
    """Format the FLOPs and the memory of a compiled program."""
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    whole = held + memory.temp_size_in_bytes
    return f"{cost['flops'] / 1e12:6.2f} TFLOP, {whole / 2**30:6.2f} GiB ({held / 2**30:.2f} held)"


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
    parser.add_argument("--remat", choices=["no", "yes", "both"], default="no")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="dtype of UNet and VAE")
    parser.add_argument("--topology", help="compile for this TPU instead of the local device")
    parser.add_argument("--repeats", type=int, default=5, help="number of timed steps; size sd21 is not run on a CPU")
    args = parser.parse_args()
    device = device_for(args.topology)
    print(f"{device.device_kind}, jax {jax.__version__}, {args.size}, crops of {args.crop}, {args.dtype}")
    runs = args.topology is None and not (args.size == "sd21" and device.platform == "cpu")
    modules = bb.build_modules(*random_model.model_configs(args.size), jnp.dtype(args.dtype), jnp.dtype(args.dtype))
    remats = {"no": [False], "yes": [True], "both": [False, True]}[args.remat]
    for name, batch_size, remat in itertools.product(args.stages, args.batch_sizes, remats):
        stage = STAGES[name]
        config = Config(
            out="",
            stages=(STAGES["pix"], stage) if stage.frozen else (stage,),
            data=Data(source="fake", crop=args.crop),
            batch_size=batch_size,
            dtype=args.dtype,
            vae_dtype=args.dtype,
            remat=remat,
        )
        shapes, programs = arguments(modules, config, stage), {}
        for path in args.paths:
            what = f"{name}, batch {batch_size}, {'remat' if remat else 'no remat'}, {path:8s}"
            try:
                programs[path], compiling = compile_step(path, modules, config, stage, shapes, device)
            except jax.errors.JaxRuntimeError as error:
                print(f"{what}: {error_text(error)[:200]}", flush=True)
                continue
            print(f"{what}: compiled in {compiling:5.1f} s, {summarize(programs[path])}", flush=True)
        if not runs:
            continue
        arrays = filled(shapes, config, stage)
        timed = {path: functools.partial(step_seconds, program, arrays) for path, program in programs.items()}
        for path, taken in alternate(timed, args.repeats).items():
            middle = statistics.median(taken)
            print(f"  {path:8s} {middle:.3f} s median of {len(taken)} ({min(taken):.3f} to {max(taken):.3f})")


if __name__ == "__main__":
    main()
