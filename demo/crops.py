"""Random crops of photographs for pairs.py, and of images of pairs for the VAE."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
from jaxtyping import Float, UInt8

from pisa_jax.imaging.image_data import from_array
from pisa_jax.imaging.image_files import find_images
from pisa_jax.imaging.image_reading import read_rgb8
from pisa_jax.imaging.network_input import prepare_input
from pisa_jax.imaging.ranges import signed_to_uint8, uint8_to_signed

# Smallest factor by which a photograph is downscaled before it is cropped, which gives finer detail per pixel.
SMALLEST = 0.5
# Range of an unsharp mask: Real-ESRGAN was trained on ground truths that were sharpened like this.
SHARPEN_SIGMA, SHARPEN_AMOUNT = (0.8, 2.5), (0.3, 1.2)
SCALE = 4


def random_crop(photograph: np.ndarray, side: int, rng: np.random.Generator) -> UInt8[np.ndarray, "s s 3"]:
    """Crop a photograph at a random scale and position, mirrored with probability 1/2."""
    scale = rng.uniform(max(SMALLEST, side / min(photograph.shape[:2])), 1) if rng.random() < 0.5 else 1.0
    source = min(round(side / scale), *photograph.shape[:2])
    y, x = (rng.integers(length - source + 1) for length in photograph.shape[:2])
    crop = photograph[y : y + source, x : x + source][:, :: rng.choice((-1, 1))]
    crop = cv2.resize(crop, (side, side), interpolation=cv2.INTER_AREA) if source != side else crop
    return np.ascontiguousarray(crop)


def read_network_input(file: Path) -> UInt8[np.ndarray, "h w 3"]:
    """Read an LQ image and upscale it as in inference; 8-bit."""
    image, _ = prepare_input(from_array(read_rgb8(file)), SCALE, min_size=0)
    return signed_to_uint8(image)


def read_pairs(pairs: Path) -> dict[str, list[UInt8[np.ndarray, "h w 3"]]]:
    """Read the images of the folders gt, lq (upscaled) and, if it exists, teacher."""
    readers = {"gt": read_rgb8, "lq": read_network_input, "teacher": read_rgb8}
    with ThreadPoolExecutor() as pool:
        return {
            side: list(pool.map(reader, find_images(pairs / side)))
            for side, reader in readers.items()
            if (pairs / side).is_dir()
        }


def sharpened(crop: UInt8[np.ndarray, "s s 3"], rng: np.random.Generator) -> UInt8[np.ndarray, "s s 3"]:
    """Apply an unsharp mask of random width and strength."""
    blurred = cv2.GaussianBlur(crop, (0, 0), rng.uniform(*SHARPEN_SIGMA))
    amount = rng.uniform(*SHARPEN_AMOUNT)
    return cv2.addWeighted(crop, 1 + amount, blurred, -amount, 0)


def mixed_crops(
    images: dict[str, Sequence[np.ndarray]], side: int, count: int, seed: int
) -> Float[np.ndarray, "b s s 3"]:
    """Draw `count` crops in [-1, 1]; of four, two are clean, one is degraded, one is of the teacher or sharpened."""
    rng = np.random.default_rng(seed)
    made = []
    for index in range(count):
        kind = ("gt", "lq", "gt", "teacher")[index % 4]
        chosen = images.get(kind, images["gt"])
        image = chosen[rng.integers(len(chosen))]
        y, x = (rng.integers(length - side + 1) for length in image.shape[:2])
        crop = image[y : y + side, x : x + side][:, :: rng.choice((-1, 1))]
        made.append(sharpened(np.ascontiguousarray(crop), rng) if kind not in images else crop)
    return uint8_to_signed(np.stack(made))
