"""Measure and check this package on the accelerator of this machine, in a given time.

    python benchmarks/accelerator.py --json accelerator.json                 # 8 minutes, Stable Diffusion 2.1's size
    python benchmarks/accelerator.py --size nano --minutes 3                 # a small model, to try the script on a CPU

Needs this checkout and its dependencies, and no network, model or image files: weights are random and made on the
device. The parts run one after the other, most important first, each within its share of the time: the device and two
ceilings, correctness, inference, training, the same inference in PyTorch (if torch and peft are installed), and the
largest operations. Results are printed and written as they are measured. Out-of-memory errors and other failures are
rows of the result. Exits with 1 if a comparison exceeds its tolerance. benchmarks/README.md explains the rows.
"""

import argparse
import datetime
import signal
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # without an installed package, too

from accelerator_parts.report import Report, summarize
from accelerator_parts.schedule import PARTS, Part, deadlines, environment, run_part

LOG_LINES = 3


def main() -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8.0, help="time for all parts together")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    parser.add_argument("--cache", type=Path, help="keep compiled programs in this folder, for a second run")
    parser.add_argument("--size", choices=["sd21", "nano"], default="sd21", help="of the model")
    parser.add_argument("--parts", nargs="+", choices=[part.name for part in PARTS], help="only `device` and these")
    args = parser.parse_args()
    if args.minutes <= 0:
        parser.error(f"--minutes is {args.minutes}; it must be positive")
    if args.json and not args.json.resolve().parent.is_dir():
        parser.error(f"--json is {args.json}; its folder does not exist")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # ends the part that runs
    # Every result says what device it is of, and has the ceilings.
    parts = [part for part in PARTS if not args.parts or part.name in ("device", *args.parts)]
    with tempfile.TemporaryDirectory(prefix="pisa_jax_accelerator_") as folder:
        return run(
            parts, args.minutes, args.size, args.json, Path(folder), args.cache or Path(folder) / "compilation_cache"
        )


def run(parts: list[Part], minutes: float, size: str, path: Path | None, folder: Path, cache: Path) -> int:
    """Run the parts in time; temporary files are written to `folder`, and compiled programs to `cache`."""
    start = time.time()
    print(f"{minutes:g} minutes, size {size}", flush=True)
    started = datetime.datetime.fromtimestamp(start, datetime.UTC).isoformat(timespec="seconds")
    report = Report(path or folder / "results.json", started=started, minutes=minutes, size=size)
    ends, env = deadlines(parts, start, 60 * minutes), environment(cache.absolute())
    for part in parts:
        run_one(report, part, ends.get(part.name, 0.0), size, env, folder / f"{part.name}.log")
    report.finish(summarize(report.document))
    print(f"{time.time() - start:.0f} s" + (f"; results in {path}" if path else ""))
    return int(any(row["status"] == "wrong" for part in report.document["parts"] for row in part["rows"]))


def run_one(report: Report, part: Part, until: float, size: str, env: dict[str, str], log: Path) -> None:
    """Run a part and report its rows and its end."""
    start, current = time.time(), "start of the part"
    report.start_part(part.name, part.title, max(until - start, 0))

    def receive(record):
        nonlocal current
        current = record.get("start", current)
        if "row" in record:
            current = "between two rows"
            report.add_row(record["row"])

    if missing := part.missing():
        outcome = "skipped"
        report.add_row(_row(part.title, "skipped", f"not installed: {', '.join(missing)}"))
    else:
        outcome = run_part(part.name, ["--size", size, "--results", str(report.path)], until, env, log, receive)
    if outcome == "out of time":
        report.add_row(_row(current, "out of time", "the time of this part was up"))
    if outcome == "failed":
        report.add_row(_row(current, "failed", " / ".join(log.read_text(errors="replace").splitlines()[-LOG_LINES:])))
    rows = report.document["parts"][-1]["rows"]
    if outcome in ("complete", "out of time"):
        outcome = "cut short" if any(row["status"] in ("skipped", "out of time") for row in rows) else "complete"
    report.end_part(outcome, time.time() - start)


def _row(name: str, status: str, message: str) -> dict:
    return {"name": name, "status": status, "message": message[-300:], "values": {}}


if __name__ == "__main__":
    sys.exit(main())
