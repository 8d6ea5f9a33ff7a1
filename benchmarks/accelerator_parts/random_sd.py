"""Random models of Stable Diffusion's structure on the device, and compilation of several programs at a time."""

import functools
import itertools
import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from step_case import PROMPT_TOKENS, normal, random_adapter, random_weights
from timing import seconds

from pisa_jax.adapters import injection
from pisa_jax.config import AdapterSpec
from pisa_jax.inference import Weights
from pisa_jax.runtime.compilation import compiler_options
from pisa_jax.sd import backbone as bb
from pisa_jax.sd import random_model

SPEC = AdapterSpec()
# Threads that compile. One program uses several cores, too.
COMPILERS = max(1, min(4, (os.cpu_count() or 1) // 4))
GIB = 2**30


class Setting(NamedTuple):
    """Sizes of images and batches."""

    side: int
    large: int
    batches: tuple[int, ...]


SETTINGS = {"sd21": Setting(512, 1024, (1, 4, 16)), "nano": Setting(64, 128, (1, 2, 4))}


@functools.cache
def modules(size: str, dtype: str, vae_dtype: str) -> bb.Backbone:
    """Build the modules of a size."""
    return bb.build_modules(*random_model.model_configs(size), jnp.dtype(dtype), jnp.dtype(vae_dtype))


@functools.cache
def shapes(size: str) -> dict[str, Any]:
    """Shapes of the weights of a size."""
    return bb.param_shapes(modules(size, "bfloat16", "float32"))


def cast(tree: Any, dtype: str) -> Any:
    """Change the dtype of shapes."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(dtype)), tree)


def inference_weights(size: str, vae_dtype: str, unet: Any = None) -> Weights:
    """Draw the weights of inference: a UNet in bfloat16 (or `unet`), an adapter, and a VAE."""
    found = shapes(size)
    adapter = jax.eval_shape(lambda key: injection.init_adapter(key, found["unet"], SPEC), jax.random.key(0))
    width = random_model.model_configs(size)[0]["cross_attention_dim"]
    return Weights(
        random_weights(cast(found["unet"], "bfloat16"), 0) if unet is None else unet,
        (random_adapter(adapter, 1),),
        random_weights(cast(found["vae"], vae_dtype), 2),
        normal(jax.ShapeDtypeStruct((1, PROMPT_TOKENS, width), jnp.float32), 3),
    )


class Program(NamedTuple):
    """A compiled program and the seconds that this took."""

    compiled: Any
    seconds: float

    def memory_gib(self) -> float:
        """Memory of arguments, results and temporary arrays."""
        memory = self.compiled.memory_analysis()
        held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
        return (held + memory.temp_size_in_bytes) / GIB


def compile_program(function: Callable, *arguments: Any, **options: Any) -> Program:
    """Compile a function for arrays, or shapes."""
    start = time.perf_counter()
    jitted = jax.jit(function, compiler_options=compiler_options(), **options)
    return Program(jitted.lower(*arguments).compile(), time.perf_counter() - start)


def compile_all(tasks: dict[str, Callable[[], Program]]) -> dict[str, Program]:
    """Call the functions, several at a time."""
    with ThreadPoolExecutor(COMPILERS) as pool:
        return dict(zip(tasks, pool.map(lambda task: task(), tasks.values()), strict=True))


def groups(cases: Iterable[Any], size: int = COMPILERS) -> Iterator[list[Any]]:
    """Split cases into lists of `size`; the first has at most 2, because it is the most important one."""
    left = iter(cases)
    yield list(itertools.islice(left, min(size, 2)))
    while group := list(itertools.islice(left, size)):
        yield group


def timed(function: Callable[[], Any], limit: float, most: int = 9) -> dict[str, float]:
    """Return the median milliseconds of up to `most` calls after a warm-up, in about `limit` seconds, and memory.

    A device reports the largest memory in use since the process began: "peak_GiB" is there if these calls raised it.
    """
    before, taken = peak_gib(), []
    jax.block_until_ready(function())
    start = time.perf_counter()
    while not taken or (len(taken) < most and time.perf_counter() - start + taken[-1] < limit):
        taken.append(seconds(function))
    after = peak_gib()
    return {"ms": 1000 * statistics.median(taken)} | ({"peak_GiB": after} if after > before else {})


def peak_gib() -> float:
    """Largest memory in use on the device since this process began; 0 where the device does not report it."""
    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0) / GIB


def ceiling(earlier: dict[str, Any]) -> float | None:
    """Operations per second of bfloat16 matrix products, from part 1."""
    for part in earlier["parts"]:
        for row in part["rows"]:
            if row["name"] == "matrix product, bfloat16" and row["status"] == "ok":
                return row["values"]["TFLOP_per_s"] * 1e12
    return None
