"""Throughput of the degradation on one core, the time of each operation, and a comparison with plain implementations.

    python benchmarks/degradation.py [--size 512] [--count 200]

The baseline is the same pipeline in float32 with straightforward operations: cv2.filter2D, NumPy's Poisson and normal
generators, and JPEG as batched 8 x 8 products (resizing is the same in both). Both run alternately on the same images
and seeds, and their operations agree (checked before the timing). Times are CPU times of the single thread.
"""

import argparse
import platform
import time
from collections import defaultdict
from pathlib import Path
from unittest import mock

import cv2
import numpy as np
import scipy

from pisa_jax.data import degradation

IMAGE = Path(__file__).resolve().parents[1] / "tests/assets/fixtures/degr/stats_gt.png"
OPERATIONS = ("filter2d", "resize", "jpeg", "gaussian_noise", "poisson_noise")


def plain_filter2d(image, kernel):
    return cv2.filter2D(image, -1, kernel.astype(np.float32), borderType=cv2.BORDER_REFLECT_101)


def plain_blocks(plane, table):
    blocks = plane.reshape(plane.shape[0] // 8, 8, plane.shape[1] // 8, 8).swapaxes(1, 2)
    coefficients = degradation._DCT @ blocks @ degradation._DCT.T
    blocks = degradation._DCT.T @ (np.round(coefficients / table) * table) @ degradation._DCT
    return blocks.swapaxes(1, 2).reshape(plane.shape)


def plain_jpeg(image, quality):
    height, width = image.shape[:2]
    scale = np.float32((50 / quality) if quality < 50 else 2 - quality / 50)
    image = np.pad(image, ((0, -height % 16), (0, -width % 16), (0, 0)))
    ycc = image @ degradation._TO_YCC[:, :3].T + degradation._TO_YCC[:, 3]
    planes = [plain_blocks(ycc[..., 0], degradation._LUMA_TABLE.T * scale)]
    for i in (1, 2):
        halved = ycc[..., i].reshape(ycc.shape[0] // 2, 2, ycc.shape[1] // 2, 2).mean((1, 3))
        planes.append(plain_blocks(halved, degradation._CHROMA_TABLE * scale).repeat(2, 0).repeat(2, 1))
    image = np.stack(planes, -1) @ degradation._FROM_YCC[:, :3].T + degradation._FROM_YCC[:, 3]
    return np.clip(image, 0, 1)[:height, :width]


def plain_gaussian_noise(image, sigma, gray, rng):
    noise = rng.standard_normal((*image.shape[:2], 1 if gray else 3), np.float32)
    return np.clip(image + noise * np.float32(sigma / 255), 0, 1)


def plain_poisson_noise(image, scale, gray, rng):
    source = image @ np.float32([[0.2989], [0.587], [0.114]]) if gray else image
    source = np.round(np.clip(source, 0, 1) * 255) / np.float32(255)
    values = 2 ** np.ceil(np.log2(len(np.unique(source))))
    noise = (rng.poisson(source * values) / values).astype(np.float32) - source
    return np.clip(image + noise * np.float32(scale), 0, 1)


PLAIN = {
    "filter2d": plain_filter2d,
    "jpeg": plain_jpeg,
    "gaussian_noise": plain_gaussian_noise,
    "poisson_noise": plain_poisson_noise,
}


def check_agreement(image: np.ndarray):
    """Check that the deterministic operations of both implementations agree."""
    rng = np.random.default_rng(0)
    kernel = degradation.random_kernel(rng, (0.2, 3.0))
    pairs = [
        (degradation.filter2d(image, kernel), plain_filter2d(image, kernel)),
        (degradation.jpeg(image[:, :250], 80.3), plain_jpeg(image[:, :250], 80.3)),
    ]
    for ours, plain in pairs:
        # A few JPEG coefficients may be rounded differently.
        assert np.quantile(np.abs(ours - plain), 0.999) < 1e-4


def timed(image: np.ndarray, seed: int) -> float:
    start = time.thread_time()
    degradation.degrade(image, np.random.default_rng(seed))
    return time.thread_time() - start


def shares(image: np.ndarray, count: int) -> dict[str, float]:
    """Measure the mean milliseconds per image in each operation and in total."""
    spent = defaultdict(float)

    def clocked(name, function):
        def run(*args):
            start = time.thread_time()
            result = function(*args)
            spent[name] += time.thread_time() - start
            return result

        return run

    wrapped = {name: clocked(name, getattr(degradation, name)) for name in OPERATIONS}
    with mock.patch.multiple(degradation, **wrapped):
        spent["all"] = sum(timed(image, seed) for seed in range(count))
    return {name: 1e3 * seconds / count for name, seconds in spent.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--count", type=int, default=200)
    args = parser.parse_args()
    cv2.setNumThreads(1)
    versions = f"numpy {np.__version__}, opencv {cv2.__version__}, scipy {scipy.__version__}"
    print(f"python {platform.python_version()}, {versions}")
    print(f"{platform.machine()}, one thread, {args.count} images of {args.size} x {args.size}")

    image = cv2.imread(str(IMAGE))[..., ::-1] / np.float32(255)
    image = np.clip(cv2.resize(image, (args.size, args.size), interpolation=cv2.INTER_CUBIC), 0, 1)
    check_agreement(image)
    for seed in range(20):
        timed(image, seed)
    ours, plain = [], []
    for seed in range(args.count):
        ours.append(timed(image, seed))
        with mock.patch.multiple(degradation, **PLAIN):
            plain.append(timed(image, seed))
    for name, times in (("pisa_jax", ours), ("plain", plain)):
        mean, median = np.mean(times), np.median(times)
        print(f"{name:9s} {1e3 * mean:6.1f} ms mean, {1e3 * median:6.1f} ms median, {1 / mean:5.1f} images/s")
    means, medians = np.mean(plain) / np.mean(ours), np.median(plain) / np.median(ours)
    print(f"plain / pisa_jax: {means:.2f} by the means, {medians:.2f} by the medians\n")

    print("milliseconds per image        pisa_jax    plain")
    by_ours = shares(image, args.count)
    with mock.patch.multiple(degradation, **PLAIN):
        by_plain = shares(image, args.count)
    for name in (*OPERATIONS, "all"):
        print(f"{name:28s} {by_ours[name]:9.2f} {by_plain[name]:8.2f}")


if __name__ == "__main__":
    main()
