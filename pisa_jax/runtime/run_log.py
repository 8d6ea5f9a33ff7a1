"""Run log: scalars and images for TensorBoard, and a progress bar."""

import contextlib
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tensorboardX import summary
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.record_writer import RecordWriter

from pisa_jax.runtime.console import progress_bar, say

# Measurements that are shown on the terminal only if they are not 0.
COUNTERS = ("skipped", "bad_streak")


class RunLog:
    """Scalars and images for TensorBoard, and a progress bar; only the first process of a run has one."""

    def __init__(self, folder: Path, batch_size: int, total: int, first: int):
        self._folder = folder / "tensorboard"
        self._folder.mkdir(exist_ok=True)
        # Not tensorboardX's SummaryWriter: on a full disk its thread dies, and the run would wait for it forever.
        now = time.time()
        self._file = RecordWriter(str(self._folder / f"events.out.tfevents.{now:.0f}.{socket.gethostname()}"))
        self._file.write(Event(wall_time=now, file_version="brain.Event:2").SerializeToString())
        self._bar = progress_bar(total, "step", first)
        self._batch_size, self._since, self._step, self._waited = batch_size, time.perf_counter(), first, 0.0

    def add_data_wait(self, seconds: float) -> None:
        """Add time spent waiting for data."""
        self._waited += seconds

    @contextlib.contextmanager
    def left_out(self) -> Iterator[None]:
        """Leave the time of the body, such as a compilation or a validation, out of the time per step."""
        start, since = time.perf_counter(), self._since
        yield
        self._since = since + time.perf_counter() - start  # of a body inside this one, too

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Write measurements, images per second, and the time per step: total, data wait and compute."""
        now, steps = time.perf_counter(), max(step - self._step, 1)
        seconds = (now - self._since) / steps
        data = self._waited / steps
        speed = {"images_per_second": self._batch_size / seconds, "step": seconds}
        speed |= {"data": data, "compute": seconds - data}
        self.log_scalars(step, {**values, **{f"time/{name}": value for name, value in speed.items()}})
        end = time.strftime("%a %H:%M", time.localtime(time.time() + seconds * (self._bar.total - step)))
        shown = [f"{name} {value:.4g}" for name, value in values.items() if value or not name.endswith(COUNTERS)]
        shown += [f"{speed['images_per_second']:.3g} images/s", f"ends {end}"]
        self._bar.update(step - self._step)
        self._bar.set_postfix_str(", ".join(shown))
        if self._bar.disable:  # no terminal: print lines instead
            say(f"step {step}/{self._bar.total}: {', '.join(shown)}", sys.stdout)
        self._since, self._step, self._waited = now, step, 0.0

    def log_scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Write scalars without the speed figures."""
        self._write(step, [summary.scalar(name, value) for name, value in values.items()])

    def log_image(self, step: int, tag: str, image: Image.Image) -> None:
        """Write an image."""
        self._write(step, [summary.image(tag, np.asarray(image), dataformats="HWC")])

    def _write(self, step: int, summaries: list[Any]) -> None:
        try:
            for content in summaries:
                self._file.write(Event(wall_time=time.time(), step=step, summary=content).SerializeToString())
            self._file.flush()
        except OSError as error:
            raise OSError(
                f"{self._folder} cannot be written; free space and continue with --resume: {error}"
            ) from error

    def print_line(self, text: str) -> None:
        """Print a line above the progress bar."""
        say(text, sys.stdout)

    def close(self) -> None:
        """Close the progress bar and the file; the file is complete after every write."""
        self._bar.close()
        with contextlib.suppress(OSError):  # the failed write was reported when it happened
            self._file.close()
