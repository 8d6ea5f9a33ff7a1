"""PSNR and SSIM of 8-bit RGB images, with the conventions of pyiqa and of published super-resolution tables."""

from typing import Literal

import cv2
import numpy as np
from jaxtyping import Float64

from pisa_jax.imaging.arrays import RGB8

Color = Literal["y", "rgb"]


def rgb_to_y(image: RGB8) -> Float64[np.ndarray, "_ _"]:
    """Luma of ITU-R BT.601 in 16..235, not rounded: Y = 16 + 65.481 R + 128.553 G + 24.966 B with R, G, B in 0..1."""
    return image @ (np.array([65.481, 128.553, 24.966]) / 255) + 16.0


def _crop_and_convert(
    image: np.ndarray, other: np.ndarray, color: str, crop_border: int
) -> tuple[np.ndarray, np.ndarray]:
    """Check the arguments, crop both images and convert them to float64 luma or RGB."""
    if image.shape != other.shape:
        raise ValueError(f"images differ in size: {image.shape[:2]} and {other.shape[:2]} (height, width)")
    if color not in ("y", "rgb"):
        raise ValueError(f"unknown color {color!r}: use 'y' (luma of YCbCr) or 'rgb'")
    height, width = image.shape[:2]
    if not 0 <= 2 * crop_border < min(height, width):
        raise ValueError(f"crop_border {crop_border} leaves nothing of a {height}x{width} image")
    inner = np.s_[crop_border : height - crop_border, crop_border : width - crop_border]
    return tuple(rgb_to_y(x[inner]) if color == "y" else x[inner].astype(np.float64) for x in (image, other))


def psnr(sr: RGB8, gt: RGB8, color: Color = "y", crop_border: int = 0) -> float:
    """Peak signal-to-noise ratio in dB, 10 log10(255^2 / mean (sr - gt)^2); infinite for equal images.

    color "y": luma, not rounded (the convention of pyiqa with test_y_channel and of the SR papers); "rgb": all values.
    crop_border pixels are cropped at each side first (tables of Set5 and Set14: the upscale factor; photographs: 0).
    """
    a, b = _crop_and_convert(sr, gt, color, crop_border)
    error = np.mean((a - b) ** 2)
    return float(10 * np.log10(255**2 / error)) if error else float("inf")


def gaussian_window(size: int, sigma: float) -> Float64[np.ndarray, " size"]:
    """One-dimensional Gaussian weights that sum to 1."""
    window = np.exp(-((np.arange(size) - (size - 1) / 2) ** 2) / (2 * sigma**2))
    return window / window.sum()


def _ssim_map(a: Float64[np.ndarray, "h w"], b: Float64[np.ndarray, "h w"]) -> Float64[np.ndarray, "_ _"]:
    """SSIM at every position where the 11x11 Gaussian window (sigma 1.5) fits."""
    window = gaussian_window(11, 1.5)

    def local_mean(x):
        return cv2.sepFilter2D(x, -1, window, window)[5:-5, 5:-5]

    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    mean_a, mean_b = local_mean(a), local_mean(b)
    var_a, var_b = local_mean(a * a) - mean_a**2, local_mean(b * b) - mean_b**2
    covariance = local_mean(a * b) - mean_a * mean_b
    structure = np.maximum((2 * covariance + c2) / (var_a + var_b + c2), 0)
    return structure * (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)


def ssim(sr: RGB8, gt: RGB8, color: Color = "y", crop_border: int = 0) -> float:
    """Structural similarity, at most 1: mean of the local SSIM over positions (and over R, G, B for color "rgb").

    11x11 Gaussian window of sigma 1.5, valid positions only, C1 = (0.01 * 255)^2, C2 = (0.03 * 255)^2, no downsampling;
    luma is rounded to integers and the contrast-structure term clamped at 0 from below, as pyiqa does.
    Reference: Wang, Bovik, Sheikh, Simoncelli, IEEE TIP 2004, equation 13.
    """
    a, b = _crop_and_convert(sr, gt, color, crop_border)
    if min(a.shape[:2]) < 11:
        raise ValueError(f"SSIM needs 11x11 pixels or more after cropping, got {a.shape[0]}x{a.shape[1]}")
    if color == "y":
        return float(_ssim_map(np.round(a), np.round(b)).mean())
    return float(np.mean([_ssim_map(a[..., c], b[..., c]).mean() for c in range(3)]))
