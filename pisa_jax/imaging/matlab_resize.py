"""MATLAB's bicubic resize, with which the LQ images of published benchmarks were made."""

from typing import Literal

import numpy as np
import scipy.sparse


def _cubic(x: np.ndarray) -> np.ndarray:
    """Keys' cubic convolution kernel with a = -0.5 (IEEE TASSP 1981)."""
    x = np.abs(x)
    near = 1.5 * x**3 - 2.5 * x**2 + 1
    far = -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    return np.where(x <= 1, near, np.where(x <= 2, far, 0.0))


def _bicubic_matrix(size: int, scale: float | int, border: str) -> scipy.sparse.csr_array:
    """Compute the weights (new size, size) of one axis; the kernel is stretched for downscaling."""
    new = int(np.ceil(size * scale))
    stretch = min(scale, 1.0)
    center = (np.arange(new) + 0.5) / scale - 0.5
    taps = int(np.ceil(4 / stretch)) + 2
    source = np.floor(center - 2 / stretch).astype(int)[:, None] + np.arange(taps)
    weights = _cubic(stretch * (center[:, None] - source))
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
    """Resize (h, w) or (h, w, c) as MATLAB's imresize(image, scale, "bicubic") does, antialiased for downscaling.

    Sides become ceil(scale n). uint8 gives uint8, rounded half up and clipped after each axis, rows first; floats give
    float64, not rounded. Beyond the border MATLAB mirrors the image; older releases, with which the common LQ files of
    Set5, Set14 and BSD100 were made, replicated the last pixel.

    Raises:
        ValueError: `scale` is not positive, or `border` is unknown.
    """
    if scale <= 0 or border not in ("mirror", "replicate"):
        raise ValueError(f"scale must be above 0 and border 'mirror' or 'replicate', not {scale} and {border!r}")
    for axis in (0, 1):
        resized = _resize_axis(image, _bicubic_matrix(image.shape[axis], scale, border), axis)
        image = np.clip(np.floor(resized + 0.5), 0, 255).astype(np.uint8) if image.dtype == np.uint8 else resized
    return image
