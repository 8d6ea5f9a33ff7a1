"""NIQE, the natural image quality evaluator: a no-reference metric."""

from pathlib import Path

import cv2
import numpy as np
from jaxtyping import Float64
from scipy.special import gammaln

from pisa_jax.imaging.arrays import RGB8
from pisa_jax.imaging.matlab_resize import matlab_bicubic
from pisa_jax.metrics.psnr_ssim import gaussian_window

# Mean and covariance of NIQE's features on 125 pristine photographs, as its authors released them.
PRISTINE = Path(__file__).parents[1] / "assets" / "niqe" / "pristine.npz"
BLOCK = 96


def _normalize(y: Float64[np.ndarray, "h w"]) -> Float64[np.ndarray, "h w"]:
    """Mean-subtracted, contrast-normalized values: (y - mu) / (sigma + 1), 7x7 Gaussian of sigma 7/6."""
    window = gaussian_window(7, 7 / 6)

    def local_mean(x):
        return cv2.sepFilter2D(x, -1, window, window, borderType=cv2.BORDER_REPLICATE)

    mean = local_mean(y)
    return (y - mean) / (np.sqrt(np.abs(local_mean(y * y) - mean**2)) + 1)


def _aggd(x: Float64[np.ndarray, "n m"]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Shape, left scale and right scale of an asymmetric generalized Gaussian fitted to each row by its moments.

    The shape is the nearest on the authors' grid 0.2, 0.201, ..., 10. Reference: Mittal et al. 2013, equations 5-8.
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
    """The 18 features of every block: parameters of fits to normalized values and to products of neighbors."""
    rows, columns = y.shape[0] // block, y.shape[1] // block
    blocks = _normalize(y).reshape(rows, block, columns, block).swapaxes(1, 2).reshape(-1, block, block)
    shape, left, right = _aggd(blocks.reshape(len(blocks), -1))
    features = [shape, (left + right) / 2]
    for shift in ((0, 1), (1, 0), (1, 1), (1, -1)):
        product = blocks * np.roll(blocks, shift, axis=(1, 2))
        shape, left, right = _aggd(product.reshape(len(blocks), -1))
        mean = (right - left) * np.exp(gammaln(2 / shape) - gammaln(1 / shape))
        features += [shape, mean, left, right]
    return np.stack(features, axis=1)


def niqe(image: RGB8) -> float:
    """Natural image quality evaluator of one image, without a reference; lower is better, about 2-10.

    Distance between the multivariate Gaussians of features of the image and of pristine photographs (statistics of the
    authors' release, so values are comparable with published ones): sqrt(d^T ((S1 + S2) / 2)^+ d). Luma is that of YIQ,
    rounded, as in pyiqa. Pixels outside whole 96x96 blocks are ignored.
    Raises ValueError for fewer than two blocks with texture.
    Reference: Mittal, Soundararajan, Bovik, "Making a Completely Blind Image Quality Analyzer", IEEE SPL 2013, eq. 10.
    """
    rows, columns = image.shape[0] // BLOCK, image.shape[1] // BLOCK
    if rows * columns < 2:
        raise ValueError(f"NIQE needs two blocks of 96x96 pixels, got {image.shape[0]}x{image.shape[1]}")
    y = np.round(image @ np.array([0.299, 0.587, 0.114]))[: rows * BLOCK, : columns * BLOCK]
    with np.errstate(divide="ignore", invalid="ignore"):  # features of flat blocks are NaN; they are ignored below
        halves = (_niqe_features(y, BLOCK), _niqe_features(matlab_bicubic(y, 0.5), BLOCK // 2))
    features = np.concatenate(halves, axis=1)
    whole = features[np.isfinite(features).all(axis=1)]
    if len(whole) < 2:
        raise ValueError("NIQE is undefined: fewer than two blocks of the image have any texture")
    with np.load(PRISTINE) as pristine:
        mean, covariance = pristine["mean"], pristine["covariance"]
    difference = mean - np.nanmean(np.where(np.isfinite(features), features, np.nan), axis=0)
    inverse = np.linalg.pinv((covariance + np.cov(whole, rowvar=False)) / 2)
    return float(np.sqrt(difference @ inverse @ difference))
