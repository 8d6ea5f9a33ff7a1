"""Compiler options, the bounded cache of compiled functions, and the runner of stages."""

import jax
import jax.numpy as jnp
import pytest

from pisa_jax.runtime.compilation import CompiledCache, StageRunner, compiler_options


def test_compiler_options_are_accepted_by_jit():
    assert jax.jit(lambda x: 2 * x, compiler_options=compiler_options())(3.0) == 6.0


class Compiler:
    """Counts compilations by key."""

    def __init__(self):
        self.keys = []

    def __call__(self, key):
        def compile_fn():
            self.keys.append(key)
            return f"executable {key}"

        return compile_fn


def test_each_key_is_compiled_once():
    cache, compiler = CompiledCache(max_size=2), Compiler()
    for _ in range(3):
        for key in ("a", "b"):
            assert cache.get(key, compiler(key)) == f"executable {key}"
    assert compiler.keys == ["a", "b"]


def test_the_least_recently_used_entry_is_evicted_first():
    cache, compiler = CompiledCache(max_size=3), Compiler()
    for key in ("a", "b", "c", "a", "d"):
        cache.get(key, compiler(key))
    assert [key for key in "abcd" if key in cache.entries] == ["a", "c", "d"]
    cache.get("b", compiler("b"))
    assert compiler.keys == ["a", "b", "c", "d", "b"]
    assert [key for key in "abcd" if key in cache.entries] == ["a", "b", "d"]


def test_the_number_of_entries_is_bounded():
    cache, compiler = CompiledCache(max_size=64), Compiler()
    for key in range(100):
        cache.get(key, compiler(key))
        assert len(cache) <= cache.max_size == 64
    assert len(cache) == 64


def test_a_failed_compilation_is_not_stored():
    cache, compiler = CompiledCache(max_size=1), Compiler()
    cache.get("a", compiler("a"))

    def fail():
        raise RuntimeError("RESOURCE_EXHAUSTED")

    with pytest.raises(RuntimeError, match="RESOURCE_EXHAUSTED"):
        cache.get("b", fail)
    assert "a" in cache.entries
    assert "b" not in cache.entries


@pytest.mark.parametrize("size", [0, -1])
def test_a_cache_without_entries_is_refused(size):
    with pytest.raises(ValueError, match=f"max_size is {size}; a cache of compiled functions has at least 1 entry"):
        CompiledCache(size)


def test_a_stage_is_compiled_once_per_static_arguments_and_shapes():
    traces, reports = [], []

    def stage(power, weights, x):
        traces.append((power, x.shape))
        return weights["w"] * x**power

    runner = StageRunner({"w": jnp.float32(3.0)}, lambda what, seconds: reports.append(what), max_compiled=3)
    for value in (1.0, 2.0):
        assert runner.run(stage, (2,), jnp.full(2, value)).tolist() == [3 * value**2] * 2
    assert runner.run(stage, (3,), jnp.full(2, 2.0)).tolist() == [24.0, 24.0]
    assert runner.run(stage, (2,), jnp.ones(1)).tolist() == [3.0]
    assert traces == [(2, (2,)), (3, (2,)), (2, (1,))]
    assert reports == ["stage for (2,)", "stage for (2,)", "stage for (1,)"]
    assert len(runner.compiled) == 3
    runner.run(stage, (2,), jnp.ones(5))
    assert len(runner.compiled) == 3
