"""The training loader: source -> crop -> degrade -> batch, in worker processes, with exact resume.

Batch k of a run consists of positions k*B .. (k+1)*B-1 of one endless sequence of samples, which is shuffled per epoch,
and every sample has its own random stream. A batch therefore does not depend on the number of workers or on the
partition of the batch over processes, and the state of the loader is the number of batches.
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
from jaxtyping import UInt8
from PIL import Image

from pisa_jax.data.sources import MixedSource, Source, SourceImage
from pisa_jax.imaging.ranges import uint8_to_signed, uint8_to_unit, unit_to_uint8

logger = logging.getLogger(__name__)

DegradeFunction = Callable[[np.ndarray, np.random.Generator], np.ndarray]

# Consecutive unreadable images that stop a worker: with 10 % unreadable images, 1 in 1e10 samples stops by chance.
MAX_FAILURES = 10
# Number of samples of the sequence, more than any run needs: grain's endless `repeat()` overflows at batch size 1.
ENDLESS = 2**40


class TrainingSample(NamedTuple):
    """A training pair as sent between processes: 8 bits per channel, a quarter of the size of float32."""

    gt: UInt8[np.ndarray, "c c 3"]
    lq: UInt8[np.ndarray, "c c 3"]
    path: str
    use_prompt: bool
    skipped: tuple[str, ...]


def read_prompts(path: str | os.PathLike) -> dict[str, str]:
    """Read prompts by image path from a JSONL file of {"path": ..., "prompt": ...}; blank lines are skipped.

    Paths are relative to the root of the source. Raises ValueError with the number of the first malformed line.
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
    """Read image `index`, or random others until one is readable; returns it and the reason of every skipped file.

    Raises OSError with all reasons after MAX_FAILURES unreadable files in a row.
    """
    skipped: list[str] = []
    for _ in range(MAX_FAILURES):
        try:
            source_image = source.draw(index, rng) if isinstance(source, MixedSource) else source[index]
            return source_image, tuple(skipped)
        except OSError as error:
            skipped.append(str(error))
            index = int(rng.integers(len(source)))
    raise OSError(f"{MAX_FAILURES} images in a row cannot be read:\n" + "\n".join(skipped))


def crop_pair(
    source_image: SourceImage, crop: int, flip: bool, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray | None]:
    """Crop the same random crop x crop window of GT and LQ, mirrored left-right with probability 1/2 if `flip`.

    Images smaller than the crop are first upscaled (bicubic) until their shorter side equals it. LQ is None for a
    source without LQ images.
    """
    images = [source_image.image] if source_image.lq is None else [source_image.image, source_image.lq]
    height, width = source_image.image.shape[:2]
    if min(height, width) < crop:
        scale = crop / min(height, width)
        height, width = max(crop, round(height * scale)), max(crop, round(width * scale))
        bicubic = Image.Resampling.BICUBIC
        images = [np.asarray(Image.fromarray(image).resize((width, height), bicubic)) for image in images]
    top, left = rng.integers(height - crop + 1), rng.integers(width - crop + 1)
    step = -1 if flip and rng.random() < 0.5 else 1
    crops = [np.ascontiguousarray(image[top : top + crop, left : left + crop][:, ::step]) for image in images]
    return crops[0], crops[1] if len(crops) > 1 else None


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
    """Read, crop, flip and degrade image `index`; pairs are not degraded. `rng` draws all random numbers."""
    source_image, skipped = read_source_image(source, index, rng)
    gt, lq = crop_pair(source_image, crop, flip, rng)
    use_prompt = bool(rng.random() >= null_prompt_probability)
    if lq is None:
        degraded = degrade(uint8_to_unit(gt), rng)
        if degraded.shape != gt.shape:
            raise ValueError(
                f"degrade returned shape {degraded.shape} for a crop of shape {gt.shape}; shapes must match"
            )
        lq = unit_to_uint8(degraded)
    return TrainingSample(gt, lq, source_image.path, use_prompt, skipped)


def _stack_samples(samples: Sequence[TrainingSample]) -> dict[str, Any]:
    """Collate samples: images as arrays (which grain sends through shared memory), the rest as lists."""
    return {
        "gt": np.stack([sample.gt for sample in samples]),
        "lq": np.stack([sample.lq for sample in samples]),
        "path": [sample.path for sample in samples],
        "use_prompt": [sample.use_prompt for sample in samples],
        "skipped": [reason for sample in samples for reason in sample.skipped],
    }


def _exit_with_parent() -> None:
    multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def _start_worker(index: int, count: int) -> None:
    # The training process decides when to stop: a signal to the whole process group must not interrupt the batch that
    # it needs before it saves. If the training process is killed, the thread ends the worker.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    cv2.setNumThreads(1)


def _close_all(iterators: list[grain.DatasetIterator]) -> None:
    while iterators:
        iterators.pop().close()


class Loader:
    """Endless iterator of batches, made by `make_loader`. `close()` ends its worker processes.

    An unreadable image is replaced by a random other image, drawn with the rng of the sample, so batches remain full
    and the sequence reproducible. The reason is sent with the batch to the process that consumes the batches, which
    logs every bad file once and raises OSError with the list of all when their share exceeds `max_bad_share`. Each
    process of a multi-process run counts only the files that it read. `read_source_image` stops earlier if many images
    in a row are unreadable.
    """

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
        self._iterators: list[grain.DatasetIterator] = []  # the one in use, or none before the first batch
        # Also at garbage collection and at exit: prefetched batches would otherwise remain in shared memory.
        weakref.finalize(self, _close_all, self._iterators)

    def __iter__(self) -> "Loader":
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        if not self._iterators:
            self._iterators.append(self._start())
        batch = next(self._iterators[0])
        self._position += 1
        self._count_unreadable(batch["skipped"])
        return {
            "lq": uint8_to_signed(batch["lq"]),
            "gt": uint8_to_signed(batch["gt"]),
            "prompt": np.array([self._prompts.get(path, "") for path in batch["path"]], dtype=np.str_),
            "use_prompt": np.array(batch["use_prompt"]),
            "path": np.array(batch["path"], dtype=np.str_),
        }

    def _start(self) -> grain.DatasetIterator:
        index, count = self._shard
        batches = self._batches[self._position * count + index :: count]
        # Workers read in their main threads; without workers, one thread prefetches during the training step.
        read_options = grain.ReadOptions(num_threads=0 if self._workers else 1, prefetch_buffer_size=2)
        dataset = batches.to_iter_dataset(read_options)
        if self._workers:
            options = grain.MultiprocessingOptions(num_workers=self._workers, per_worker_buffer_size=1)
            dataset = dataset.mp_prefetch(options, worker_init_fn=_start_worker)
        return iter(dataset)

    def _count_unreadable(self, reasons: Sequence[str]) -> None:
        for reason in sorted(set(reasons) - self.bad_files):
            self.bad_files.add(reason)
            logger.warning("skipped unreadable image %d: %s", len(self.bad_files), reason)
        if len(self.bad_files) > self._max_bad:
            raise OSError(
                f"{len(self.bad_files)} images cannot be read, at most {self._max_bad:g} are allowed (max_bad_share):\n"
                + "\n".join(sorted(self.bad_files))
            )

    def get_state(self) -> dict[str, Any]:
        """State for a checkpoint, as JSON types: number of batches and fingerprint; the same on every process."""
        return {"batches": self._position, "fingerprint": self.fingerprint}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Continue after a saved state. Raises ValueError with the fields in which the fingerprints differ."""
        saved = state["fingerprint"]
        fields = sorted(saved.keys() | self.fingerprint.keys())
        changed = [field for field in fields if saved.get(field) != self.fingerprint.get(field)]
        if changed:
            listing = ", ".join(f"{name} was {saved.get(name)} and is {self.fingerprint.get(name)}" for name in changed)
            raise ValueError(f"the data differs from that of the saved run: {listing}; restore it or start a new run")
        self.close()
        self._position = int(state["batches"])

    def close(self) -> None:
        """End the worker processes; the next batch starts them again."""
        _close_all(self._iterators)


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
        raise ValueError(
            f"workers is {numbers['workers']}; use 0 to read in this process, or a positive number of processes"
        )
    if degrade is None and not source.paired:
        raise ValueError("degrade is None, but the source has no LQ images; pass a degradation or a paired source")
    if prompts and source.names and not prompts.keys() & set(source.names):
        raise ValueError(
            f"none of the {len(prompts)} prompts has the path of an image of the source: the prompts have e.g. "
            f"{next(iter(prompts))!r}, the source {source.names[0]!r}; give paths relative to the root of the source"
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
    """Make a loader of endless batches of training pairs.

    A batch is {"lq", "gt": float32 (b, crop, crop, 3) in [-1, 1]; "prompt", "path": str (b,); "use_prompt": bool (b,)}.

    Args:
        batch_size: samples per process and batch.
        degrade: maps a GT crop (float32 in [0, 1]) and an rng to an LQ crop of the same shape; not used for pairs.
        process_index: selects the part of every global batch that this process reads.
        process_count: number of processes that share a global batch.
        workers: number of reading processes; each holds up to four batches. 0 reads in a thread of this process.
        prompts: {path: prompt}; images without an entry have the empty prompt.
        null_prompt_probability: probability that `use_prompt` is False, per sample.
        max_bad_share: largest allowed share of unreadable images.

    Unreadable images are replaced, see `Loader`. Raises ValueError for invalid arguments.
    """
    prompts = prompts or {}
    numbers = {"batch_size": batch_size, "crop": crop, "process_index": process_index, "process_count": process_count}
    numbers |= {"workers": workers, "null_prompt_probability": null_prompt_probability, "max_bad_share": max_bad_share}
    _check_arguments(source, prompts, degrade, **numbers)
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # grain reads absl flags, which only absl.app parses
    options = {"crop": crop, "flip": flip, "null_prompt_probability": null_prompt_probability}
    sample = functools.partial(make_training_sample, source=source, degrade=degrade, **options)
    # random_map comes after repeat and before the partition over processes: its rng then depends only on the seed and
    # the global position, and no two samples share one.
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
            **options,
        },
    )
