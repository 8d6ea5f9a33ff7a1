"""Image quality figures as this field publishes them: PSNR, SSIM and NIQE, and MATLAB's bicubic resize.

Pictures are 8-bit RGB arrays, because published numbers are measured on files. NumPy only.
"""

from pathlib import Path
from typing import Literal

import cv2
import numpy as np
import scipy.sparse
from jaxtyping import Float64, UInt8
from scipy.special import gammaln

Color = Literal["y", "rgb"]
Picture = UInt8[np.ndarray, "_ _ 3"]

# Mean and covariance of NIQE's features on 125 pristine photographs, as its authors released them.
NIQE_PRISTINE = Path(__file__).parent / "assets" / "niqe" / "pristine.npz"
NIQE_BLOCK = 96


def rgb_to_y(image: UInt8[np.ndarray, "h w 3"]) -> Float64[np.ndarray, "h w"]:
    """Luma of ITU-R BT.601 in 16..235, not rounded: Y = 16 + 65.481 R + 128.553 G + 24.966 B with R, G, B in 0..1."""
    return image @ (np.array([65.481, 128.553, 24.966]) / 255) + 16.0


def _prepare(image: np.ndarray, other: np.ndarray, color: str, crop_border: int) -> tuple[np.ndarray, np.ndarray]:
    if image.shape != other.shape:
        raise ValueError(f"pictures differ in size: {image.shape[:2]} and {other.shape[:2]} (height, width)")
    if color not in ("y", "rgb"):
        raise ValueError(f"unknown color {color!r}: use 'y' (luma of YCbCr) or 'rgb'")
    height, width = image.shape[:2]
    if not 0 <= 2 * crop_border < min(height, width):
        raise ValueError(f"crop_border {crop_border} leaves nothing of a {height}x{width} picture")
    inner = np.s_[crop_border : height - crop_border, crop_border : width - crop_border]
    return tuple(rgb_to_y(x[inner]) if color == "y" else x[inner].astype(np.float64) for x in (image, other))


def psnr(sr: Picture, gt: Picture, color: Color = "y", crop_border: int = 0) -> float:
    """Peak signal-to-noise ratio in dB, 10 log10(255^2 / mean (sr - gt)^2); infinite for equal pictures.

    color "y": luma, not rounded (the convention of pyiqa with test_y_channel and of the SR papers); "rgb": all values.
    crop_border pixels are cut off each side first (the scale factor for Set5 / Set14 figures, 0 for real pictures).
    """
    a, b = _prepare(sr, gt, color, crop_border)
    error = np.mean((a - b) ** 2)
    return float(10 * np.log10(255**2 / error)) if error else float("inf")


def _gaussian(size: int, sigma: float) -> Float64[np.ndarray, " size"]:
    window = np.exp(-((np.arange(size) - (size - 1) / 2) ** 2) / (2 * sigma**2))
    return window / window.sum()


def _ssim_map(a: Float64[np.ndarray, "h w"], b: Float64[np.ndarray, "h w"]) -> Float64[np.ndarray, "_ _"]:
    """SSIM at every position where the 11x11 Gaussian window (sigma 1.5) fits."""
    window = _gaussian(11, 1.5)

    def local_mean(x):
        return cv2.sepFilter2D(x, -1, window, window)[5:-5, 5:-5]

    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    mean_a, mean_b = local_mean(a), local_mean(b)
    var_a, var_b = local_mean(a * a) - mean_a**2, local_mean(b * b) - mean_b**2
    covariance = local_mean(a * b) - mean_a * mean_b
    structure = np.maximum((2 * covariance + c2) / (var_a + var_b + c2), 0)
    return structure * (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)


def ssim(sr: Picture, gt: Picture, color: Color = "y", crop_border: int = 0) -> float:
    """Structural similarity, at most 1: mean of the local SSIM over positions (and over R, G, B for color "rgb").

    11x11 Gaussian window of sigma 1.5, valid positions only, C1 = (0.01 * 255)^2, C2 = (0.03 * 255)^2, no downsampling;
    luma is rounded to integers and the contrast-structure term clamped at 0 from below, as pyiqa does.
    Reference: Wang, Bovik, Sheikh, Simoncelli, IEEE TIP 2004, equation 13.
    """
    a, b = _prepare(sr, gt, color, crop_border)
    if min(a.shape[:2]) < 11:
        raise ValueError(f"SSIM needs 11x11 pixels or more after cropping, got {a.shape[0]}x{a.shape[1]}")
    if color == "y":
        return float(_ssim_map(np.round(a), np.round(b)).mean())
    return float(np.mean([_ssim_map(a[..., c], b[..., c]).mean() for c in range(3)]))


def _cubic(x: np.ndarray) -> np.ndarray:
    """Keys' cubic convolution kernel with a = -0.5 (IEEE TASSP 1981)."""
    x = np.abs(x)
    near = 1.5 * x**3 - 2.5 * x**2 + 1
    far = -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    return np.where(x <= 1, near, np.where(x <= 2, far, 0.0))


def _bicubic_matrix(size: int, scale: float | int, border: str) -> scipy.sparse.csr_array:
    """Weights (new size, size) of one axis; the kernel is stretched when shrinking."""
    new = int(np.ceil(size * scale))
    stretch = min(scale, 1.0)
    centre = (np.arange(new) + 0.5) / scale - 0.5
    taps = int(np.ceil(4 / stretch)) + 2
    source = np.floor(centre - 2 / stretch).astype(int)[:, None] + np.arange(taps)
    weights = _cubic(stretch * (centre[:, None] - source))
    weights /= weights.sum(axis=1, keepdims=True)
    if border == "mirror":
        source %= 2 * size
        source = np.where(source < size, source, 2 * size - 1 - source)
    rows, columns = np.repeat(np.arange(new), taps), np.clip(source, 0, size - 1).ravel()
    return scipy.sparse.csr_array((weights.ravel(), (rows, columns)), shape=(new, size))


def _resize_axis(image: np.ndarray, matrix: scipy.sparse.csr_array, axis: int) -> np.ndarray:
    moved = np.moveaxis(image, axis, 0)
    out = matrix @ moved.reshape(moved.shape[0], -1).astype(np.float64)
    return np.moveaxis(out.reshape(-1, *moved.shape[1:]), 0, axis)


def matlab_bicubic(
    image: np.ndarray, scale: float | int, border: Literal["mirror", "replicate"] = "mirror"
) -> np.ndarray:
    """MATLAB's imresize(image, scale, "bicubic") of (h, w) or (h, w, c), antialiased when shrinking.

    Sides become ceil(scale n). uint8 in, uint8 out, rounded (half up) and clipped after each axis, rows first; floats
    give float64, unrounded.
    Outside the picture MATLAB mirrors; its older releases, which made the common LR files of Set5, Set14 and BSD100,
    replicated the last pixel.
    """
    if scale <= 0 or border not in ("mirror", "replicate"):
        raise ValueError(f"scale must be above 0 and border 'mirror' or 'replicate', got {scale} and {border!r}")
    for axis in (0, 1):
        resized = _resize_axis(image, _bicubic_matrix(image.shape[axis], scale, border), axis)
        image = np.clip(np.floor(resized + 0.5), 0, 255).astype(np.uint8) if image.dtype == np.uint8 else resized
    return image


def _normalise(y: Float64[np.ndarray, "h w"]) -> Float64[np.ndarray, "h w"]:
    """Mean-subtracted, contrast-normalised values: (y - mu) / (sigma + 1), 7x7 Gaussian of sigma 7/6."""
    window = _gaussian(7, 7 / 6)

    def local_mean(x):
        return cv2.sepFilter2D(x, -1, window, window, borderType=cv2.BORDER_REPLICATE)

    mean = local_mean(y)
    return (y - mean) / (np.sqrt(np.abs(local_mean(y * y) - mean**2)) + 1)


def _aggd(x: Float64[np.ndarray, "n m"]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Shape and left and right scale of an asymmetric generalised Gaussian, by moments, of each row.

    Reference: Mittal et al. 2013, equations 5-8; the shape is looked up on the authors' grid 0.2, 0.201, ..., 10.
    """
    grid = np.arange(200, 10001) / 1000
    ratios = np.exp(2 * gammaln(2 / grid) - gammaln(1 / grid) - gammaln(3 / grid))
    left, right = (np.sqrt(np.sum(x**2 * side, axis=1) / np.sum(side, axis=1)) for side in (x < 0, x > 0))
    skew = left / right
    ratio = np.mean(np.abs(x), axis=1) ** 2 / np.mean(x**2, axis=1)
    ratio *= (skew**3 + 1) * (skew + 1) / (skew**2 + 1) ** 2
    shape = grid[np.argmin(np.abs(ratios - ratio[:, None]), axis=1)]
    scale = np.exp((gammaln(1 / shape) - gammaln(3 / shape)) / 2)
    return shape, left * scale, right * scale


def _niqe_features(y: Float64[np.ndarray, "h w"], block: int) -> Float64[np.ndarray, "blocks 18"]:
    rows, columns = y.shape[0] // block, y.shape[1] // block
    blocks = _normalise(y).reshape(rows, block, columns, block).swapaxes(1, 2).reshape(-1, block, block)
    shape, left, right = _aggd(blocks.reshape(len(blocks), -1))
    features = [shape, (left + right) / 2]
    for shift in ((0, 1), (1, 0), (1, 1), (1, -1)):
        product = blocks * np.roll(blocks, shift, axis=(1, 2))
        shape, left, right = _aggd(product.reshape(len(blocks), -1))
        mean = (right - left) * np.exp(gammaln(2 / shape) - gammaln(1 / shape))
        features += [shape, mean, left, right]
    return np.stack(features, axis=1)


def niqe(image: Picture) -> float:
    """Natural image quality evaluator of one picture, without a reference; lower is better, about 2-10.

    Distance of the picture's multivariate Gaussian of features from that of pristine photographs (statistics of the
    authors' release, so values compare with published ones): sqrt(d^T ((S1 + S2) / 2)^+ d). Luma is YIQ's, rounded, as
    in pyiqa. Only whole 96x96 blocks count. Raises ValueError for fewer than two blocks or a picture of one colour.
    Reference: Mittal, Soundararajan, Bovik, "Making a Completely Blind Image Quality Analyzer", IEEE SPL 2013, eq. 10.
    """
    rows, columns = image.shape[0] // NIQE_BLOCK, image.shape[1] // NIQE_BLOCK
    if rows * columns < 2:
        raise ValueError(f"NIQE needs two blocks of 96x96 pixels, got {image.shape[0]}x{image.shape[1]}")
    y = np.round(image @ np.array([0.299, 0.587, 0.114]))[: rows * NIQE_BLOCK, : columns * NIQE_BLOCK]
    with np.errstate(divide="ignore", invalid="ignore"):  # flat blocks give NaN and are left out
        halves = (_niqe_features(y, NIQE_BLOCK), _niqe_features(matlab_bicubic(y, 0.5), NIQE_BLOCK // 2))
    features = np.concatenate(halves, axis=1)
    whole = features[np.isfinite(features).all(axis=1)]
    if len(whole) < 2:
        raise ValueError("NIQE is undefined: fewer than two blocks of the picture have any texture")
    with np.load(NIQE_PRISTINE) as pristine:
        mean, covariance = pristine["mean"], pristine["covariance"]
    difference = mean - np.nanmean(np.where(np.isfinite(features), features, np.nan), axis=0)
    inverse = np.linalg.pinv((covariance + np.cov(whole, rowvar=False)) / 2)
    return float(np.sqrt(difference @ inverse @ difference))
