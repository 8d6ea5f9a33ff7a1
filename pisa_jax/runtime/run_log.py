"""Run log: scalars and images for TensorBoard, a progress bar, and the history of a run's starts."""

import contextlib
import json
import socket
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image
from tensorboardX import summary
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.record_writer import RecordWriter

from pisa_jax.runtime.console import progress_bar, say
from pisa_jax.runtime.mirror import Mirror
from pisa_jax.runtime.performance import compile_seconds, device_memory, utilization
from pisa_jax.runtime.remote_paths import AnyPath, is_bucket, write_text

# Measurements that are shown on the terminal only if they are not 0.
COUNTERS = ("skipped", "bad_streak")
# Number of starts after the first one, the steps that were repeated after them, and the last logged step.
HISTORY_FILE = "history.json"
# In a bucket, where a file is copied as a whole whenever it has grown, a larger event file is followed by another.
EVENT_FILE_BYTES = 8 * 2**20


class RunLog:
    """Scalars and images for TensorBoard, and a progress bar; only the first process of a run has one."""

    def __init__(self, folder: AnyPath, batch_size: int, total: int, first: int):
        self._mirror = Mirror(folder)
        self._folder = self._mirror.local / "tensorboard"
        self._folder.mkdir(exist_ok=True)
        self._largest = EVENT_FILE_BYTES if is_bucket(folder) else None
        self._files = 0
        self._open_file()
        self._history = _continue_history(folder / HISTORY_FILE, first)
        self._bar = progress_bar(total, "step", first)
        self._batch_size, self._since, self._step = batch_size, time.perf_counter(), first
        # Operations of one step on one device, in FLOP; None: not known.
        self.step_flops: float | None = None
        self._write(first, [])  # a start that is killed before its first logged step counts, too
        if is_bucket(folder):  # and one that is killed before the first upload
            write_text(folder / HISTORY_FILE, json.dumps(self._history))

    def _open_file(self) -> None:
        # Not tensorboardX's SummaryWriter: on a full disk its thread dies, and the run would wait for it forever.
        now = time.time()
        name = f"events.out.tfevents.{now:.6f}.{socket.gethostname()}"
        self._path = self._folder / (f"{name}.{self._files}" if self._files else name)
        self._file = RecordWriter(str(self._path))
        self._file.write(Event(wall_time=now, file_version="brain.Event:2").SerializeToString())
        self._files += 1

    @contextlib.contextmanager
    def left_out(self) -> Iterator[None]:
        """Leave the time of the body, such as a compilation or a validation, out of the time per step."""
        start, since = time.perf_counter(), self._since
        yield
        self._since = since + time.perf_counter() - start  # of a body inside this one, too

    def log(self, step: int, values: Mapping[str, float], waited: Sequence[float] = (0.0,)) -> None:
        """Write measurements, images per second, and the time per step: total, data wait and compute.

        `waited` has the seconds that each process waited for data since the last call, this process first.
        """
        now, steps = time.perf_counter(), max(step - self._step, 1)
        seconds = (now - self._since) / steps
        data = waited[0] / steps
        speed = {"images_per_second": self._batch_size / seconds, "step": seconds}
        speed |= {"data": data, "compute": seconds - data, "compile": compile_seconds()}
        if len(waited) > 1:
            speed |= {"data_fastest_host": min(waited) / steps, "data_slowest_host": max(waited) / steps}
        self._history["step"] = step
        self.log_scalars(
            step,
            {
                **values,
                **{f"time/{name}": value for name, value in speed.items()},
                **{f"device/{name}": value for name, value in utilization(self.step_flops, seconds).items()},
                **{f"device/{name}": value for name, value in device_memory().items()},
                **{f"run/{name}": self._history[name] for name in ("restarts", "lost_steps")},
            },
        )
        end = time.strftime("%a %H:%M", time.localtime(time.time() + seconds * (self._bar.total - step)))
        shown = [f"{name} {value:.4g}" for name, value in values.items() if value or not name.endswith(COUNTERS)]
        shown += [f"{speed['images_per_second']:.3g} images/s", f"ends {end}"]
        self._bar.update(step - self._step)
        self._bar.set_postfix_str(", ".join(shown))
        if self._bar.disable:  # no terminal: print lines instead
            say(f"step {step}/{self._bar.total}: {', '.join(shown)}", sys.stdout)
        self._since, self._step = now, step

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
            write_text(self._mirror.local / HISTORY_FILE, json.dumps(self._history))
            if self._largest and self._path.stat().st_size > self._largest:
                self._file.close()
                self._open_file()
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
        self._mirror.close()


def _continue_history(file: AnyPath, first: int) -> dict[str, int]:
    """Return the history of a run that is started at step `first`, from the file of the start before."""
    try:
        before = json.loads(file.read_text())
        lost = before["lost_steps"] + max(before["step"] - first, 0)
        return {"restarts": before["restarts"] + 1, "lost_steps": lost, "step": first}
    except (OSError, ValueError, KeyError, TypeError):  # the first start, or a damaged file
        return {"restarts": 0, "lost_steps": 0, "step": first}
