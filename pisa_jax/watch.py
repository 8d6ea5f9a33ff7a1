"""Watching a run: validation on fixed pictures, TensorBoard, and a progress line."""

import contextlib
import socket
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from PIL import Image
from tensorboardX import summary
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.record_writer import RecordWriter
from tqdm import tqdm

from pisa_jax import backbone as bb
from pisa_jax import lora, lpips, metrics, model
from pisa_jax.config import Stage, Validation
from pisa_jax.degradation import degrade
from pisa_jax.objective import Frozen
from pisa_jax.sheet import contact_sheet
from pisa_jax.sources import folder_source, pair_source

# Measurements that are shown on the terminal only where they are not 0.
COUNTERS = ("skipped", "bad_streak")


class Pair(NamedTuple):
    """A validation picture, uint8."""

    name: str
    lq: np.ndarray
    gt: np.ndarray


def validation_pairs(config: Validation, crop: int) -> list[Pair]:
    """The fixed pictures: the middle `crop` x `crop` of each, degraded with its index as the seed unless paired.

    Raises:
        ValueError: a picture is smaller than the crop. OSError: one cannot be read.
    """
    if config.path is None:
        return []
    source = (pair_source if (Path(config.path) / "lq").is_dir() else folder_source)(config.path)
    pairs = []
    for index in range(min(config.count, len(source))):
        record = source[index]
        height, width, _ = record.image.shape
        if min(height, width) < crop:
            raise ValueError(f"validation picture {record.path} is {width} x {height}, smaller than data.crop {crop}")
        y, x = (height - crop) // 2, (width - crop) // 2
        gt = record.image[y : y + crop, x : x + crop]
        if record.lq is not None:
            lq = record.lq[y : y + crop, x : x + crop]
        else:
            lq = np.rint(degrade(np.float32(gt) / np.float32(255), np.random.default_rng(index)) * 255).astype(np.uint8)
        pairs.append(Pair(record.path, lq, gt))
    return pairs


def restore(
    frozen: Frozen, adapter: lora.Tree, lq: Float[Array, "1 h w 3"], *, backbone: bb.Backbone, stage: Stage
) -> Float[Array, "2 h w 3"]:
    """A picture in [-1, 1] restored without and with the adapter that trains, at scale 1 and the empty prompt."""
    latents = bb.encode(backbone, frozen.vae, lq)
    both = model.predict(backbone, frozen.unet, adapter, stage.spec, latents, frozen.null_prompt)
    images = [bb.decode(backbone, frozen.vae, latents - eps) for eps in both]
    return jnp.clip(jnp.concatenate(images), -1, 1)


def validate(
    restore: Callable[[Float[Array, "1 h w 3"]], Float[Array, "2 h w 3"]],
    pairs: list[Pair],
    perceptual: Any,
    stage: Stage,
) -> tuple[dict[str, float], Image.Image]:
    """Mean l2, PSNR and SSIM (of Y) and perceptual distance of the restored pictures, and a sheet of them.

    The sheet's columns are LQ, without the adapter that trains (in the semantic stage: pix only), with it, GT.
    """
    rows, found = [], []
    before, after = " + ".join(stage.frozen) or "no adapter", " + ".join([*stage.frozen, stage.adapter])
    for pair in pairs:
        without, restored = (to_uint8(image) for image in np.asarray(restore(to_float(pair.lq)[None])))
        values = {"l2": float(np.mean(np.square((np.float32(restored) - pair.gt) / 127.5)))}
        values |= {"psnr": metrics.psnr(restored, pair.gt), "ssim": metrics.ssim(restored, pair.gt)}
        if perceptual is not None:
            values["perceptual"] = float(_distance(perceptual, to_float(restored)[None], to_float(pair.gt)[None])[0])
        found.append(values)
        rows += [("LQ", pair.lq), (before, without), (after, restored), ("GT", pair.gt)]
    sheet = contact_sheet([(label, Image.fromarray(image)) for label, image in rows], columns=4, longest=256)
    return {name: float(np.mean([values[name] for values in found])) for name in found[0]}, sheet


_distance = jax.jit(lpips.distance)


def to_float(image: np.ndarray) -> jax.Array:
    """uint8 to float32 in [-1, 1]."""
    return jnp.asarray(np.float32(image) / 127.5 - 1)


def to_uint8(image: np.ndarray) -> np.ndarray:
    """[-1, 1] to uint8, rounded."""
    return np.rint((np.clip(image, -1, 1) + 1) * 127.5).astype(np.uint8)


class Watch:
    """Scalars and pictures to TensorBoard, and a line on the terminal; only one process of a run has one."""

    def __init__(self, folder: Path, batch_size: int, total: int, first: int):
        self._folder = folder / "tensorboard"
        self._folder.mkdir(exist_ok=True)
        # Not tensorboardX's SummaryWriter: on a full disk its thread dies, and the run would wait for it for ever.
        now = time.time()
        self._file = RecordWriter(str(self._folder / f"events.out.tfevents.{now:.0f}.{socket.gethostname()}"))
        self._file.write(Event(wall_time=now, file_version="brain.Event:2").SerializeToString())
        self._bar = tqdm(total=total, initial=first, unit="step", disable=None)
        self._batch_size, self._since, self._step, self._waited = batch_size, time.perf_counter(), first, 0.0

    def waited(self, seconds: float) -> None:
        """Count time spent on waiting for data."""
        self._waited += seconds

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Write measurements, with pictures per second and the step's time, in all and of it for data."""
        now, steps = time.perf_counter(), max(step - self._step, 1)
        seconds = (now - self._since) / steps
        data = self._waited / steps
        speed = {"pictures_per_second": self._batch_size / seconds, "step": seconds}
        speed |= {"data": data, "compute": seconds - data}
        self.scalars(step, {**values, **{f"time/{name}": value for name, value in speed.items()}})
        end = time.strftime("%a %H:%M", time.localtime(time.time() + seconds * (self._bar.total - step)))
        told = [f"{name} {value:.4g}" for name, value in values.items() if value or not name.endswith(COUNTERS)]
        told += [f"{speed['pictures_per_second']:.3g} pictures/s", f"ends {end}"]
        self._bar.update(step - self._step)
        self._bar.set_postfix_str(", ".join(told))
        if self._bar.disable:  # no terminal: a log file gets lines
            print(f"step {step}/{self._bar.total}: {', '.join(told)}", flush=True)
        self._since, self._step, self._waited = now, step, 0.0

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Write measurements as they are."""
        self._write(step, [summary.scalar(name, value) for name, value in values.items()])

    def sheet(self, step: int, image: Image.Image) -> None:
        """Write a picture."""
        self._write(step, [summary.image("validation", np.asarray(image), dataformats="HWC")])

    def _write(self, step: int, summaries: list[Any]) -> None:
        try:
            for content in summaries:
                self._file.write(Event(wall_time=time.time(), step=step, summary=content).SerializeToString())
            self._file.flush()
        except OSError as error:
            raise OSError(f"{self._folder} cannot be written; free space and go on with --resume: {error}") from error

    def say(self, text: str) -> None:
        """A line of its own on the terminal."""
        tqdm.write(text)

    def close(self) -> None:
        """End the bar; the files are complete after every write."""
        self._bar.close()
        with contextlib.suppress(OSError):  # what could not be written has been told
            self._file.close()
