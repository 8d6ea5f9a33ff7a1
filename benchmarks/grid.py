"""How much of a grid of four pixels is in pictures: a decoder that enlarges 4 times leaves one where latents are off.

    python benchmarks/grid.py results ground_truth

The mean power of luma at periods of 3.3 to 4.8 pixels along the axes over that in oblique directions, in overlapping
Hann windows of 64 x 64 pixels. Pictures have more along the axes by themselves: compare with ground truth.
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

from pisa_jax.metrics import rgb_to_y
from pisa_jax.pairing import list_pictures

WINDOW = 64


def grid(y: np.ndarray) -> float:
    """The measure for one picture's luma; ValueError for one smaller than a window."""
    if min(y.shape) < WINDOW:
        raise ValueError(f"{y.shape[1]}x{y.shape[0]} pixels; it takes {WINDOW}x{WINDOW}")
    windows = np.lib.stride_tricks.sliding_window_view(y, (WINDOW, WINDOW))[:: WINDOW // 2, :: WINDOW // 2]
    taper = np.hanning(WINDOW)[:, None] * np.hanning(WINDOW)
    power = np.abs(np.fft.fft2((windows - windows.mean((2, 3), keepdims=True)) * taper)) ** 2
    frequencies = np.abs(np.fft.fftfreq(WINDOW))
    small, large = (f(*np.meshgrid(frequencies, frequencies)) for f in (np.minimum, np.maximum))
    band = (np.hypot(small, large) > 1 / 4.8) & (np.hypot(small, large) < 1 / 3.3)
    # Within 6 degrees of an axis, and beyond 18.
    spectrum, near, far = power.mean((0, 1)), band & (small < 0.1 * large), band & (small > 0.33 * large)
    return float(spectrum[near].mean() / spectrum[far].mean())


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+", help="of pictures at their final size")
    for folder in parser.parse_args().folders:
        found = [grid(rgb_to_y(np.asarray(Image.open(path).convert("RGB")))) for path in list_pictures(folder)]
        print(f"{folder}: {np.mean(found):.2f} (mean of {len(found)}, median {np.median(found):.2f})", flush=True)


if __name__ == "__main__":
    main()
