"""Performance figures: operations of a step, share of the peak, device memory, compilation."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp

from pisa_jax.runtime import performance


def test_share_of_the_peak():
    v5e, v4, cpu = (SimpleNamespace(device_kind=kind) for kind in ("TPU v5 lite", "TPU v4", "cpu"))
    assert performance.utilization(197e12, 2.0, v5e) == {"tflops": 98.5, "peak_share": 0.5}
    assert performance.utilization(1e12, 2.0, cpu) == {"tflops": 0.5}
    assert performance.utilization(1e12, 2.0) == {"tflops": 0.5}
    assert performance.utilization(None, 2.0, v4) == {}
    assert performance.utilization(1e12, 0.0, v4) == {}


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
