"""Common parts of the benchmarks of whole models: the command line, and timing of alternating runs."""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax


def model_parser(description: str) -> argparse.ArgumentParser:
    """Make a parser with the model, the size of the image, the dtypes and the number of timed runs."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a folder of make_checkpoint.py, or any other with --adapters")
    parser.add_argument("--adapters", type=Path)
    parser.add_argument("--size", type=int, default=128, help="side of the square input, which is upscaled 4 times")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--vae-dtype", default="float32")
    parser.add_argument("--repeats", type=int, default=3)
    return parser


def seconds(function: Callable[[], Any]) -> float:
    """Measure the seconds until the arrays that `function` returns are ready."""
    start = time.perf_counter()
    jax.block_until_ready(function())
    return time.perf_counter() - start


def alternate(timed: dict[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """Run the functions of `timed`, which return seconds, in turn; the first round is a warm-up and is dropped."""
    rounds = [{name: function() for name, function in timed.items()} for _ in range(repeats + 1)]
    return {name: [figures[name] for figures in rounds[1:]] for name in timed}
