"""kill -9 at random moments, twenty times, and the run still ends with the same adapters, bit for bit.

    python benchmarks/kill.py [--kills 20] [--seed 0]

Moments are uniform over the time that a whole run takes, from the start of the interpreter on: so they fall into
imports, compilation, steps and the writing of checkpoints, in both stages. A checkpoint is written after every step.
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
    """The run in `out`, begun or continued."""
    command = [sys.executable, str(ROOT / "train.py"), str(ROOT / "configs" / "debug.py"), "--out", str(out), *FIELDS]
    resume = ["--resume"] if (out / "config.json").exists() else []
    named = {"JAX_COMPILATION_CACHE_DIR": str(cache), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    return subprocess.Popen([*command, *resume], env={**os.environ, **named}, stdout=subprocess.DEVNULL)


def finish(out: Path, cache: Path) -> bytes:
    """The adapters of the run, once it has ended by itself."""
    code = start(out, cache).wait()
    if code:
        sys.exit(f"the run ended with exit code {code}")
    return (out / "adapters.safetensors").read_bytes()


def newest(out: Path) -> int:
    """The newest complete checkpoint; 0 if there is none."""
    return max((int(path.name) for path in out.glob("checkpoints/*") if path.name.isdecimal()), default=0)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    print(f"python {platform.python_version()}, jax {jax.__version__}, {platform.machine()}")
    draw = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        out, cache = Path(folder) / "run", Path(folder) / "cache"
        finish(Path(folder) / "first", cache)  # compiles
        begin = time.perf_counter()
        expected = finish(Path(folder) / "whole", cache)
        typical = time.perf_counter() - begin
        print(f"a run that nothing stops takes {typical:.1f} s", flush=True)
        for kill in range(args.kills):
            moment, before = draw.uniform(0, typical), newest(out)
            process = start(out, cache)
            try:
                process.wait(moment)
                ending = f"had ended by itself with exit code {process.returncode}"
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                ending = "killed"
            print(f"{kill + 1:3d}: {ending} after {moment:5.1f} s, checkpoint {before} -> {newest(out)}", flush=True)
        same = finish(out, cache) == expected
    print(f"{args.kills} times kill -9: the adapters are {'bit-equal' if same else 'DIFFERENT'}")
    sys.exit(not same)


if __name__ == "__main__":
    main()
