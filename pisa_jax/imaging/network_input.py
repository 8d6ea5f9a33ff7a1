"""Convert a decoded image to the network input, and the network output to the image that is written."""

import dataclasses

import cv2
import numpy as np
from jaxtyping import Float, Float32
from PIL import Image

from pisa_jax.imaging import exif, xmp
from pisa_jax.imaging.image_data import ImageData
from pisa_jax.imaging.ranges import signed_to_unit, uint8_to_unit, unit_to_signed, unit_to_uint8

LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # BT.601, as Pillow's mode "L"
# Largest difference between the channels of a gray image; profiles and their conversion are not exact.
COLORLESS = 1e-3
# Pixels of less opacity change no background by more than one level, and formats store their colors inaccurately.
INVISIBLE = 1.5 / 255
METHODS = {"bicubic": Image.Resampling.BICUBIC, "lanczos": Image.Resampling.LANCZOS}


def resize(
    array: Float[np.ndarray, "h w *c"], size: tuple[int, int], method: str = "bicubic"
) -> Float32[np.ndarray, "h2 w2 *c"]:
    """Resize to `size` = (h, w) with Pillow's antialiased kernels in floating point; results may leave the range."""
    planes = np.moveaxis(array.reshape(*array.shape[:2], -1).astype(np.float32, copy=False), -1, 0)
    planes = [Image.fromarray(np.ascontiguousarray(plane)).resize(size[::-1], METHODS[method]) for plane in planes]
    return np.stack([np.asarray(plane) for plane in planes], -1).reshape(*size, *array.shape[2:])


@dataclasses.dataclass(frozen=True)
class ResizePlan:
    """Sizes between an image, its network input and its result; all are (height, width)."""

    # size of the result: that of the image times the upscale factor
    target: tuple[int, int]
    # size of the network input without padding: larger than `target` for small images
    working: tuple[int, int]
    # rows below and columns to the right of the network input
    padding: tuple[int, int]


def visible_colors(image: ImageData) -> Float32[np.ndarray, "h w 3"]:
    """Return the colors of an image, those of invisible pixels replaced by those of the nearest visible one.

    Cut-outs are often black where they are transparent. Resizing and the network would carry this color into the
    visible border.
    """
    if image.alpha is None:
        return image.rgb
    hidden = image.alpha < INVISIBLE
    if not hidden.any() or hidden.all():
        return image.rgb
    _, labels = cv2.distanceTransformWithLabels(
        hidden.astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_5, labelType=cv2.DIST_LABEL_PIXEL
    )
    nearest = np.zeros(labels.max() + 1, np.int64)
    nearest[labels[~hidden]] = np.flatnonzero(~hidden)
    rgb = image.rgb.copy()
    rgb[hidden] = image.rgb.reshape(-1, 3)[nearest[labels[hidden]]]
    return rgb


def _resize8(image: Float[np.ndarray, "h w 3"], size: tuple[int, int]) -> Float32[np.ndarray, "h2 w2 3"]:
    # Rounded to 8 bits along each axis, as in the original program: equal inputs give equal network inputs.
    resized = Image.fromarray(unit_to_uint8(image)).resize(size[::-1], Image.Resampling.BICUBIC)
    return uint8_to_unit(np.asarray(resized))


def working_size(sides: tuple[int, int], scale: float | int, min_size: int = 512) -> tuple[int, int]:
    """Return the size at which the model works on an image of `sides`, without padding: as `prepare_input` makes it."""
    height, width = _first_size(sides, scale, min_size)
    return round(height * scale), round(width * scale)


def _first_size(sides: tuple[int, int], scale: float | int, min_size: int) -> tuple[int, int]:
    """Return the size to which an image is upscaled first if it is too small, otherwise its own."""
    threshold = int(min_size / scale)
    if min(sides) >= threshold:
        return sides
    factor = threshold / min(sides)
    return int(factor * sides[0]), int(factor * sides[1])


def prepare_input(
    image: ImageData, scale: float | int, min_size: int = 512, multiple: int = 8
) -> tuple[Float32[np.ndarray, "h w 3"], ResizePlan]:
    """Make the network input in [-1, 1]: upscaled bicubically, padded by reflection to a multiple of `multiple`.

    As in the original program, an image with a side below int(min_size / scale) is first upscaled until its shorter
    side has this length. Unlike there, the result has exactly round(side * scale) pixels per side.

    Raises:
        ValueError: `scale`, the upscale factor, is below 1 or not finite.
    """
    if not 1 <= scale < np.inf:
        raise ValueError(f"the upscale factor is {scale}; allowed are finite numbers of at least 1")
    rgb, sides = np.clip(visible_colors(image), 0, 1), image.rgb.shape[:2]
    exact8 = image.bits == 8 and image.icc is None  # color management gives values between the 8-bit levels
    upscale = _resize8 if exact8 else resize
    target = (round(sides[0] * scale), round(sides[1] * scale))
    first, working = _first_size(sides, scale, min_size), working_size(sides, scale, min_size)
    if first != sides:
        rgb = upscale(rgb, first)
    rgb = np.clip(upscale(rgb, working), 0, 1)
    padding = (-working[0] % multiple, -working[1] % multiple)
    rgb = np.pad(rgb, ((0, padding[0]), (0, padding[1]), (0, 0)), mode="reflect")
    return unit_to_signed(rgb), ResizePlan(target, working, padding)


def finish_output(output: Float[np.ndarray, "h w 3"], plan: ResizePlan, image: ImageData) -> ImageData:
    """Make the result of a network output in [-1, 1], with or without the padding of the network input.

    The result has the size `plan.target` and the alpha, colors outside sRGB, grayness and metadata of `image`.
    """
    rgb = signed_to_unit(output[: plan.working[0], : plan.working[1]].astype(np.float32))
    if plan.working != plan.target:
        rgb = resize(rgb, plan.target)
    rgb = np.clip(rgb, 0, 1)
    colors = visible_colors(image)
    if image.gray or np.ptp(colors, axis=-1).max() < COLORLESS:
        rgb = np.repeat((rgb @ LUMA)[..., None], 3, -1)
    beyond_srgb = colors - np.clip(colors, 0, 1)
    if beyond_srgb.any():
        rgb = rgb + resize(beyond_srgb, plan.target)
    alpha = None if image.alpha is None else np.clip(resize(image.alpha, plan.target), 0, 1)
    block = exif.with_size(image.exif, *plan.target) if image.exif else None
    packet = xmp.with_size(image.metadata.xmp, *plan.target) if image.metadata.xmp else None
    metadata = image.metadata._replace(xmp=packet)
    return dataclasses.replace(image, rgb=rgb, alpha=alpha, exif=block, metadata=metadata)
