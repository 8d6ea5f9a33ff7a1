"""Robustness of the readers: mutated image, adapter and checkpoint files, read in a child process.

    python benchmarks/fuzz.py [--images 10000] [--adapters 2000] [--seed 0] [--minutes M] [--keep DIR] [--json FILE]

Sound files are mutated (fuzz_bytes.py, fuzz_adapters.py) and read as `pisa-sr infer` does (fuzz_reader.py): images are
also prepared for the network and written, adapters are checked against a model and multiplied out. A file must be read,
or refused with one sentence that names it. Everything else is a fault:

    traceback    an exception that the documentation of the readers does not allow, or a warning
    unclear      a message of several lines, of 1500 characters, with control characters or without the file's name
    crash        the child died
    hang         no answer after 10 s of processor time, or after 60 s
    memory       more than 20 times the bytes of the file's pixels as 8-bit RGB (at least 64 MiB), or out of memory
    left         a file was left behind
    code         code in the file was executed

File number N of seed S is the same on every machine with the same versions of the encoders. --keep stores the files
with faults, and faults.json, which describes them. Exit code 1 if there are faults. Linux only.
"""

import argparse
import collections
import contextlib
import dataclasses
import json
import os
import platform
import random
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import cv2
import numpy as np
import PIL
from fuzz_adapters import SENTINEL, adapter_seeds, mutate_adapters
from fuzz_bytes import mutate
from fuzz_images import image_seeds

FAULTS = ("traceback", "unclear", "crash", "hang", "memory", "left", "code")
HANG = 10.0  # seconds of processor time: other programs may keep the processors busy
SLEEP = 60.0  # seconds
START = 300.0  # seconds that the child may take to import its libraries
MEMORY_PER_PIXEL = 20 * 3  # bytes: 20 times 8-bit RGB
MEMORY_FLOOR = 64 * 2**20  # bytes that any file may take: the buffers of the codecs
READER = (sys.executable, str(Path(__file__).with_name("fuzz_reader.py")), "--memory", "2")


@dataclasses.dataclass(frozen=True)
class Job:
    """A mutated file."""

    # "image", "adapters" or "checkpoint"
    kind: str
    # Number of the file among those of its campaign.
    index: int
    suffix: str
    # The sound file from which it was made, and what was done to it.
    sound: bytes
    mutations: list[str]
    data: bytes


@dataclasses.dataclass(frozen=True)
class Finding:
    """A fault of one file: an entry of faults.json."""

    fault: str
    kind: str
    index: int
    file: str
    mutations: list[str]
    text: str


class Reader:
    """The child process, in a folder of its own; it is started again after it died."""

    def __init__(self, command: Sequence[str], folder: Path):
        self.command, self.folder, self.process, self.code = command, folder, None, None
        self.log = folder / "stderr.txt"
        self.clean = folder / "child"

    def ask(self, request: dict) -> dict:
        """Return the answer to a request; outcome "crash" or "hang" if there is none."""
        if self.process is None:
            self._start()
        with contextlib.suppress(BrokenPipeError):  # it has died: the answer is empty
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        line = self._line(HANG, SLEEP)
        if line:
            return json.loads(line)
        hangs = line is None
        self.close()
        text = "" if hangs else f"exit code {self.code}: {self.log.read_text(errors='replace')[-2000:]}"
        return {"outcome": "hang" if hangs else "crash", "text": text, "memory": 0, "pixels": 0}

    def left_behind(self) -> list[str]:
        """Remove the files of the child's working, temporary and home folder, and return their names."""
        names = [path.relative_to(self.clean).as_posix() for path in self.clean.rglob("*") if not path.is_dir()]
        for name in names:
            (self.clean / name).unlink()
        return names

    def close(self) -> None:
        """End the child."""
        if self.process:
            self.process.kill()
            self.code = self.process.wait()
            with contextlib.suppress(BrokenPipeError):
                self.process.stdin.close()
            self.process.stdout.close()
            self.process = None

    def _start(self) -> None:
        self.clean.mkdir(exist_ok=True)
        own = dict.fromkeys(("TMPDIR", "HOME", "XDG_CACHE_HOME"), str(self.clean))
        environment = os.environ | own | {"OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"}
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(
                self.command,
                cwd=self.clean,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        if self._line(START, START) != "ready\n":
            raise RuntimeError(f"the reader does not start: {self.log.read_text(errors='replace')}")

    def _line(self, busy: float, seconds: float) -> str | None:
        """Return a line of the child, "" if it died, None after `busy` seconds of its processor time or `seconds`."""
        end, before = time.monotonic() + seconds, self._busy()
        while time.monotonic() < end and self._busy() - before < busy:
            ready, _, _ = select.select([self.process.stdout], [], [], 1)
            if ready:
                return self.process.stdout.readline()
        return None

    def _busy(self) -> float:
        """Return the processor time of the child in seconds."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Campaign:
    """Counts and findings over files that are read one after the other."""

    def __init__(self, reader: Reader, keep: Path | None = None):
        self.reader, self.keep = reader, keep
        self.counts: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
        self.findings: list[Finding] = []

    def read(self, job: Job) -> None:
        """Let the child read a file, and record what happened."""
        folder = self.reader.folder / "in"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        path, sound = folder / f"file{job.suffix}", folder / f"sound{job.suffix}"
        path.write_bytes(job.data)
        sound.write_bytes(job.sound)
        request = {"kind": job.kind, "path": str(path), "sound": str(sound)}
        answer = self.reader.ask(request)
        counts = self.counts[f"{job.kind} {job.suffix}"]
        counts["tried"] += 1
        counts[answer["outcome"]] += 1
        faults = {answer["outcome"]: answer["text"]} if answer["outcome"] in FAULTS else {}
        allowed = max(MEMORY_FLOOR, MEMORY_PER_PIXEL * answer["pixels"], 20 * len(job.data))
        if answer["memory"] > allowed and "memory" not in faults:
            faults["memory"] = f"{answer['memory'] / 2**20:.0f} MiB for {answer['pixels']} pixels; {answer['text']}"
            counts["memory"] += 1
        left = self.reader.left_behind() + [file.name for file in folder.iterdir() if file not in (path, sound)]
        if left:
            fault = "code" if SENTINEL in left else "left"
            faults[fault] = ", ".join(left)
            counts[fault] += 1
        self.findings += [self._keep(job, fault, text) for fault, text in faults.items()]
        if self.keep and faults:
            described = [dataclasses.asdict(finding) for finding in self.findings]
            (self.keep / "faults.json").write_text(json.dumps(described, indent=1))

    def _keep(self, job: Job, fault: str, text: str) -> Finding:
        name = f"{fault}-{job.kind}-{job.index}{job.suffix}"
        if self.keep:
            (self.keep / name).write_bytes(job.data)
        return Finding(fault, job.kind, job.index, name, job.mutations, text)


def image_job(seeds: Sequence[tuple[str, bytes]], seed: int, index: int) -> Job:
    """Make image number `index` of a campaign; every format gets the same share."""
    rng = random.Random(f"image {seed} {index}")
    suffixes = sorted({suffix for suffix, _ in seeds})
    suffix = suffixes[index % len(suffixes)]
    same = [data for each, data in seeds if each == suffix]
    sound = rng.choice(same)
    others = same if rng.random() < 0.5 else [data for _, data in seeds]
    data, mutations = mutate(sound, others, rng)
    return Job("image", index, suffix, sound, mutations, data)


def adapter_job(seeds: Sequence[tuple[str, str, bytes]], seed: int, index: int) -> Job:
    """Make adapter or checkpoint file number `index` of a campaign."""
    rng = random.Random(f"adapters {seed} {index}")
    kind, suffix, sound = seeds[index % len(seeds)]
    data, mutations = mutate_adapters(sound, [data for *_, data in seeds], rng)
    return Job(kind, index, suffix, sound, mutations, data)


def jobs(images: int, adapters: int, seed: int) -> Iterator[Job]:
    """Make the files of both campaigns, mixed evenly."""
    image_files, adapter_files = image_seeds(), adapter_seeds()
    counts = (images, adapters)
    order = sorted(((n + 0.5) / count, kind, n) for kind, count in enumerate(counts) for n in range(count))
    for _, is_adapter, index in order:
        yield adapter_job(adapter_files, seed, index) if is_adapter else image_job(image_files, seed, index)


def table(counts: dict[str, collections.Counter]) -> str:
    """Format the counts of each kind of file, and their sums, as Markdown."""
    columns = ("tried", "read", "refused", *FAULTS)
    rows = [("| file |" + "|".join(f" {column} " for column in columns) + "|"), "|---|" + "---:|" * len(columns)]
    sums = {kind: collections.Counter() for kind in sorted({name.split()[0] for name in counts})}
    for name in sorted(counts):
        sums[name.split()[0]].update(counts[name])
    for name, row in [*sorted(counts.items()), *((f"all of {kind}", total) for kind, total in sums.items())]:
        rows.append(f"| {name} |" + "|".join(f" {row[column]} " for column in columns) + "|")
    return "\n".join(rows)


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--adapters", type=int, default=2_000, help="adapter and checkpoint files")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, help="stop after this time")
    parser.add_argument("--keep", type=Path, help="folder for the files with faults")
    parser.add_argument("--json", type=Path, help="write the counts and the faults to this file")
    arguments = parser.parse_args()
    if arguments.keep:
        arguments.keep.mkdir(parents=True, exist_ok=True)
    versions = f"numpy {np.__version__}, Pillow {PIL.__version__}, OpenCV {cv2.__version__}"
    print(f"python {platform.python_version()}, {versions}, {platform.machine()}, seed {arguments.seed}", flush=True)
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        campaign = Campaign(Reader(READER, Path(folder)), arguments.keep)
        for job in jobs(arguments.images, arguments.adapters, arguments.seed):
            if arguments.minutes and time.monotonic() - start > 60 * arguments.minutes:
                break
            campaign.read(job)
        campaign.reader.close()
    print(table(campaign.counts))
    findings = [dataclasses.asdict(finding) for finding in campaign.findings]
    for finding in findings[:20]:
        lines = finding["text"].strip().splitlines() or [""]
        print(f"{finding['fault']}: {finding['file']} ({', '.join(finding['mutations'])}): {lines[-1][:300]!a}")
    print(f"{len(findings)} faults, {time.monotonic() - start:.0f} s")
    if arguments.json:
        arguments.json.write_text(json.dumps({"seed": arguments.seed, "counts": campaign.counts, "faults": findings}))
    return bool(findings)


if __name__ == "__main__":
    sys.exit(main())
