"""Compilation: the platform that is compiled for, XLA options, and a bounded cache of compiled functions."""

import collections
import contextlib
import contextvars
import functools
import time
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

_platform: contextvars.ContextVar[str | None] = contextvars.ContextVar("platform", default=None)


def target_platform() -> str:
    """Return the platform ("cpu", "gpu" or "tpu") that programs are traced for: that of the devices, as a rule."""
    return _platform.get() or jax.default_backend()


@contextlib.contextmanager
def compiling_for(platform: str) -> Iterator[None]:
    """Trace programs for another platform than that of the devices, to compile them ahead of time."""
    token = _platform.set(platform)
    try:
        yield
    finally:
        _platform.reset(token)


def compiler_options() -> dict[str, str]:
    """Return options for `jax.jit(..., compiler_options=)` that make the CPU back end fast; empty for other back ends.

    jax 0.10 passes CPU convolutions to a library that is slower than XLA's own code at every shape that was measured.
    The flag is experimental: it is omitted if the installed jaxlib does not know it.
    """
    return dict(_cpu_options()) if target_platform() == "cpu" else {}


@functools.cache
def _cpu_options() -> dict[str, str]:
    options = {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_REDUCE"}
    try:
        jax.jit(lambda x: x + 1, compiler_options=options)(jnp.zeros(()))
    except Exception:  # for an unknown option, jaxlib raises XlaRuntimeError or another error, depending on the version
        return {}
    return options


class CompiledCache:
    """A cache of at most `max_size` compiled functions; the least recently used one is evicted first.

    Without a bound, a long-running process that meets images of many sizes would accumulate executables.

    Raises:
        ValueError: `max_size` is less than 1.
    """

    def __init__(self, max_size: int):
        if max_size < 1:
            raise ValueError(f"max_size is {max_size}; a cache of compiled functions has at least 1 entry")
        self.max_size = max_size
        self.entries: collections.OrderedDict[Hashable, Any] = collections.OrderedDict()

    def __len__(self) -> int:
        return len(self.entries)

    def get(self, key: Hashable, compile_fn: Callable[[], Any]) -> Any:
        """Return the entry of `key`; on a miss, store the result of `compile_fn()`, or nothing if it raises."""
        if key not in self.entries:
            self.entries[key] = compile_fn()
            if len(self.entries) > self.max_size:
                self.entries.popitem(last=False)
        self.entries.move_to_end(key)
        return self.entries[key]


class StageRunner:
    """Run functions of (weights, arrays), each compiled ahead of time, once per static arguments and array shapes."""

    def __init__(
        self,
        weights: Any,
        on_compile: Callable[[str, float], None],
        max_compiled: int = 64,
        mesh: jax.sharding.Mesh | None = None,
    ):
        self.weights, self.on_compile = weights, on_compile
        # Kernels are partitioned over this mesh.
        self.mesh = mesh
        self.compiled = CompiledCache(max_compiled)

    def run(self, stage: Callable, static: tuple, *arrays: Any) -> Any:
        """Return stage(*static, weights, *arrays); calls on_compile(description, seconds) after each compilation."""
        return self.program(stage, static, *arrays)(self.weights, *arrays)

    def program(self, stage: Callable, static: tuple, *arrays: Any) -> Any:
        """Return the compiled function for arrays of these shapes; it takes (weights, *arrays)."""

        def compile_stage():
            start = time.perf_counter()
            jitted = jax.jit(functools.partial(stage, *static), compiler_options=compiler_options())
            mesh = self.mesh.abstract_mesh if self.mesh else jax.sharding.get_abstract_mesh()
            with jax.sharding.use_abstract_mesh(mesh):
                compiled = jitted.lower(self.weights, *arrays).compile()
            shape = jax.tree.leaves(arrays)[0].shape
            self.on_compile(f"{stage.__name__} for {shape}", time.perf_counter() - start)
            return compiled

        shapes = tuple(leaf.shape for leaf in jax.tree.leaves(arrays))
        return self.compiled.get((stage, static, shapes), compile_stage)


class CompilingRunner(StageRunner):
    """Compiles for a StageRunner what it will run, and computes nothing.

    All results are NaN: iterations do not converge on them, so the programs of all of their parts are compiled.
    """

    def __init__(self, runner: StageRunner):
        super().__init__(runner.weights, runner.on_compile, mesh=runner.mesh)
        self.compiled = runner.compiled

    def run(self, stage: Callable, static: tuple, *arrays: Any) -> Any:
        """Compile the stage for these shapes; returns NaN in the place of its result."""
        results = self.program(stage, static, *arrays).out_info
        return jax.tree.map(lambda leaf: jnp.full(leaf.shape, jnp.nan, leaf.dtype), results)
