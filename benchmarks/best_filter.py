"""Upper bound of the PSNR gain of linear filters over bicubic: a filter fitted to each image's ground truth.

    python benchmarks/best_filter.py --lq kodak/lq --gt kodak/gt

Each image has its own least-squares filter from Y of the bicubic image to Y of the ground truth. This is a Wiener
filter with known blur and noise. A method that does not see the ground truth must be non-linear to exceed this bound.
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

from pisa_jax.imaging.matlab_resize import matlab_bicubic
from pisa_jax.metrics.pairing import pair_files
from pisa_jax.metrics.psnr_ssim import rgb_to_y


def best_filter(source: np.ndarray, target: np.ndarray, taps: int, step: int) -> np.ndarray:
    """Apply the filter of taps x taps coefficients, `step` pixels apart, and an offset that fits the target best."""
    reach = taps // 2 * step
    padded = np.pad(source, reach, mode="reflect")
    height, width = source.shape
    offsets = range(0, 2 * reach + 1, step)
    columns = [padded[y : y + height, x : x + width].ravel() for y in offsets for x in offsets]
    design = np.stack([*columns, np.ones(source.size)], axis=1)
    # Neighboring pixels of an upscaled image are almost linearly dependent; 1e-3 gray levels squared per tap do not
    # change the reported figures.
    normal = design.T @ design + 1e-3 * np.eye(design.shape[1])
    return (design @ np.linalg.solve(normal, design.T @ target.ravel())).reshape(source.shape)


def psnr(y: np.ndarray, target: np.ndarray) -> float:
    """PSNR of unrounded luma in dB."""
    return 10 * np.log10(255**2 / np.mean((y - target) ** 2))


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lq", type=Path, required=True)
    parser.add_argument("--gt", type=Path, required=True)
    parser.add_argument("--scale", type=int, default=4)
    parser.add_argument("--taps", type=int, default=11)
    parser.add_argument("--step", type=int, default=3, help="pixels between taps")
    args = parser.parse_args()
    rows = []
    items, problems = pair_files(None, args.gt, args.lq)
    for item in items:
        lq, gt = (np.asarray(Image.open(path).convert("RGB")) for path in (item.lq, item.gt))
        target, source = rgb_to_y(gt), rgb_to_y(matlab_bicubic(lq, args.scale))
        filtered = best_filter(source, target, args.taps, args.step)
        rows.append((psnr(source, target), psnr(filtered, target)))
        print(f"{item.name}: bicubic {rows[-1][0]:.2f} dB, filtered {rows[-1][1]:.2f}", flush=True)
    bicubic, filtered = np.mean(rows, axis=0)
    print(f"{len(rows)} images, {args.taps} x {args.taps} taps {args.step} pixels apart:")
    print(f"bicubic {bicubic:.3f} dB, fitted filter {filtered:.3f} (+{filtered - bicubic:.3f})")
    for name, problem in problems.items():
        print(f"skipped {name}: {problem}")


if __name__ == "__main__":
    main()
