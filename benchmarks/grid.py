"""Strength of grid artifacts in images: decoders produce periodic patterns from inaccurate latents.

    python benchmarks/grid.py results ground_truth

Ratio of the mean power of luma along the axes to that in oblique directions, in overlapping Hann windows of 64 x 64
pixels, at the periods of one latent (3.3 to 4.8 pixels for a VAE of factor 4) and of two (4.8 to 10). Natural images
have more power along the axes, too: compare with the ground truth.
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

from pisa_jax.imaging.image_files import find_images
from pisa_jax.metrics.psnr_ssim import rgb_to_y

WINDOW = 64
PERIODS = ((3.3, 4.8), (4.8, 10))


def grid(y: np.ndarray) -> list[float]:
    """Power ratio of one luma image at each of PERIODS; ValueError if the image is smaller than a window."""
    if min(y.shape) < WINDOW:
        raise ValueError(f"{y.shape[1]}x{y.shape[0]} pixels are too few; use at least {WINDOW}x{WINDOW}")
    windows = np.lib.stride_tricks.sliding_window_view(y, (WINDOW, WINDOW))[:: WINDOW // 2, :: WINDOW // 2]
    taper = np.hanning(WINDOW)[:, None] * np.hanning(WINDOW)
    power = np.abs(np.fft.fft2((windows - windows.mean((2, 3), keepdims=True)) * taper)) ** 2
    frequencies = np.abs(np.fft.fftfreq(WINDOW))
    small, large = (f(*np.meshgrid(frequencies, frequencies)) for f in (np.minimum, np.maximum))
    radius, spectrum = np.hypot(small, large), power.mean((0, 1))
    found = []
    for shortest, longest in PERIODS:
        band = (radius > 1 / longest) & (radius < 1 / shortest)
        # Directions within 6 degrees of an axis, and more than 18 degrees away.
        along, oblique = band & (small < 0.1 * large), band & (small > 0.33 * large)
        found.append(float(spectrum[along].mean() / spectrum[oblique].mean()))
    return found


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+", help="folders of images at their final size")
    for folder in parser.parse_args().folders:
        found = [grid(rgb_to_y(np.asarray(Image.open(path).convert("RGB")))) for path in find_images(folder)]
        means, medians = np.mean(found, axis=0), np.median(found, axis=0)
        figures = (f"{mean:.1f} (median {median:.1f})" for mean, median in zip(means, medians, strict=True))
        print(f"{folder}: {', '.join(figures)} in {len(found)} images", flush=True)


if __name__ == "__main__":
    main()
