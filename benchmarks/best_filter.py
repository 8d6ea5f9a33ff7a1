"""How much PSNR a linear filter can gain over bicubic at the very best: fitted to each picture's own ground truth.

    python benchmarks/best_filter.py --lq kodak/lq --gt kodak/gt

The filter is the least-squares one from Y of the bicubic enlargement to Y of the ground truth, one per picture: what
Wiener's filter would do if blur and noise were known. A blind method has to do better than linear to exceed it.
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

from pisa_jax.imaging.matlab_resize import matlab_bicubic
from pisa_jax.metrics.pairing import pair_files
from pisa_jax.metrics.psnr_ssim import rgb_to_y


def best_filter(source: np.ndarray, target: np.ndarray, taps: int, step: int) -> np.ndarray:
    """The source filtered by taps x taps coefficients, `step` pixels apart, and an offset, as near as can be."""
    reach = taps // 2 * step
    padded = np.pad(source, reach, mode="reflect")
    height, width = source.shape
    offsets = range(0, 2 * reach + 1, step)
    columns = [padded[y : y + height, x : x + width].ravel() for y in offsets for x in offsets]
    design = np.stack([*columns, np.ones(source.size)], axis=1)
    # Neighbours of an enlarged picture are nearly dependent; 1e-3 grey levels squared per tap change no figure.
    normal = design.T @ design + 1e-3 * np.eye(design.shape[1])
    return (design @ np.linalg.solve(normal, design.T @ target.ravel())).reshape(source.shape)


def psnr(y: np.ndarray, target: np.ndarray) -> float:
    """dB of luma that was not rounded."""
    return 10 * np.log10(255**2 / np.mean((y - target) ** 2))


def main() -> None:
    """Command line."""
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
    print(f"{len(rows)} pictures, {args.taps} x {args.taps} taps {args.step} pixels apart:")
    print(f"bicubic {bicubic:.3f} dB, the best filter of each {filtered:.3f} (+{filtered - bicubic:.3f})")
    for name, problem in problems.items():
        print(f"left out {name}: {problem}")


if __name__ == "__main__":
    main()
