"""Time and memory of the training step in this package and in PyTorch with peft on the same machine.

    python -m venv .venv-torch && .venv-torch/bin/pip install -r benchmarks/requirements-torch.txt
    python benchmarks/make_checkpoint.py half --size half
    python benchmarks/train_step_against_torch.py --model half --torch .venv-torch/bin/python

Both train an adapter of rank 4 on the same layers with the same weights, images and random numbers, so that the losses
of the first step are equal. Every program runs in a process of its own, on all cores, and their steps alternate.
PyTorch runs eagerly. Memory is the largest resident memory of the process during the steps after the first one, without
and with what came before: loading, compilation and the first step.
"""

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from step_inputs import StepSettings
from timing import alternate, environment

LAYOUTS = ("contiguous_format", "channels_last")
# Relative difference of the losses of the first step, in float32.
TOLERANCE = 1e-3


class Program:
    """A process of step_in_jax.py or step_in_torch.py, after its first step."""

    def __init__(self, python: str, script: str, settings: StepSettings):
        command = [python, Path(__file__).with_name(script), settings.as_json()]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment()
        )
        self.first = self._read()
        self.memory: dict[str, float] = {}
        # Of every step, the sum over all threads.
        self.cpu_seconds: list[float] = []
        first = self.first
        print(
            f"  {first['versions']}: first step {first['first_step_s']:.1f} s, loss {first['total']:.6f}, "
            f"norm of the gradient {first['grad_norm']:.4f}",
            flush=True,
        )

    def seconds(self) -> float:
        """Run one step; returns its time in seconds."""
        print("step", file=self._process.stdin, flush=True)
        measured = self._read()
        self.cpu_seconds.append(measured["cpu_seconds"])
        return measured["seconds"]

    def close(self) -> None:
        """End the process and read its memory."""
        self._process.stdin.close()
        self.memory = self._read()
        self._process.wait()

    def _read(self) -> dict:
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self._process.args[1]} ended with exit status {self._process.wait()}")
        return json.loads(line)


def compare(settings: StepSettings, python: str, layouts: list[str], repeats: int) -> None:
    """Run one stage and batch size in all programs, and print their times and memory.

    Raises:
        ValueError: the losses of the first step differ.
    """
    print(f"{settings.stage}, batch {settings.batch_size}, crops of {settings.crop}, float32", flush=True)
    programs = {"pisa_jax": Program(sys.executable, "step_in_jax.py", settings)}
    for layout in layouts:
        programs[layout] = Program(python, "step_in_torch.py", replace(settings, layout=layout))
    losses = [program.first["total"] for program in programs.values()]
    if max(losses) - min(losses) > TOLERANCE * max(losses):
        raise ValueError(f"the losses of the first step differ by more than {TOLERANCE:g}: {losses}")
    times = alternate({name: program.seconds for name, program in programs.items()}, repeats)
    for program in programs.values():
        program.close()
    report(programs, times)


def report(programs: dict[str, Program], times: dict[str, list[float]]) -> None:
    """Print times and memory of the programs, and the ratios to PyTorch with the faster of its layouts."""
    figures = {
        name: {
            "time": statistics.median(times[name]),
            "time on the CPU": statistics.median(program.cpu_seconds[1:]),
            "memory": program.memory["steps_GiB"],
            "memory with what came before": program.memory["peak_GiB"],
        }
        for name, program in programs.items()
    }
    for name, values in figures.items():
        time, cpu, memory, whole = values.values()
        spread = f"{min(times[name]):.2f} to {max(times[name]):.2f}"
        print(f"  {name:17s} {time:6.2f} s ({spread}), {cpu:6.2f} s on the CPU, {memory:.2f} GiB, {whole:.2f} GiB")
    fastest = min((name for name in figures if name != "pisa_jax"), key=lambda name: figures[name]["time"])
    ratios = (f"{what} {value / figures[fastest][what]:.2f}" for what, value in figures["pisa_jax"].items())
    print(f"  of PyTorch with {fastest}: {', '.join(ratios)}", flush=True)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a diffusers folder")
    parser.add_argument("--torch", required=True, help="interpreter of an environment with PyTorch, diffusers and peft")
    parser.add_argument("--stages", nargs="+", choices=["pix", "sem"], default=["pix", "sem"])
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--crop", type=int, default=256)
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS), help="of PyTorch's arrays")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for stage, batch_size in itertools.product(args.stages, args.batch_sizes):
            settings = StepSettings(args.model, stage, args.crop, batch_size, str(Path(folder, "draws.npz")))
            compare(settings, args.torch, args.layouts, args.repeats)


if __name__ == "__main__":
    main()
