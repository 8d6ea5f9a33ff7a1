"""Command line and timing functions of the benchmarks of whole models."""

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax


def model_parser(description: str) -> argparse.ArgumentParser:
    """Make a parser with flags for the model, the size of the image, the dtypes and the number of timed runs."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", required=True, help="a folder of make_checkpoint.py, or another model with --adapters"
    )
    parser.add_argument("--adapters", type=Path)
    parser.add_argument(
        "--size", type=int, default=128, help="side of the square LQ image in pixels; the upscale factor is 4"
    )
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--vae-dtype", default="float32")
    parser.add_argument("--repeats", type=int, default=3)
    return parser


def seconds(function: Callable[[], Any]) -> float:
    """Time until the arrays that `function` returns are computed, in seconds."""
    start = time.perf_counter()
    jax.block_until_ready(function())
    return time.perf_counter() - start


def alternate(timed: dict[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """Call the functions (which return seconds) alternately `repeats` times after one warm-up round."""
    rounds = [{name: function() for name, function in timed.items()} for _ in range(repeats + 1)]
    return {name: [figures[name] for figures in rounds[1:]] for name in timed}


def environment() -> dict[str, str]:
    """Return the environment variables of a program in PyTorch.

    Threads of OpenMP that wait give up their core, unless the caller sets OMP_WAIT_POLICY. By default they occupy it,
    which makes PyTorch several times slower while other programs use the cores.
    """
    return {"OMP_WAIT_POLICY": "passive", **os.environ}
