"""Second-order degradation of Real-ESRGAN (Wang et al. 2021, arXiv 2107.10833, section 3) with PiSA-SR's ranges.

Images are float32 HWC RGB in [0, 1]. Every operation reproduces the one that the published weights were trained with,
including its deviations from the paper and from libraries, which the docstrings name. All random numbers come from the
generator that the caller passes.
"""

import functools
from dataclasses import dataclass

import cv2
import numpy as np
import scipy.sparse
import scipy.special
from jaxtyping import Float32, UInt8

from pisa_jax.data.blur_kernels import Kernel, RGBFloat, filter2d, gaussian_kernel, plateau_kernel, sinc_kernel
from pisa_jax.imaging.arrays import RGB8

Plane = Float32[np.ndarray, "h w"]
Table = Float32[np.ndarray, "8 8"]
Resized = Float32[np.ndarray, "rows columns 3"]

RESIZE_MODES = ("area", "bilinear", "bicubic")
KERNEL_KINDS = ("iso", "aniso", "generalized_iso", "generalized_aniso", "plateau_iso", "plateau_aniso")
MIN_SIDE = 8


def _check_probabilities(name: str, values: tuple[float, ...], count: int):
    if len(values) != count or min(values) < 0 or abs(sum(values) - 1) > 1e-6:
        raise ValueError(f"{name} = {values}: give {count} probabilities that sum to 1")


@dataclass(frozen=True)
class DegradationRound:
    """Ranges of one round of blur, resize, noise and JPEG; all distributions are uniform."""

    # Probability that the round starts with a blur.
    blur_prob: float
    # Standard deviation of the blur along each axis, in pixels of the blurred image.
    blur_sigma: tuple[float, float]
    # Probabilities of upscaling, downscaling and keeping the size.
    resize_probs: tuple[float, float, float]
    # Smallest and largest factor: downscaling draws from [smallest, 1], upscaling from [1, largest].
    resize_factor: tuple[float, float]
    # Standard deviation of Gaussian noise, in gray levels of 255.
    noise_sigma: tuple[float, float]
    # Factor on Poisson noise.
    poisson_scale: tuple[float, float]
    # JPEG quality; it is not rounded.
    jpeg_quality: tuple[float, float]

    def __post_init__(self):
        _check_probabilities("resize_probs", self.resize_probs, 3)
        for name in ("blur_sigma", "resize_factor", "noise_sigma", "poisson_scale", "jpeg_quality"):
            low, high = getattr(self, name)
            if not 0 <= low <= high:
                raise ValueError(f"{name} = {(low, high)}: give (smallest, largest), both at least 0")


@dataclass(frozen=True)
class DegradationParams:
    """Ranges of the whole pipeline; the defaults are those of PiSA-SR's training (Sun et al. 2025)."""

    # The two rounds (PiSA-SR; weaker than those of Real-ESRGAN).
    first: DegradationRound = DegradationRound(
        blur_prob=1.0,
        blur_sigma=(0.2, 3.0),
        resize_probs=(0.2, 0.7, 0.1),
        resize_factor=(0.3, 1.5),
        noise_sigma=(1.0, 15.0),
        poisson_scale=(0.05, 2.0),
        jpeg_quality=(60.0, 95.0),
    )
    second: DegradationRound = DegradationRound(
        blur_prob=0.5,
        blur_sigma=(0.2, 1.5),
        resize_probs=(0.3, 0.4, 0.3),
        resize_factor=(0.6, 1.2),
        noise_sigma=(1.0, 12.0),
        poisson_scale=(0.05, 1.0),
        jpeg_quality=(60.0, 100.0),
    )
    # Sizes of blur and sinc kernels in pixels, with equal probabilities (Real-ESRGAN).
    kernel_sizes: tuple[int, ...] = (7, 9, 11, 13, 15, 17, 19, 21)
    # Probability that a blur kernel is a sinc filter (Real-ESRGAN).
    sinc_prob: float = 0.1
    # Probabilities of KERNEL_KINDS for all other blur kernels (Real-ESRGAN).
    kernel_probs: tuple[float, ...] = (0.45, 0.25, 0.12, 0.03, 0.12, 0.03)
    # Exponent of generalized Gaussians: below 1 and above 1 with equal probabilities (Real-ESRGAN).
    generalized_beta: tuple[float, float] = (0.5, 4.0)
    # Exponent of plateau kernels, drawn in the same way (Real-ESRGAN).
    plateau_beta: tuple[float, float] = (1.0, 2.0)
    # Probability that noise is Gaussian; it is Poisson otherwise (Real-ESRGAN).
    gaussian_noise_prob: float = 0.5
    # Probability that the three channels have the same noise (Real-ESRGAN).
    gray_noise_prob: float = 0.4
    # Probability of the final sinc filter (Real-ESRGAN).
    final_sinc_prob: float = 0.8
    # Downscaling factor: the degraded image has 1 / scale of the size of the ground truth.
    scale: int = 4

    def __post_init__(self):
        _check_probabilities("kernel_probs", self.kernel_probs, len(KERNEL_KINDS))
        if any(size < 1 or size % 2 == 0 for size in self.kernel_sizes):
            raise ValueError(f"kernel_sizes = {self.kernel_sizes}: give odd numbers of pixels")


PISA_SR = DegradationParams()


def _random_beta(rng: np.random.Generator, low: float, high: float) -> float:
    return rng.uniform(low, 1) if rng.random() < 0.5 else rng.uniform(1, high)


def random_kernel(rng: np.random.Generator, sigma: tuple[float, float], params: DegradationParams = PISA_SR) -> Kernel:
    """Draw a blur kernel: its size, its kind (sinc or one of KERNEL_KINDS) and its parameters."""
    size = int(rng.choice(params.kernel_sizes))
    if rng.random() < params.sinc_prob:
        # A small kernel would truncate the wide ringing of a low cut-off.
        return sinc_kernel(size, rng.uniform(np.pi / (3 if size < 13 else 5), np.pi))
    kind = KERNEL_KINDS[rng.choice(len(KERNEL_KINDS), p=params.kernel_probs)]
    sigma_x = rng.uniform(*sigma)
    sigma_y, theta = (rng.uniform(*sigma), rng.uniform(-np.pi, np.pi)) if "aniso" in kind else (sigma_x, 0.0)
    if kind.startswith("plateau"):
        return plateau_kernel(size, sigma_x, sigma_y, theta, _random_beta(rng, *params.plateau_beta))
    beta = _random_beta(rng, *params.generalized_beta) if kind.startswith("generalized") else 1.0
    return gaussian_kernel(size, sigma_x, sigma_y, theta, beta)


# Resize -------------------------------------------------------------------------------------------


def _averaging_matrix(source: int, target: int) -> scipy.sparse.csr_array:
    """Matrix (m, n) whose row i averages pixels floor(i n / m) to ceil((i + 1) n / m) - 1; n: source, m: target."""
    index = np.arange(target)
    start, end = index * source // target, -(-(index + 1) * source // target)
    count = end - start
    offset = np.concatenate([[0], np.cumsum(count)])
    columns = np.arange(offset[-1]) + np.repeat(start - offset[:-1], count)
    weights = np.repeat(1 / count, count).astype(np.float32)
    return scipy.sparse.csr_array((weights, columns, offset), shape=(target, source))


def _resize_area(image: RGBFloat, rows: int, columns: int) -> Resized:
    height, width = image.shape[:2]
    image = (_averaging_matrix(height, rows) @ image.reshape(height, width * 3)).reshape(rows, width, 3)
    image = cv2.transpose(image).reshape(width, rows * 3)
    return cv2.transpose((_averaging_matrix(width, columns) @ image).reshape(columns, rows, 3))


def resize(image: RGBFloat, size: tuple[int, int] | float, mode: str) -> Resized:
    """Resize to (height, width), or by a factor, without antialiasing; pixel centers are at half-integers.

    "area" is the unweighted mean of all source pixels that a target pixel overlaps (adaptive average pooling);
    "bicubic" is Keys' kernel with a = -0.75. A factor gives floor(side * factor) samples at distances of exactly
    1 / factor pixels, as in the original implementation: up to 1 / factor pixels at the right and bottom are lost.
    Returns the image itself if the size does not change.
    """
    if mode not in RESIZE_MODES:
        raise ValueError(f"resize mode {mode!r}: use one of {', '.join(RESIZE_MODES)}")
    height, width = image.shape[:2]
    rows, columns = size if isinstance(size, tuple) else (max(1, int(height * size)), max(1, int(width * size)))
    if (rows, columns) == (height, width):
        return image
    if mode == "area":
        return _resize_area(image, rows, columns)
    interpolation = cv2.INTER_LINEAR if mode == "bilinear" else cv2.INTER_CUBIC
    if isinstance(size, tuple):
        return cv2.resize(image, (columns, rows), interpolation=interpolation)
    step = 1 / size
    to_source = np.array([[step, 0, step / 2 - 0.5], [0, step, step / 2 - 0.5]])
    flags = interpolation | cv2.WARP_INVERSE_MAP
    return cv2.warpAffine(image, to_source, (columns, rows), flags=flags, borderMode=cv2.BORDER_REPLICATE)


# JPEG ---------------------------------------------------------------------------------------------

# ITU-T T.81, tables K.1 and K.2, one row per vertical frequency.
_LUMA_TABLE = np.array(
    [
        [16, 11, 10, 16, 24, 40, 51, 61],
        [12, 12, 14, 19, 26, 58, 60, 55],
        [14, 13, 16, 24, 40, 57, 69, 56],
        [14, 17, 22, 29, 51, 87, 80, 62],
        [18, 22, 37, 56, 68, 109, 103, 77],
        [24, 35, 55, 64, 81, 104, 113, 92],
        [49, 64, 78, 87, 103, 121, 120, 101],
        [72, 92, 95, 98, 112, 100, 103, 99],
    ],
    np.float32,
)
_CHROMA_TABLE = np.full((8, 8), 99, np.float32)
_CHROMA_TABLE[:4, :4] = [[17, 18, 24, 47], [18, 21, 26, 66], [24, 26, 56, 99], [47, 66, 99, 99]]

# RGB in [0, 1] to Y - 128, Cb - 128, Cr - 128 in gray levels, and back (JFIF 1.02).
_TO_YCC = np.float32(
    [[76.245, 149.685, 29.07, -128], [-43.02768, -84.47232, 127.5, 0], [127.5, -106.76544, -20.73456, 0]]
)
_FROM_YCC = np.float32([[1, 0, 1.402, 128], [1, -0.344136, -0.714136, 128], [1, 1.772, 0, 128]]) / np.float32(255)

# Orthonormal 8-point DCT-II, one row per frequency.
_DCT = np.float32(np.cos((2 * np.arange(8) + 1) * np.arange(8)[:, None] * np.pi / 16) / 2)
_DCT[0] /= np.sqrt(np.float32(2))


def _along_rows(matrix: Table, plane: Plane) -> Plane:
    """Multiply each band of 8 rows; BLAS does not split so small products over threads, so results are reproducible."""
    return (matrix @ plane.reshape(-1, 8, plane.shape[1])).reshape(plane.shape)


def _quantize(plane: Plane, table: Table) -> Plane:
    """Round the DCT of 8 x 8 blocks to multiples of `table` (one row per horizontal frequency); returns pixels."""
    coefficients = _along_rows(_DCT, cv2.transpose(_along_rows(_DCT, plane)))
    blocks = coefficients.reshape(-1, 8, plane.shape[0])
    step = np.tile(table, plane.shape[0] // 8)
    blocks /= step
    np.rint(blocks, out=blocks)
    blocks *= step
    return _along_rows(_DCT.T, cv2.transpose(_along_rows(_DCT.T, coefficients)))


def jpeg(image: RGBFloat, quality: float) -> RGBFloat:
    """Compress and decompress an image in [0, 1] with a JPEG quality of 1..100, which need not be an integer.

    As in the original implementation: 4:2:0 with averaged and repeated chroma, rounding of the coefficients only, sides
    padded with black to multiples of 16, the luma table transposed. Results differ from those of libjpeg-turbo by 0.02
    on average and by 0.25 at most.
    """
    height, width = image.shape[:2]
    scale = np.float32(50 / quality if quality < 50 else max(2 - quality / 50, 1e-4))
    image = cv2.copyMakeBorder(image, 0, -height % 16, 0, -width % 16, cv2.BORDER_CONSTANT, value=0)
    size = image.shape[1], image.shape[0]
    halved = cv2.resize(image, (size[0] // 2, size[1] // 2), interpolation=cv2.INTER_AREA)
    luma = _quantize(cv2.transform(image, _TO_YCC[:1]), _LUMA_TABLE * scale)
    chroma = np.concatenate(cv2.split(cv2.transform(halved, _TO_YCC[1:])))
    chroma = cv2.merge(np.split(_quantize(chroma, _CHROMA_TABLE * scale), 2))
    chroma = cv2.resize(chroma, size, interpolation=cv2.INTER_NEAREST)
    image = cv2.transform(cv2.merge([luma, chroma]), _FROM_YCC)
    return np.clip(image[:height, :width], 0, 1, out=np.empty((height, width, 3), np.float32))


# Noise --------------------------------------------------------------------------------------------

# Noise is looked up in tables of quantiles with random integers, which is many times faster than exact sampling. The
# error of probabilities is at most 1 / 8192: tails end at 4.3 sigma (normal) and near 3.7 sigma (Poisson).
_NORMAL = scipy.special.ndtri((np.arange(2**16) + 0.5) / 2**16).astype(np.float32)
_NORMAL /= _NORMAL.std()
_POISSON_BITS = 12
_LEVELS = np.arange(256, dtype=np.float32) / 255


def _random_words(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Draw uniform 16-bit integers; drawing four at a time halves the time."""
    count = int(np.prod(shape))
    return rng.integers(2**64, size=-(-count // 4), dtype=np.uint64).view(np.uint16)[:count].reshape(shape)


@functools.lru_cache(maxsize=9)
def _poisson_table(values: int) -> Float32[np.ndarray, " n"]:
    """Quantiles of Poisson(values x) / values - x: a row of 4096 for each of the 256 levels x (4 MB, 40 ms)."""
    counts = np.arange(2 * values + 40)
    quantiles = (np.arange(2**_POISSON_BITS) + 0.5) / 2**_POISSON_BITS
    means = values * np.arange(256) / 255
    drawn = [np.searchsorted(scipy.special.pdtr(counts, mean), quantiles) for mean in means]
    return ((np.array(drawn) - means[:, None]) / values).astype(np.float32).ravel()


def _to_levels(image: Float32[np.ndarray, "..."]) -> UInt8[np.ndarray, "..."]:
    """Convert [0, 1] to 8 bits: clip and round."""
    return cv2.convertScaleAbs(np.clip(image, 0, 1), alpha=255)


def _add_clipped(image: RGBFloat, noise: Float32[np.ndarray, "h w _"], strength: float) -> RGBFloat:
    noise = noise if noise.shape[2] == 3 else cv2.merge([noise] * 3)
    result = cv2.scaleAdd(noise, strength, image)
    return np.clip(result, 0, 1, out=result)


def gaussian_noise(image: RGBFloat, sigma: float, gray: bool, rng: np.random.Generator) -> RGBFloat:
    """Add normal noise of `sigma` gray levels of 255, the same to all channels if gray; clipped to [0, 1]."""
    noise = _NORMAL.take(_random_words(rng, (*image.shape[:2], 1 if gray else 3)))
    return _add_clipped(image, noise, sigma / 255)


def poisson_noise(image: RGBFloat, scale: float, gray: bool, rng: np.random.Generator) -> RGBFloat:
    """Add `scale` times the shot noise of the 8-bit image (if gray: of its luma, to all channels); clipped to [0, 1].

    Shot noise is Poisson(v x) / v - x; v is the number of distinct levels rounded up to a power of two (Real-ESRGAN).
    """
    source = cv2.transform(image, np.float32([[0.2989, 0.587, 0.114]])) if gray else image
    levels = _to_levels(source).reshape(len(image), -1)
    distinct = int(np.count_nonzero(cv2.calcHist([levels], [0], None, [256], [0, 256])))
    table = _poisson_table(1 << (distinct - 1).bit_length())
    index = levels.astype(np.uint32) << _POISSON_BITS | _random_words(rng, levels.shape) >> 16 - _POISSON_BITS
    return _add_clipped(image, table.take(index).reshape(*image.shape[:2], -1), scale)


# The pipeline -------------------------------------------------------------------------------------


def _random_factor(rng: np.random.Generator, ranges: DegradationRound) -> float:
    smallest, largest = ranges.resize_factor
    return (rng.uniform(1, largest), rng.uniform(smallest, 1), 1.0)[rng.choice(3, p=ranges.resize_probs)]


def _random_mode(rng: np.random.Generator) -> str:
    return RESIZE_MODES[rng.integers(len(RESIZE_MODES))]


def _add_noise(
    image: RGBFloat, rng: np.random.Generator, ranges: DegradationRound, params: DegradationParams
) -> RGBFloat:
    gray = rng.random() < params.gray_noise_prob
    if rng.random() < params.gaussian_noise_prob:
        return gaussian_noise(image, rng.uniform(*ranges.noise_sigma), gray, rng)
    return poisson_noise(image, rng.uniform(*ranges.poisson_scale), gray, rng)


def _degrade_to_low_resolution(gt: np.ndarray, rng: np.random.Generator, params: DegradationParams) -> RGBFloat:
    """`degrade` without the final upscaling: 1 / scale of the size of `gt`, not rounded, possibly outside [0, 1]."""
    if gt.dtype != np.float32 or gt.ndim != 3 or gt.shape[2] != 3 or min(gt.shape[:2]) < MIN_SIDE:
        raise ValueError(
            f"cannot degrade {gt.dtype} {gt.shape}: give float32 (height, width, 3) in [0, 1], no side below {MIN_SIDE}"
        )
    height, width = gt.shape[:2]
    first, second = params.first, params.second
    image = gt
    if rng.random() < first.blur_prob:
        image = filter2d(image, random_kernel(rng, first.blur_sigma, params))
    image = resize(image, _random_factor(rng, first), _random_mode(rng))
    image = _add_noise(image, rng, first, params)
    image = jpeg(image, rng.uniform(*first.jpeg_quality))

    if rng.random() < second.blur_prob:
        image = filter2d(image, random_kernel(rng, second.blur_sigma, params))
    factor = _random_factor(rng, second) / params.scale
    image = resize(image, (max(1, int(height * factor)), max(1, int(width * factor))), _random_mode(rng))
    image = _add_noise(image, rng, second, params)

    jpeg_first, quality = rng.random() < 0.5, rng.uniform(*second.jpeg_quality)
    if jpeg_first:
        image = jpeg(image, quality)
    image = resize(image, (max(1, height // params.scale), max(1, width // params.scale)), _random_mode(rng))
    if rng.random() < params.final_sinc_prob:
        image = filter2d(image, sinc_kernel(int(rng.choice(params.kernel_sizes)), rng.uniform(np.pi / 3, np.pi)))
    if not jpeg_first:
        image = jpeg(np.clip(image, 0, 1), quality)
    return image


def degrade(gt: np.ndarray, rng: np.random.Generator, params: DegradationParams = PISA_SR) -> RGBFloat:
    """Degrade `gt` (float32 HWC in [0, 1]); the result has the same size and values k / 255.

    Blur, resize, noise and JPEG; the same at about 1 / scale of the size, with a sinc filter before or after the JPEG;
    upscaling to the original size with a random interpolation (Real-ESRGAN, figure 2; PiSA-SR, training details).
    Raises ValueError for another dtype or shape, or a side below 8.
    """
    image = resize(_degrade_to_low_resolution(gt, rng, params), gt.shape[:2], _random_mode(rng))
    return cv2.LUT(_to_levels(image), _LEVELS)


def degrade_and_downscale(gt: np.ndarray, rng: np.random.Generator, params: DegradationParams = PISA_SR) -> RGB8:
    """Degrade without the final upscaling: the 8-bit LQ image of floor(side / scale) pixels, for the same rng."""
    return _to_levels(_degrade_to_low_resolution(gt, rng, params))
