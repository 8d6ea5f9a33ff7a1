"""Blur kernels of Real-ESRGAN (Wang et al. 2021, arXiv 2107.10833, section 3) and their application to an image."""

import cv2
import numpy as np
import scipy.special
from jaxtyping import Float, Float32

# An RGB image with values in [0, 1].
RGBFloat = Float32[np.ndarray, "h w 3"]
Kernel = Float[np.ndarray, "k k"]


def _squared_distance(size: int, sigma_x: float, sigma_y: float, theta: float) -> Kernel:
    """x^T S^-1 x on the pixel grid, S = R(theta) diag(sigma_x^2, sigma_y^2) R(theta)^T."""
    x, y = np.meshgrid(np.arange(size) - size // 2, np.arange(size) - size // 2)
    along, across = np.cos(theta) * x + np.sin(theta) * y, np.cos(theta) * y - np.sin(theta) * x
    return (along / sigma_x) ** 2 + (across / sigma_y) ** 2


def gaussian_kernel(size: int, sigma_x: float, sigma_y: float, theta: float = 0.0, beta: float = 1.0) -> Kernel:
    """Generalized Gaussian exp(-d^beta / 2) of sum 1, d = x^T S^-1 x; beta = 1 is the Gaussian.

    Sigma in pixels, theta in radians. Liu et al. 2020, "Estimating generalized Gaussian blur kernels for out-of-focus
    image deblurring".
    """
    kernel = np.exp(-0.5 * _squared_distance(size, sigma_x, sigma_y, theta) ** beta)
    return kernel / kernel.sum()


def plateau_kernel(size: int, sigma_x: float, sigma_y: float, theta: float = 0.0, beta: float = 1.0) -> Kernel:
    """Plateau-shaped kernel 1 / (1 + d^beta) of sum 1, d = x^T S^-1 x (Real-ESRGAN, section 3.1)."""
    kernel = 1 / (1 + _squared_distance(size, sigma_x, sigma_y, theta) ** beta)
    return kernel / kernel.sum()


def sinc_kernel(size: int, omega: float) -> Kernel:
    """Circular low-pass omega J1(omega r) / (2 pi r) of sum 1, cut-off omega in radians per pixel.

    Real-ESRGAN, equation 6.
    """
    radius = np.hypot(*np.meshgrid(np.arange(size) - size // 2, np.arange(size) - size // 2))
    # J1(x) / x tends to 1/2.
    x = np.maximum(omega * radius, 1e-8)
    kernel = scipy.special.j1(x) / x
    return kernel / kernel.sum()


# Largest error of filter2d for an image in [0, 1]: 0.03 gray levels of 255.
_FILTER_TOLERANCE = 1e-4
# From 130 taps on, OpenCV filters with a Fourier transform, which is as slow as direct filtering with 400 taps.
_DIRECT_TAPS = 129


def _crop(kernel: Kernel, tolerance: float) -> Float[np.ndarray, "a b"]:
    """Remove outer rows and columns, symmetrically, with a total magnitude of at most `tolerance`."""
    trims = []
    for profile in (np.abs(kernel).sum(1), np.abs(kernel).sum(0)):
        outside = np.cumsum((profile + profile[::-1])[: len(profile) // 2])
        trims.append(int((outside <= tolerance / 2).sum()))
    (rows, columns), (height, width) = trims, kernel.shape
    return kernel[rows : height - rows, columns : width - columns]


def _separate(kernel: Float[np.ndarray, "a b"]) -> tuple[Float[np.ndarray, " a"], Float[np.ndarray, " b"]]:
    """Best rank-1 approximation, as column and row; exactly symmetric, so that OpenCV adds mirrored pixels first."""
    u, s, v = np.linalg.svd(kernel)
    column, row = s[0] * u[:, 0], v[0]
    return (column + column[::-1]) / 2, (row + row[::-1]) / 2


def filter2d(image: RGBFloat, kernel: Kernel) -> RGBFloat:
    """Correlate each channel with a kernel of odd size; borders are reflected without repeating the edge pixel.

    The error is at most 1e-4 for images in [0, 1]: negligible taps are dropped, and separable kernels (isotropic
    Gaussians, two fifths of the kernels drawn in training) are applied as a column and a row.
    """
    kernel = _crop(kernel, _FILTER_TOLERANCE / 2)
    column, row = _separate(kernel)
    if np.abs(kernel - np.outer(column, row)).sum() < _FILTER_TOLERANCE / 2:
        column, row = column.astype(np.float32), row.astype(np.float32)
        return cv2.sepFilter2D(image, -1, row, column, borderType=cv2.BORDER_REFLECT_101)
    height, radius = len(image), len(kernel) // 2
    padded = cv2.copyMakeBorder(image, radius, radius, 0, 0, cv2.BORDER_REFLECT_101)
    result, start = np.zeros_like(image), 0
    parts = -(-len(kernel) // max(1, _DIRECT_TAPS // kernel.shape[1]))
    for part in np.array_split(kernel.astype(np.float32), parts):
        rows = padded[start : start + height + len(part) - 1]
        filtered = cv2.filter2D(rows, -1, part, anchor=(-1, 0), borderType=cv2.BORDER_REFLECT_101)
        result += filtered[:height]
        start += len(part)
    return result
