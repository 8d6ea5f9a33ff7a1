"""Compilation: XLA options, and compiled functions kept per shape in a bounded table."""

import collections
import functools
import time
from collections.abc import Callable, Hashable
from typing import Any

import jax
import jax.numpy as jnp


@functools.cache
def compiler_options() -> dict[str, str]:
    """Options for `jax.jit(..., compiler_options=)` that make the CPU back end fast; empty elsewhere.

    jax 0.10 hands CPU convolutions to a library path that is slower than XLA's own at every shape measured. The flag is
    experimental: it is left out where this jaxlib does not know it.
    """
    if jax.default_backend() != "cpu":
        return {}
    options = {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_REDUCE"}
    try:
        jax.jit(lambda x: x + 1, compiler_options=options)(jnp.zeros(()))
    except Exception:  # jaxlib raises its own XlaRuntimeError or a plain one for unknown options, by version
        return {}
    return options


class CompiledCache:
    """A table of compiled functions; when it is full, the least recently used one is dropped."""

    def __init__(self, max_size: int):
        self.max_size = max_size
        self.entries: collections.OrderedDict[Hashable, Any] = collections.OrderedDict()

    def __len__(self) -> int:
        return len(self.entries)

    def get(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """Return the entry of `key`, made by `make()` on the first request."""
        if key not in self.entries:
            self.entries[key] = make()
            if len(self.entries) > self.max_size:
                self.entries.popitem(last=False)
        self.entries.move_to_end(key)
        return self.entries[key]


class StageRunner:
    """Runs functions of (weights, arrays), each compiled ahead of time and once per shape of its arrays."""

    def __init__(self, weights: Any, on_compile: Callable[[str, float], None], max_compiled: int = 64):
        self.weights, self.on_compile = weights, on_compile
        self.compiled = CompiledCache(max_compiled)

    def run(self, stage: Callable, static: tuple, *arrays: Any) -> Any:
        """Return stage(*static, weights, *arrays); a compilation is reported as on_compile(description, seconds)."""

        def compile_stage():
            start = time.perf_counter()
            jitted = jax.jit(functools.partial(stage, *static), compiler_options=compiler_options())
            compiled = jitted.lower(self.weights, *arrays).compile()
            shape = jax.tree.leaves(arrays)[0].shape
            self.on_compile(f"{stage.__name__} for {shape}", time.perf_counter() - start)
            return compiled

        shapes = tuple(leaf.shape for leaf in jax.tree.leaves(arrays))
        return self.compiled.get((stage, static, shapes), compile_stage)(self.weights, *arrays)
