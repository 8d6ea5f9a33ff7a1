"""Shared parts of the programs of train_step_against_torch.py: settings, inputs, memory and the answers to requests.

Needs numpy only, because it runs in both environments.
"""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

PROMPT_TOKENS = 77
# Constant token ids of the prompt and of the negative prompt.
PROMPT_ID, NEGATIVE_ID = 0, 1
# (inputs, outputs) of the convolutions of VGG16 between its poolings, with torchvision's layer numbers.
VGG_BLOCKS = (
    ((0, 3, 64), (2, 64, 64)),
    ((5, 64, 128), (7, 128, 128)),
    ((10, 128, 256), (12, 256, 256), (14, 256, 256)),
    ((17, 256, 512), (19, 512, 512), (21, 512, 512)),
    ((24, 512, 512), (26, 512, 512), (28, 512, 512)),
)
STATUS = Path("/proc/self/status")


@dataclass(frozen=True)
class StepSettings:
    """One training step: the first argument of both programs, in JSON."""

    # A diffusers folder.
    model: str
    stage: str
    crop: int
    batch_size: int
    # File of the random numbers of the first step; pisa_jax writes it, PyTorch reads it.
    draws: str
    # PyTorch's memory layout, or "" for pisa_jax.
    layout: str = ""

    def as_json(self) -> str:
        """Return the argument."""
        return json.dumps(asdict(self))


def settings_of_process() -> StepSettings:
    """Read the settings of this process."""
    return StepSettings(**json.loads(sys.argv[1]))


def images(settings: StepSettings) -> tuple[np.ndarray, np.ndarray]:
    """Draw LQ and GT images, (b, h, w, 3) in [-1, 1]."""
    rng, shape = np.random.default_rng(7), (settings.batch_size, settings.crop, settings.crop, 3)
    lq, gt = (np.tanh(rng.standard_normal(shape, np.float32)) for _ in range(2))
    return lq, gt


def vgg_weights() -> tuple[dict[int, np.ndarray], list[np.ndarray]]:
    """Draw the kernels (OIHW) of VGG16 by layer number, and positive LPIPS heads by map; biases are 0."""
    rng = np.random.default_rng(5)
    kernels = {
        number: rng.standard_normal((after, before, 3, 3), np.float32) * (2 / (9 * before)) ** 0.5
        for block in VGG_BLOCKS
        for number, before, after in block
    }
    return kernels, [rng.random(block[-1][-1], np.float32) for block in VGG_BLOCKS]


def answer_requests(step: Callable[[], dict[str, float]], versions: str) -> None:
    """Run the first step and write its measurements, then run and time one step for every line of input.

    `step` returns when its measurements are computed. Every line of output is JSON. The last one, after the input ends,
    has the largest resident memory of the process, and of the steps after the first. The time on the CPU is the sum
    over all threads; other programs that run on the machine change it less than the time.
    """
    start = time.perf_counter()
    first = step()
    write({"versions": versions, "first_step_s": time.perf_counter() - start, **first})
    whole = peak_memory()
    Path("/proc/self/clear_refs").write_text("5")  # from here on, VmHWM is the peak of the steps
    for _ in sys.stdin:
        start, before = time.perf_counter(), time.process_time()
        step()
        write({"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - before})
    steps = peak_memory()
    write({"peak_GiB": max(whole, steps), "steps_GiB": steps})


def peak_memory() -> float:
    """Return the largest resident memory of this process since it was last reset, in GiB."""
    (line,) = (line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 2**20


def write(values: dict) -> None:
    """Write one line of JSON."""
    print(json.dumps(values), flush=True)
