"""The training loader: source -> crop -> degrade -> batch, in worker processes, resumable to the batch.

Batch number k of the whole run holds the same pictures, crops and degradations whatever the number of workers and
however the batch is split over processes: positions k*B .. (k+1)*B-1 of one endless, per-epoch shuffled sequence, each
with its own random stream. So the loader's state is a batch number, and resuming costs nothing.
"""

import functools
import json
import logging
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import grain
import numpy as np
from absl import flags
from jaxtyping import Float, UInt8
from PIL import Image

from pisa_jax.data.sources import MixedSource, Source, SourceImage

logger = logging.getLogger(__name__)

DegradeFunction = Callable[[np.ndarray, np.random.Generator], np.ndarray]

# Consecutive unreadable draws that stop a worker: at a bad share of 10 % this happens once in 1e10 records by chance.
MAX_FAILURES = 10
# Samples of a run, more than any run takes: grain's own endless `repeat()` overflows where batches hold one sample.
ENDLESS = 2**40


class TrainingSample(NamedTuple):
    """One training pair as it travels between processes: 8 bit, a quarter of the float32 it becomes."""

    gt: UInt8[np.ndarray, "c c 3"]
    lq: UInt8[np.ndarray, "c c 3"]
    path: str
    use_prompt: bool
    skipped: tuple[str, ...]


def read_prompts(path: str | os.PathLike) -> dict[str, str]:
    """Prompts by picture name from a JSONL file of {"path": ..., "prompt": ...}, paths relative to the source's root.

    Raises ValueError with the number of the first line that is not such an object. Blank lines are allowed.
    """
    prompts = {}
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error})") from error
        if not isinstance(entry, dict) or not all(isinstance(entry.get(key), str) for key in ("path", "prompt")):
            raise ValueError(f'{path}, line {number}: {line[:80]!r} is not {{"path": text, "prompt": text}}')
        prompts[entry["path"]] = entry["prompt"]
    return prompts


def read_source_image(source: Source, index: int, rng: np.random.Generator) -> tuple[SourceImage, tuple[str, ...]]:
    """SourceImage `index`, or where it cannot be read one drawn by rng; also the reasons, one per file passed over.

    Raises OSError with all reasons after MAX_FAILURES unreadable files in a row: the source as a whole is broken.
    """
    skipped: list[str] = []
    for _ in range(MAX_FAILURES):
        try:
            record = source.draw(index, rng) if isinstance(source, MixedSource) else source[index]
            return record, tuple(skipped)
        except OSError as error:
            skipped.append(str(error))
            index = int(rng.integers(len(source)))
    raise OSError(f"{MAX_FAILURES} pictures in a row cannot be read:\n" + "\n".join(skipped))


def crop_pair(
    record: SourceImage, crop: int, flip: bool, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray | None]:
    """The same random crop x crop window of image and lq, mirrored left-right half of the time if `flip`.

    Pictures smaller than the crop are first enlarged (bicubic) until their shorter side equals it.
    """
    pictures = [record.image] if record.lq is None else [record.image, record.lq]
    height, width = record.image.shape[:2]
    if min(height, width) < crop:
        scale = crop / min(height, width)
        height, width = max(crop, round(height * scale)), max(crop, round(width * scale))
        bicubic = Image.Resampling.BICUBIC
        pictures = [np.asarray(Image.fromarray(p).resize((width, height), bicubic)) for p in pictures]
    top, left = rng.integers(height - crop + 1), rng.integers(width - crop + 1)
    step = -1 if flip and rng.random() < 0.5 else 1
    windows = [np.ascontiguousarray(p[top : top + crop, left : left + crop][:, ::step]) for p in pictures]
    return windows[0], windows[1] if len(windows) > 1 else None


def make_training_sample(
    index: int,
    rng: np.random.Generator,
    *,
    source: Source,
    crop: int,
    flip: bool,
    null_prompt_probability: float,
    degrade: DegradeFunction | None,
) -> TrainingSample:
    """Read, crop, flip and degrade record `index`, all by rng. A record that brings its own lq is not degraded."""
    record, skipped = read_source_image(source, index, rng)
    gt, lq = crop_pair(record, crop, flip, rng)
    use_prompt = bool(rng.random() >= null_prompt_probability)
    if lq is None:
        degraded = degrade(gt.astype(np.float32) / np.float32(255), rng)
        if degraded.shape != gt.shape:
            raise ValueError(f"degrade returned shape {degraded.shape} for a crop of shape {gt.shape}; it must keep it")
        lq = np.rint(np.clip(degraded, 0, 1) * 255).astype(np.uint8)
    return TrainingSample(gt, lq, record.path, use_prompt, skipped)


def _stack_samples(samples: Sequence[TrainingSample]) -> dict[str, Any]:
    """Samples as one dict: the two picture arrays, and lists for what is not worth shared memory."""
    return {
        "gt": np.stack([sample.gt for sample in samples]),
        "lq": np.stack([sample.lq for sample in samples]),
        "path": [sample.path for sample in samples],
        "use_prompt": [sample.use_prompt for sample in samples],
        "skipped": [reason for sample in samples for reason in sample.skipped],
    }


def to_float(pictures: UInt8[np.ndarray, "*shape"]) -> Float[np.ndarray, "*shape"]:
    """8 bit 0..255 to float32 -1..1: x / 127.5 - 1."""
    scaled = np.divide(pictures, np.float32(127.5), dtype=np.float32)
    return np.subtract(scaled, np.float32(1), out=scaled)


def _exit_with_parent() -> None:
    multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def _start_worker(index: int, count: int) -> None:
    # The trainer decides when to stop: a signal sent to the whole process group must not break the batch that it waits
    # for before saving. A trainer that was killed takes its workers along through the watching thread.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    cv2.setNumThreads(1)


def _close_all(running: list[grain.DatasetIterator]) -> None:
    while running:
        running.pop().close()


class Loader:
    """Endless iterator of batches; see `make_loader`. Use `close()` to end its worker processes at once."""

    def __init__(
        self,
        batches: grain.MapDataset,
        *,
        shard: tuple[int, int],
        workers: int,
        prompts: Mapping[str, str],
        max_bad: float,
        fingerprint: dict[str, Any],
    ):
        self._batches, self._shard, self._workers = batches, shard, workers
        self._prompts, self._max_bad, self.fingerprint = prompts, max_bad, fingerprint
        self._position = 0
        self.bad_files: set[str] = set()
        self._running: list[grain.DatasetIterator] = []  # the one that reads ahead, or none
        # Also at garbage collection and at exit, or read-ahead batches would be left in shared memory.
        weakref.finalize(self, _close_all, self._running)

    def __iter__(self) -> "Loader":
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        if not self._running:
            self._running.append(self._start())
        batch = next(self._running[0])
        self._position += 1
        self._count_unreadable(batch["skipped"])
        return {
            "lq": to_float(batch["lq"]),
            "gt": to_float(batch["gt"]),
            "prompt": np.array([self._prompts.get(path, "") for path in batch["path"]], dtype=np.str_),
            "use_prompt": np.array(batch["use_prompt"]),
            "path": np.array(batch["path"], dtype=np.str_),
        }

    def _start(self) -> grain.DatasetIterator:
        index, count = self._shard
        batches = self._batches[self._position * count + index :: count]
        # With workers the reading happens in their main threads; without, one thread reads ahead of the training step.
        ahead = grain.ReadOptions(num_threads=0 if self._workers else 1, prefetch_buffer_size=2)
        dataset = batches.to_iter_dataset(ahead)
        if self._workers:
            options = grain.MultiprocessingOptions(num_workers=self._workers, per_worker_buffer_size=1)
            dataset = dataset.mp_prefetch(options, worker_init_fn=_start_worker)
        return iter(dataset)

    def _count_unreadable(self, reasons: Sequence[str]) -> None:
        for reason in sorted(set(reasons) - self.bad_files):
            self.bad_files.add(reason)
            logger.warning("skipped unreadable picture %d: %s", len(self.bad_files), reason)
        if len(self.bad_files) > self._max_bad:
            raise OSError(
                f"{len(self.bad_files)} pictures cannot be read, {self._max_bad:g} are tolerated (max_bad_share):\n"
                + "\n".join(sorted(self.bad_files))
            )

    def get_state(self) -> dict[str, Any]:
        """The number of batches given so far and the fingerprint, fit for JSON; the same on every process."""
        return {"batches": self._position, "fingerprint": self.fingerprint}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Go on after a saved state. ValueError naming the fields in which that run's data differs from this one's."""
        saved = state["fingerprint"]
        fields = sorted(saved.keys() | self.fingerprint.keys())
        changed = [field for field in fields if saved.get(field) != self.fingerprint.get(field)]
        if changed:
            listing = ", ".join(f"{name} was {saved.get(name)} and is {self.fingerprint.get(name)}" for name in changed)
            raise ValueError(f"the data differs from the saved run's: {listing}; restore these or start a new run")
        self.close()
        self._position = int(state["batches"])

    def close(self) -> None:
        """End the worker processes; the next batch starts them again."""
        _close_all(self._running)


def _check_arguments(
    source: Source, prompts: Mapping[str, str], degrade: DegradeFunction | None, **numbers: int | float
) -> None:
    for name in ("batch_size", "crop", "process_count"):
        if numbers[name] < 1:
            raise ValueError(f"{name} is {numbers[name]}; it must be at least 1")
    for name in ("null_prompt_probability", "max_bad_share"):
        if not 0 <= numbers[name] <= 1:
            raise ValueError(f"{name} is {numbers[name]}; it must be in 0..1")
    if not 0 <= numbers["process_index"] < numbers["process_count"]:
        raise ValueError(f"process_index {numbers['process_index']} is not in 0..{numbers['process_count'] - 1}")
    if numbers["workers"] < 0:
        raise ValueError(f"workers is {numbers['workers']}; use 0 to read in this process, or a number of processes")
    if degrade is None and not source.paired:
        raise ValueError("degrade is None, but the source has no LQ pictures; pass a degradation or a paired source")
    if prompts and source.names and not prompts.keys() & set(source.names):
        raise ValueError(
            f"none of the {len(prompts)} prompts names a picture of the source: the prompts have e.g. "
            f"{next(iter(prompts))!r}, the source {source.names[0]!r}; paths are relative to the source's root"
        )


def make_loader(
    source: Source,
    *,
    batch_size: int,
    crop: int,
    seed: int,
    degrade: DegradeFunction | None,
    process_index: int = 0,
    process_count: int = 1,
    workers: int = 0,
    prompts: Mapping[str, str] | None = None,
    null_prompt_probability: float = 0.5,
    flip: bool = True,
    max_bad_share: float = 0.01,
) -> Loader:
    """Endless batches of training pairs; `batch_size` is per process, `workers` the number of reading processes.

    A batch is {"lq", "gt": float32 (b, crop, crop, 3) in -1..1, "prompt": str (b,), "use_prompt": bool (b,), False
    with `null_prompt_probability` per sample, "path": str (b,)}. `degrade` maps a GT crop (float32, 0..1) and an rng to
    an LQ crop of the same shape; paired sources bring their own LQ and skip it. Every worker holds up to four batches.

    Unreadable pictures: each is replaced by another, drawn by the record's rng, so batches stay full and the sequence
    stays reproducible. The reason travels with the batch to the consuming process, the one place that sees what all
    workers met: it logs every bad file once, counts it, and raises OSError with the whole list once more than
    `max_bad_share` of the source is bad. (Each process of a multi-process run counts what it met itself.) A source that
    gives nothing but errors is stopped earlier, see `read_source_image`.
    """
    prompts = prompts or {}
    numbers = {"batch_size": batch_size, "crop": crop, "process_index": process_index, "process_count": process_count}
    numbers |= {"workers": workers, "null_prompt_probability": null_prompt_probability, "max_bad_share": max_bad_share}
    _check_arguments(source, prompts, degrade, **numbers)
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # grain reads absl flags, which nobody parses outside absl.app
    sample = functools.partial(
        make_training_sample,
        source=source,
        crop=crop,
        flip=flip,
        null_prompt_probability=null_prompt_probability,
        degrade=degrade,
    )
    # random_map comes after repeat and before the split over processes: its rng is then a function of the seed and the
    # global position alone, never shared by two samples.
    epochs = -(-ENDLESS // len(source))
    samples = grain.MapDataset.range(len(source)).seed(seed).shuffle().repeat(epochs).random_map(sample)
    return Loader(
        samples.batch(batch_size, batch_fn=_stack_samples),
        shard=(process_index, process_count),
        workers=workers,
        prompts=prompts,
        max_bad=max_bad_share * len(source),
        fingerprint={
            "source": source.identity,
            "records": len(source),
            "seed": seed,
            "global_batch": batch_size * process_count,
            "crop": crop,
            "flip": flip,
            "null_prompt_probability": null_prompt_probability,
        },
    )
