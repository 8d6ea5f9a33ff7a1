"""Throughput of the training loader in images per second and core, and the time of each stage.

    python benchmarks/data.py --path DIR --crop 512 --batch-size 16 --workers 0 1 2

The stages are timed one after the other on one thread, in CPU time, which other programs hardly disturb. Then the whole
loader runs as in training, in wall time. Without --path, it reads synthetic JPEG files of 1200x1200 pixels.
"""

import argparse
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import PIL
from PIL import Image

from pisa_jax.data import sources
from pisa_jax.data.degradation import degrade
from pisa_jax.data.loader import crop_pair, make_loader, to_float


def make_images(folder: str, count: int = 32, size: int = 1200) -> None:
    """Write synthetic JPEG files."""
    for index, record in enumerate(sources.fake_source(count, size)):
        Image.fromarray(record.image).save(Path(folder) / f"{index:03d}.jpg", quality=92)


def time_stages(source: sources.Source, crop: int, count: int) -> dict[str, float]:
    """Measure the CPU seconds per image of each stage on this thread."""
    seconds: dict[str, float] = {}
    rng = np.random.default_rng(0)

    def timed(stage: str, function: Callable, *arguments):
        start = time.thread_time()
        result = function(*arguments)
        seconds[stage] = seconds.get(stage, 0) + (time.thread_time() - start) / count
        return result

    def shrink_and_degrade(gt: np.ndarray) -> np.ndarray:
        return np.rint(degrade(gt.astype(np.float32) / np.float32(255), rng) * 255).astype(np.uint8)

    for index in range(-2, count):
        if index == 0:
            seconds.clear()  # the first images warm up
        record = timed("read + decode", source.__getitem__, index % len(source))
        gt, _ = timed("crop + flip", crop_pair, record, crop, True, rng)
        lq = timed("degrade", shrink_and_degrade, gt)
        pair = timed("batch", np.stack, [gt, lq])
        timed("to float", to_float, pair)
    return seconds


def time_loader(source: sources.Source, crop: int, batch_size: int, workers: int, batches: int) -> float:
    """Measure images per second over `batches` batches, without those prefetched while the workers started."""
    loader = make_loader(source, batch_size=batch_size, crop=crop, seed=0, degrade=degrade, workers=workers)
    for _ in range(1 + 4 * workers):
        next(loader)
    start = time.perf_counter()
    for _ in range(batches):
        next(loader)
    rate = batches * batch_size / (time.perf_counter() - start)
    loader.close()
    return rate


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--path", help="folder of images")
    parser.add_argument("--crop", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--batches", type=int, default=10, help="timed batches per setting")
    arguments = parser.parse_args()
    cv2.setNumThreads(1)
    with tempfile.TemporaryDirectory() as made:
        if not arguments.path:
            make_images(made)
        source = sources.folder_source(arguments.path or made)
        print(f"{platform.machine()}, OpenCV {cv2.__version__}, Pillow {PIL.__version__}, {len(source)} images")
        stages = time_stages(source, arguments.crop, count=64)
        total = sum(stages.values())
        for stage, seconds in stages.items():
            print(f"{stage:14s} {1000 * seconds:7.2f} ms per image {100 * seconds / total:5.1f} %")
        print(f"{'all':14s} {1000 * total:7.2f} ms: {1 / total:.1f} images per second on one core")
        for workers in arguments.workers:
            rate = time_loader(source, arguments.crop, arguments.batch_size, workers, arguments.batches)
            print(f"loader, workers={workers}: {rate:.1f} images per second, {rate / max(workers, 1):.1f} per core")


if __name__ == "__main__":
    main()
