"""The training loader: source -> crop -> degrade -> batch, in worker processes, with exact resume.

Batch k of a run consists of positions k*B .. (k+1)*B-1 of one endless sequence of samples, which is shuffled per epoch,
and every sample has its own random stream. A batch therefore does not depend on the number of workers or on the
partition of the batch over processes, and the state of the loader is the number of batches.
"""

import functools
import logging
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import cv2
import grain
import numpy as np
from absl import flags

from pisa_jax.data.latents import LatentSource
from pisa_jax.data.prompts import check_prompts, digest_prompts
from pisa_jax.data.prompts import read_prompts as read_prompts
from pisa_jax.data.samples import DegradeFunction, TrainingSample, make_latent_sample, make_training_sample
from pisa_jax.data.sources import Source, StoredSource
from pisa_jax.data.text_files import normalize_path
from pisa_jax.data.unusable_files import UnusableFiles
from pisa_jax.imaging.ranges import uint8_to_signed

logger = logging.getLogger(__name__)

# Number of samples of the sequence, more than any run needs: grain's endless `repeat()` overflows at batch size 1.
ENDLESS = 2**40
# Records of a packed set that are read at the start for the share of images with a prompt.
MAX_NAMES_READ = 1000
# Part of grain's message about a worker that was killed.
WORKER_ENDED = "Worker process was terminated unexpectedly"


def _stack_samples(samples: Sequence[TrainingSample]) -> dict[str, Any]:
    """Collate samples: images as arrays (which grain sends through shared memory), the rest as lists."""
    return {
        "gt": np.stack([sample.gt for sample in samples]),
        "lq": np.stack([sample.lq for sample in samples]),
        "path": [sample.path for sample in samples],
        "use_prompt": [sample.use_prompt for sample in samples],
        "unusable": [report for sample in samples for report in sample.unusable],
    }


def _to_float32(values: np.ndarray) -> np.ndarray:
    """Convert 8-bit images to [-1, 1]; latents keep their values."""
    return uint8_to_signed(values) if values.dtype == np.uint8 else values.astype(np.float32)


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


class _Rows:
    """Samples at the given rows of every batch of `batch_size` consecutive samples."""

    def __init__(self, samples: grain.MapDataset, batch_size: int, rows: Sequence[int]):
        self._samples, self._batch_size, self._rows = samples, batch_size, tuple(rows)

    def __len__(self) -> int:
        return len(self._samples) // self._batch_size * len(self._rows)

    def __getitem__(self, index: int) -> TrainingSample:
        batch, place = divmod(int(index), len(self._rows))
        return self._samples[batch * self._batch_size + self._rows[place]]


class Loader:
    """Endless iterator of batches, made by `make_loader`. `close()` ends its worker processes.

    An unreadable or too small image is replaced by a random other image, drawn with the rng of the sample, so batches
    remain full and the sequence reproducible. The reason is sent with the batch to the process that consumes the
    batches, which logs every bad file once and raises OSError with the list of all when their share exceeds
    `max_bad_share`. Each process of a multi-process run counts only the files that it read. `read_source_image` stops
    earlier if many images in a row are unreadable.
    """

    def __init__(
        self,
        batches: grain.MapDataset,
        *,
        workers: int,
        prompts: Mapping[str, str],
        unusable: UnusableFiles,
        fingerprint: dict[str, Any],
    ):
        self._batches, self._workers = batches, workers
        self.prompts, self._unusable, self.fingerprint = prompts, unusable, fingerprint
        self._position = 0
        self._iterators: list[grain.DatasetIterator] = []  # the one in use, or none before the first batch
        # Also at garbage collection and at exit: prefetched batches would otherwise remain in shared memory.
        weakref.finalize(self, _close_all, self._iterators)

    def __iter__(self) -> "Loader":
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        self.check_files()
        if not self._iterators:
            self._iterators.append(self._start())
        try:
            batch = next(self._iterators[0])
        except RuntimeError as error:
            if WORKER_ENDED not in str(error):
                raise
            raise OSError(
                "a data worker was ended from outside, probably because memory ran out; lower data.workers or the "
                f"batch size, and continue from the newest checkpoint with --resume: {error}"
            ) from error
        self._position += 1
        self._unusable.add(batch["unusable"])
        self.check_files()
        return {
            "lq": _to_float32(batch["lq"]),
            "gt": _to_float32(batch["gt"]),
            "prompt": np.array([self.prompts.get(normalize_path(path), "") for path in batch["path"]], np.str_),
            "use_prompt": np.array(batch["use_prompt"]),
            "path": np.array(batch["path"], dtype=np.str_),
        }

    def _start(self) -> grain.DatasetIterator:
        # Workers read in their main threads; without workers, one thread prefetches during the training step.
        read_options = grain.ReadOptions(num_threads=0 if self._workers else 1, prefetch_buffer_size=2)
        dataset = self._batches[self._position :].to_iter_dataset(read_options)
        if self._workers:
            options = grain.MultiprocessingOptions(num_workers=self._workers, per_worker_buffer_size=1)
            dataset = dataset.mp_prefetch(options, worker_init_fn=_start_worker)
        return iter(dataset)

    @property
    def bad_files(self) -> dict[str, str]:
        """Unreadable files so far: the reason by name."""
        return self._unusable.unreadable

    @property
    def counts(self) -> dict[str, int]:
        """Number of distinct files so far that were "unreadable", too "small", or "upscaled" to the crop."""
        return self._unusable.counts

    def check_files(self) -> None:
        """Raise OSError with a list of the unreadable files if there are more than `max_bad_share` allows.

        Before the first batch these are the files of a list that do not exist.
        """
        self._unusable.check()

    def get_state(self) -> dict[str, Any]:
        """State for a checkpoint, as JSON types: number of batches and fingerprint; the same on every process."""
        return {"batches": self._position, "fingerprint": self.fingerprint}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Continue after a saved state.

        Fields that only one of the fingerprints has, as after an update of the package, are logged and not compared.

        Raises:
            ValueError: the fingerprints differ; the message has the fields.
        """
        saved = state["fingerprint"]
        common = sorted(saved.keys() & self.fingerprint.keys())
        changed = [field for field in common if saved[field] != self.fingerprint[field]]
        if changed:
            listing = ", ".join(f"{name} was {saved[name]} and is {self.fingerprint[name]}" for name in changed)
            raise ValueError(f"the data differs from that of the saved run: {listing}; restore it or start a new run")
        if unknown := sorted(saved.keys() ^ self.fingerprint.keys()):
            logger.warning("saved by another version: %s of the data cannot be compared", ", ".join(unknown))
        self.close()
        self._position = int(state["batches"])

    def close(self) -> None:
        """End the worker processes; the next batch starts them again."""
        _close_all(self._iterators)


def _check_arguments(
    source: Source, degrade: DegradeFunction | None, rows: Sequence[int], **numbers: int | float
) -> None:
    for name in ("batch_size", "crop"):
        if numbers[name] < 1:
            raise ValueError(f"{name} is {numbers[name]}; it must be at least 1")
    for name in ("null_prompt_probability", "max_bad_share", "min_size_share"):
        if not 0 <= numbers[name] <= 1:
            raise ValueError(f"{name} is {numbers[name]}; it must be in 0..1")
    if outside := [row for row in rows if not 0 <= row < numbers["batch_size"]]:
        raise ValueError(f"rows has {outside[0]}, and a batch has the rows 0..{numbers['batch_size'] - 1}")
    if not rows:
        raise ValueError("rows is empty; each process reads at least one row of every batch")
    if numbers["workers"] < 0:
        raise ValueError(
            f"workers is {numbers['workers']}; use 0 to read in this process, or a positive number of processes"
        )
    if degrade is None and not source.paired:
        raise ValueError("degrade is None, but the source has no LQ images; pass a degradation or a paired source")
    if isinstance(source, LatentSource) and (smallest := min(source.shape[1:3])) < numbers["crop"]:
        raise ValueError(
            f"crop is {numbers['crop']} latents, and those in {source.root} are {source.shape[2]} x {source.shape[1]}; "
            f"use a crop of at most {smallest} latents"
        )


def _check_prompts(source: Source, prompts: Mapping[str, str]) -> None:
    if source.names:
        check_prompts(prompts, source.names, len(source.names), len(source.names))
    elif isinstance(source, StoredSource):
        check_prompts(prompts, source.paths(), len(source), MAX_NAMES_READ)


def _make_batches(
    sample: Callable[..., TrainingSample], count: int, seed: int, batch_size: int, rows: Sequence[int]
) -> grain.MapDataset:
    """Make the endless sequence of batches of `sample(index, rng)`, shuffled per epoch, with the given rows of each."""
    # random_map comes after repeat and before the selection of rows: its rng then depends only on the seed and the
    # global position, and no two samples share one.
    samples = grain.MapDataset.range(count).seed(seed).shuffle().repeat(-(-ENDLESS // count)).random_map(sample)
    if list(rows) != list(range(batch_size)):
        samples = grain.MapDataset.source(_Rows(samples, batch_size, rows))
    return samples.batch(len(rows), batch_fn=_stack_samples)


def make_loader(
    source: Source,
    *,
    batch_size: int,
    crop: int,
    seed: int,
    degrade: DegradeFunction | None,
    rows: Sequence[int] | None = None,
    workers: int = 0,
    prompts: Mapping[str, str] | None = None,
    null_prompt_probability: float = 0.5,
    flip: bool = True,
    max_bad_share: float = 0.01,
    min_size_share: float = 0.5,
) -> Loader:
    """Make a loader of endless batches of training pairs.

    A batch is {"lq", "gt": float32 (b, crop, crop, 3) in [-1, 1]; "prompt", "path": str (b,); "use_prompt": bool (b,)}.
    Of a `LatentSource`, lq and gt are scaled latents (b, crop, crop, c), and `crop` is the side in latents.

    Args:
        batch_size: samples per batch, over all processes.
        degrade: maps a GT crop (float32 in [0, 1]) and an rng to an LQ crop of the same shape; not used for pairs.
        rows: the rows of every batch that this process reads (`distributed.batch_rows`); None: all.
        workers: number of reading processes; each holds up to four batches. 0 reads in a thread of this process.
        prompts: {path: prompt}; images without an entry have the empty prompt.
        null_prompt_probability: probability that `use_prompt` is False, per sample.
        max_bad_share: largest allowed share of unreadable images, of each of the lists of a mixture.
        min_size_share: images whose shorter side is less than this share of the crop are left out.

    Unreadable and small images are replaced, see `Loader`. Raises ValueError for invalid arguments, and if no image has
    a prompt.
    """
    prompts = {normalize_path(path): prompt for path, prompt in (prompts or {}).items()}
    rows = range(batch_size) if rows is None else rows
    numbers = {
        "batch_size": batch_size,
        "crop": crop,
        "workers": workers,
        "null_prompt_probability": null_prompt_probability,
    }
    numbers |= {"max_bad_share": max_bad_share, "min_size_share": min_size_share}
    _check_arguments(source, degrade, rows, **numbers)
    if prompts:
        _check_prompts(source, prompts)
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # grain reads absl flags, which only absl.app parses
    options = {"crop": crop, "flip": flip, "null_prompt_probability": null_prompt_probability}
    options |= {"min_size_share": min_size_share}
    if isinstance(source, LatentSource):
        sample = functools.partial(
            make_latent_sample, source=source, crop=crop, null_prompt_probability=null_prompt_probability
        )
    else:
        sample = functools.partial(make_training_sample, source=source, degrade=degrade, **options)
    return Loader(
        _make_batches(sample, len(source), seed, batch_size, rows),
        workers=workers,
        prompts=prompts,
        unusable=UnusableFiles(source, max_bad_share),
        fingerprint={
            "source": source.identity,
            "contents": source.contents() if isinstance(source, StoredSource) else None,
            "prompts": digest_prompts(prompts),
            "records": len(source),
            "seed": seed,
            "global_batch": batch_size,
            **options,
        },
    )
