"""Part 1: the device, the versions, and two ceilings: the rate of matrix products and of copies."""

import importlib.metadata
import os
import platform
import statistics
import subprocess
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from timing import seconds

PACKAGES = ("jax", "jaxlib", "flax", "optax", "diffusers", "transformers", "numpy", "torch", "peft")
QUERY = "name,driver_version,memory.total,power.limit,clocks.max.sm"


def run(rows, size: str) -> None:
    """Report the device, then measure its ceilings."""
    rows.attempt("device", describe)
    small = size != "sd21" or jax.default_backend() == "cpu"
    side, length = (1024, 2**23) if small else (8192, 2**28)
    for dtype in ("bfloat16", "float32"):
        rows.attempt(f"matrix product, {dtype}", lambda dtype=dtype: matrix_product(side, dtype))
    rows.attempt("copy", lambda: copy(length))


def describe() -> dict[str, Any]:
    """Return the names and versions of device, driver, host and packages."""
    device = jax.devices()[0]
    limit = (device.memory_stats() or {}).get("bytes_limit")
    found = {
        "device": device.device_kind,
        "platform": device.platform,
        "devices": jax.device_count(),
        "platform_version": " ".join(device.client.platform_version.split()),
        "memory_GiB": round(limit / 2**30, 1) if limit else None,
        "nvidia_smi": _output("nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader"),
        "host": f"{platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "commit": _output("git", "-C", os.path.dirname(__file__), "rev-parse", "--short", "HEAD"),
    }
    return {key: value for key, value in (found | versions()).items() if value}


def versions() -> dict[str, str]:
    """Return the versions of the installed packages."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def matrix_product(side: int, dtype: str) -> dict[str, float]:
    """Measure the rate of a product of two square matrices of random numbers."""
    a, b = (jax.random.normal(jax.random.key(seed), (side, side), dtype) for seed in (0, 1))
    product = jax.jit(jnp.matmul)
    return {"TFLOP_per_s": 2 * side**3 / per_call(lambda: product(a, b)) / 1e12}


def copy(length: int) -> dict[str, float]:
    """Measure the rate of copying float32 numbers, counting bytes read and bytes written."""
    x = jax.random.normal(jax.random.key(0), (length,))
    shift = jax.jit(lambda x: x + 1)  # a plain copy might be optimized away
    return {"GB_per_s": 2 * x.nbytes / per_call(lambda: shift(x)) / 1e9}


def per_call(function: Callable[[], Any], calls: int = 10, repeats: int = 5) -> float:
    """Return the median over `repeats` of the seconds per call, of `calls` calls in a row after a warm-up."""
    jax.block_until_ready(function())
    taken = [seconds(lambda: [function() for _ in range(calls)]) for _ in range(repeats)]
    return statistics.median(taken) / calls


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return "; ".join(done.stdout.split("\n")).strip("; ") or None
