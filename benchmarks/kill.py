"""Kill a run at random moments (kill -9) and check that its adapters are bit-equal to those of an uninterrupted run.

    python benchmarks/kill.py [--kills 20] [--seed 0]

The moments are uniform over the time of a whole run, from the start of the interpreter. They fall into imports,
compilation, steps and the writing of checkpoints, in both stages. A checkpoint is written after every step. When a run
ends, a new one starts until the number of kills is reached.
"""

import argparse
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax

ROOT = Path(__file__).resolve().parents[1]
FIELDS = ["--data.crop", "32", "--stages.0.steps", "10", "--stages.1.steps", "10", "--save-every", "1"]


def start(out: Path, cache: Path) -> subprocess.Popen:
    """Start or resume the run in `out`."""
    command = [sys.executable, str(ROOT / "train.py"), str(ROOT / "configs" / "debug.py"), "--out", str(out), *FIELDS]
    resume = ["--resume"] if (out / "config.json").exists() else []
    named = {"JAX_COMPILATION_CACHE_DIR": str(cache), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    return subprocess.Popen([*command, *resume], env={**os.environ, **named}, stdout=subprocess.DEVNULL)


def check(out: Path, code: int, expected: bytes | None = None) -> bytes:
    """Read the adapters of a finished run; exit if it failed or they differ from `expected`."""
    if code:
        sys.exit(f"the run in {out.name} ended with exit code {code}")
    found = (out / "adapters.safetensors").read_bytes()
    if expected not in (None, found):
        sys.exit(f"the adapters of the run in {out.name} DIFFER from those of the uninterrupted run")
    return found


def newest(out: Path) -> int:
    """Return the step of the newest complete checkpoint; 0 if there is none."""
    return max((int(path.name) for path in out.glob("checkpoints/*") if path.name.isdecimal()), default=0)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    print(f"python {platform.python_version()}, jax {jax.__version__}, {platform.machine()}")
    draw = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        out, cache = Path(folder) / "run", Path(folder) / "cache"
        check(Path(folder) / "first", start(Path(folder) / "first", cache).wait())  # compiles
        begin = time.perf_counter()
        expected = check(Path(folder) / "whole", start(Path(folder) / "whole", cache).wait())
        typical = time.perf_counter() - begin
        print(f"an uninterrupted run takes {typical:.1f} s", flush=True)
        kills, runs = 0, 0
        while kills < args.kills:
            moment, before = draw.uniform(0, typical), newest(out)
            process = start(out, cache)
            try:
                process.wait(moment)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                kills += 1
                print(f"kill {kills:2d} after {moment:5.1f} s, checkpoint {before} -> {newest(out)}", flush=True)
                continue
            check(out, process.returncode, expected)
            runs += 1
            out = Path(folder) / f"run{runs}"
        check(out, start(out, cache).wait(), expected)
    print(f"{args.kills} times kill -9 over {runs + 1} runs: the adapters of each are bit-equal")


if __name__ == "__main__":
    main()
