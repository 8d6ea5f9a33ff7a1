"""Performance figures: operations of a step, share of the peak, device memory, compilation."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from pisa_jax.runtime import performance


def test_share_of_the_peak():
    found = performance.utilization(197e12, 2.0, "TPU v5 lite")
    assert found == {"tflops": 98.5, "peak_share": 0.5}
    assert performance.utilization(1e12, 2.0, "cpu") == {"tflops": 0.5}
    assert performance.utilization(None, 2.0, "TPU v4") == {}
    assert performance.utilization(1e12, 0.0, "TPU v4") == {}


def test_operations_of_a_product():
    a, b = jnp.ones((8, 16)), jnp.ones((16, 32))
    analysis = jax.jit(lambda a, b: a @ b).lower(a, b).cost_analysis()
    assert performance.step_flops(analysis, devices=1) == 2 * 8 * 16 * 32
    assert performance.step_flops(analysis, devices=4) == 2 * 8 * 16 * 32 / 4
    assert performance.step_flops(None, devices=1) is None
    assert performance.step_flops({"flops": -1.0}, devices=1) is None


def test_the_parts_of_an_accumulated_batch_are_all_counted():
    """The cost analysis counts the body of a scan once; the step counts it for every part."""

    def step(parts):
        def add(total, part):
            return total + part @ part, None

        return jax.lax.scan(add, jnp.zeros((64, 64)), parts)[0]

    once, four = (
        performance.step_flops(jax.jit(step).lower(jnp.ones((parts, 64, 64))).cost_analysis(), 1, parts)
        for parts in (1, 4)
    )
    assert four == pytest.approx(4 * once, rel=0.01)
    assert once == pytest.approx(2 * 64**3, rel=0.05)


def test_memory_of_the_device_that_uses_most(monkeypatch):
    stats = [{"bytes_in_use": 2**30, "peak_bytes_in_use": 3 * 2**30}, {"bytes_in_use": 2**31, "peak_bytes_in_use": 0}]
    devices = [SimpleNamespace(memory_stats=lambda entry=entry: entry) for entry in stats]
    monkeypatch.setattr(performance.jax, "local_devices", lambda: devices)
    assert performance.device_memory() == {"memory": 2.0, "memory_peak": 3.0}
    monkeypatch.setattr(performance.jax, "local_devices", lambda: [SimpleNamespace(memory_stats=lambda: None)])
    assert performance.device_memory() == {}


def test_compilation_is_counted():
    before = performance.compile_seconds()
    jax.jit(lambda x: jnp.cosh(x) * 3)(jnp.ones((3, 5)))
    assert performance.compile_seconds() > before


def test_data_waits_begin_again_when_they_are_gathered():
    wait = performance.DataWait()
    wait.add(0.5)
    wait.add(0.25)
    assert wait.gather() == [0.75]
    assert wait.gather() == [0.0]
