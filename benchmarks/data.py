"""Throughput of the training loader in images per second and core, and the time of its stages.

    python benchmarks/data.py --path DIR --crop 512 --batch-size 16 --workers 0 1 2

Stages are timed one after the other on one thread in CPU time, which other programs hardly affect. Then the whole
loader runs as in training and is timed in wall time. Without --path, it reads generated JPEG files of 1200x1200 pixels.
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
from pisa_jax.data.loader import make_loader
from pisa_jax.data.samples import crop_pair
from pisa_jax.imaging.ranges import uint8_to_signed, uint8_to_unit, unit_to_uint8


def write_images(folder: str, count: int = 32, size: int = 1200) -> None:
    for index, source_image in enumerate(sources.fake_source(count, size)):
        Image.fromarray(source_image.image).save(Path(folder) / f"{index:03d}.jpg", quality=92)


def time_stages(source: sources.Source, crop: int, count: int) -> dict[str, float]:
    """CPU seconds per image of each stage, on this thread."""
    seconds: dict[str, float] = {}
    rng = np.random.default_rng(0)

    def timed(stage: str, function: Callable, *arguments):
        start = time.thread_time()
        result = function(*arguments)
        seconds[stage] = seconds.get(stage, 0) + (time.thread_time() - start) / count
        return result

    def degrade_rounded(gt: np.ndarray) -> np.ndarray:
        return unit_to_uint8(degrade(uint8_to_unit(gt), rng))

    for index in range(-2, count):
        if index == 0:
            seconds.clear()  # after the warm-up
        source_image = timed("read + decode", source.__getitem__, index % len(source))
        gt, _ = timed("crop + flip", crop_pair, source_image, crop, True, rng)
        lq = timed("degrade", degrade_rounded, gt)
        pair = timed("batch", np.stack, [gt, lq])
        timed("to float", uint8_to_signed, pair)
    return seconds


def time_loader(source: sources.Source, crop: int, batch_size: int, workers: int, batches: int) -> float:
    """Images per second over `batches` batches, after the batches that the workers prefetched at the start."""
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--path", help="folder of images")
    parser.add_argument("--crop", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--batches", type=int, default=10, help="number of timed batches per number of workers")
    arguments = parser.parse_args()
    cv2.setNumThreads(1)
    with tempfile.TemporaryDirectory() as temporary:
        if not arguments.path:
            write_images(temporary)
        source = sources.folder_source(arguments.path or temporary)
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
