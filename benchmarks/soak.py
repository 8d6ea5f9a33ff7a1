"""Endurance of inference: memory, descriptors and threads over many images, and processes in difficult surroundings.

    python benchmarks/soak.py [--files 500] [--calls 2000]

One process upscales mixed files with the code of `pisa-sr infer`, then calls one `Upscaler` again and again, with the
demo model. Its memory, its open files and its threads after 50 images, when every size is compiled, are compared with
those at the end. Then `infer.py` runs twice at once on one compilation cache, without a usable home, without standard
streams, and into a closed pipe. Prints a table; exit code 1 if a check fails. Linux only.
"""

import argparse
import itertools
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax
import numpy as np
from PIL import Image

from pisa_jax import Upscaler
from pisa_jax.cli.infer_files import count_outcomes, upscale_files
from pisa_jax.cli.infer_plan import UpscaleOptions, make_plan

ROOT = Path(__file__).resolve().parents[1]
WARM_UP = 50  # images until every size has been compiled
GROWTH = 32.0  # MiB that the memory may grow afterwards: the allocator's fragments
SIZES = ((16, 16), (24, 16), (20, 20))  # few, since every size is compiled
KINDS = (("RGB", ".png"), ("RGB", ".jpg"), ("L", ".png"), ("RGBA", ".png"), ("RGBA", ".webp"), ("RGB", ".tiff"))
KINDS += (("P", ".png"), ("P", ".gif"), ("CMYK", ".jpg"), ("LA", ".png"), ("RGB", ".bmp"), ("1", ".tiff"))
# Runs infer.py for a user without an entry in the list of users, who has no home.
HOMELESS = "import pwd; del pwd.getpwuid; from pisa_jax.cli.infer import main; import sys; sys.exit(main(sys.argv[1:]))"

# (what was checked, the figures, whether they are as they should be)
Check = tuple[str, str, bool]


def usage() -> tuple[float, int, int]:
    """Return the memory of this process in MiB, the number of its open files and of its threads."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["VmRSS"].split()[0]) / 1024, len(os.listdir("/proc/self/fd")), int(fields["Threads"])


class Watch:
    """Usage after each image."""

    def __init__(self) -> None:
        self.records: list[tuple[float, int, int]] = []

    def __call__(self, report: object = None) -> None:
        self.records.append(usage())

    def checks(self, what: str) -> Iterator[Check]:
        """Compare the peaks of the tenth of the images after the warm-up with those of the last tenth."""
        tenth = max(len(self.records) // 10, 1)
        first, last = self.records[WARM_UP : WARM_UP + tenth], self.records[-tenth:]
        for index, name in enumerate(("memory, MiB", "open files", "threads")):
            before, after = (max(record[index] for record in records) for records in (first, last))
            allowed = GROWTH if index == 0 else 0
            yield f"{what}: {name}", f"{before:.0f} -> {after:.0f}", after - before <= allowed


def write_files(folder: Path, count: int, sizes: Sequence[tuple[int, int]] = SIZES, seed: int = 0) -> list[Path]:
    """Write images of every size and kind in random order, of which every twentieth is damaged."""
    folder.mkdir()
    rng, draw = np.random.default_rng(seed), random.Random(seed)
    pairs = list(itertools.islice(itertools.cycle(itertools.product(sizes, KINDS)), count))
    draw.shuffle(pairs)
    paths = []
    for index, ((width, height), (mode, suffix)) in enumerate(pairs):
        path = folder / f"{index:04d}{suffix}"
        Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)).convert(mode).save(path)
        if index % 20 == 19:
            path.write_bytes(path.read_bytes()[:60])
        paths.append(path)
    return paths


def many_files(upscaler: Upscaler, folder: Path, count: int) -> Iterator[Check]:
    """Upscale files as `pisa-sr infer` does."""
    paths, out, watch = write_files(folder / "many", count), folder / "out", Watch()
    out.mkdir()
    reports = upscale_files(make_plan(paths, UpscaleOptions(out)), upscaler, watch)
    counts = count_outcomes(reports)
    written = {Path(output) for report in reports for output in report.outputs}
    figures = f"{counts['ok']} written, {counts['failed']} damaged ones refused"
    yield f"{count} files", figures, counts == {"ok": count - count // 20, "skipped": 0, "failed": count // 20}
    yield "files left behind", str(len(left := set(out.iterdir()) - written)), not left
    yield from watch.checks(f"{count} files")


def many_calls(upscaler: Upscaler, count: int) -> Iterator[Check]:
    """Call one upscaler with arrays of two sizes."""
    images = [np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8) for size in SIZES[:2]]
    watch = Watch()
    for index in range(count):
        upscaler(images[index % 2], scales=(1.0, 0.5 * (index % 3)))
        watch()
    yield from watch.checks(f"{count} calls")


def surroundings(folder: Path) -> Iterator[Check]:
    """Run infer.py as a process of its own in difficult surroundings."""
    inputs, cache = write_files(folder / "few", 3, SIZES[:1]), folder / "cache"
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0"  # compiles in half the time
    named = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "XLA_FLAGS": flags,
    }

    def command(out: str, *flags: str, program: tuple[str, ...] = (str(ROOT / "infer.py"),)) -> list[str]:
        paths = [str(path) for path in inputs]
        return [sys.executable, *program, "-i", *paths, "-o", str(folder / out), "--min-size", "64", *flags]

    def run(out: str, *flags: str, env: dict[str, str] = named, **options: object) -> tuple[str, bool]:
        done = subprocess.run(command(out, *flags, **options), env=env, capture_output=True, text=True, check=False)
        return judge(out, done.returncode, done.stderr)

    def judge(out: str, code: int, error: str = "") -> tuple[str, bool]:
        names = sorted(path.name for path in (folder / out).glob("*"))
        right = code == 0 and len(names) == len(inputs) and "Traceback" not in error
        return f"exit code {code}, {len(names)} of {len(inputs)} written" + (error[-300:] if not right else ""), right

    cached = ("--compile-cache", str(cache))
    both = [subprocess.Popen(command(out, *cached), env=named, stderr=subprocess.PIPE, text=True) for out in ("a", "b")]
    errors = [process.communicate()[1] for process in both]
    for out, process, error in zip("ab", both, errors, strict=True):
        yield (f"two processes with one compilation cache: {out}", *judge(out, process.returncode, error))
    yield ("a third process with their cache", *run("c", *cached))
    without = {name: value for name, value in named.items() if name not in ("HOME", "XDG_CACHE_HOME")}
    yield ("a home that cannot be written", *run("d", env=without | {"HOME": "/proc"}))
    yield ("a home that does not exist", *run("e", env=without | {"HOME": "/proc/none"}))
    yield ("no home", *run("f", env=without, program=("-c", HOMELESS)))
    shell = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", *command("g", *cached)]
    yield ("no standard streams", *judge("g", subprocess.run(shell, env=named, check=False).returncode))
    pipe = subprocess.Popen(command("h", *cached), env=named, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    pipe.stdout.readline()
    pipe.stdout.close()
    yield ("a pipe that is closed after one line", *judge("h", pipe.wait()))


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=500)
    parser.add_argument("--calls", type=int, default=2000)
    arguments = parser.parse_args()
    if min(arguments.files, arguments.calls) < 2 * WARM_UP:
        parser.error(f"--files and --calls must be at least {2 * WARM_UP}")
    print(f"python {platform.python_version()}, jax {jax.__version__}, {platform.machine()}", flush=True)
    print("| check | figures | |\n|---|---|---|")
    start, failed = time.monotonic(), 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        upscaler = Upscaler.load(min_size=64)
        parts: list[Callable[[], Iterator[Check]]] = [
            lambda: many_files(upscaler, folder, arguments.files),
            lambda: many_calls(upscaler, arguments.calls),
            lambda: surroundings(folder),
        ]
        for what, figures, passed in itertools.chain.from_iterable(part() for part in parts):
            print(f"| {what} | {figures} | {'ok' if passed else 'FAILED'} |", flush=True)
            failed += not passed
    print(f"{failed} checks failed, {time.monotonic() - start:.0f} s")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
