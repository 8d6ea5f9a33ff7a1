"""From a decoded image to the network input, and from the network output to the image that is written."""

import dataclasses

import numpy as np
from jaxtyping import Float, Float32
from PIL import Image
from PIL.ExifTags import IFD, Base

from pisa_jax.imaging.image_io import Picture

LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # BT.601, as Pillow's mode "L"
METHODS = {"bicubic": Image.Resampling.BICUBIC, "lanczos": Image.Resampling.LANCZOS}


def resize(
    array: Float[np.ndarray, "h w *c"], size: tuple[int, int], method: str = "bicubic"
) -> Float32[np.ndarray, "h2 w2 *c"]:
    """Resize to `size` = (h, w) with Pillow's antialiased kernels in floating point; results may overshoot."""
    planes = np.moveaxis(array.reshape(*array.shape[:2], -1).astype(np.float32, copy=False), -1, 0)
    planes = [Image.fromarray(np.ascontiguousarray(plane)).resize(size[::-1], METHODS[method]) for plane in planes]
    return np.stack([np.asarray(plane) for plane in planes], -1).reshape(*size, *array.shape[2:])


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a network input was made from a picture; all sizes are (height, width)."""

    # of the result: the picture's size times the scale
    target: tuple[int, int]
    # of the network's image without padding: larger than target for a small picture
    working: tuple[int, int]
    # rows below and columns to the right of it
    padding: tuple[int, int]


def _resize8(image: Float[np.ndarray, "h w 3"], size: tuple[int, int]) -> Float32[np.ndarray, "h2 w2 3"]:
    # Rounded to 8 bit along each axis, as the original's inputs are: the same picture in, the same picture out.
    rounded = Image.fromarray(np.rint(image * 255).astype(np.uint8))
    return np.asarray(rounded.resize(size[::-1], Image.Resampling.BICUBIC), np.float32) / 255


def prepare(
    picture: Picture, scale: float | int, min_size: int = 512, multiple: int = 8
) -> tuple[Float32[np.ndarray, "h w 3"], Plan]:
    """The network input in [-1, 1], enlarged bicubically and padded by reflection to a multiple of `multiple`.

    As the original program does, a picture with a side below int(min_size / scale) is first enlarged until that side
    has this length. Unlike there the result has exactly round(side * scale) pixels.
    """
    if not 1 <= scale < np.inf:
        raise ValueError(f"scale is {scale}; allowed are finite numbers from 1 on")
    image, sides = np.clip(picture.rgb, 0, 1), picture.rgb.shape[:2]
    exact8 = picture.bits == 8 and picture.icc is None  # colour management leaves values between the levels
    enlarge = _resize8 if exact8 else resize
    target = (round(sides[0] * scale), round(sides[1] * scale))
    threshold = int(min_size / scale)
    if min(sides) < threshold:
        factor = threshold / min(sides)
        image = enlarge(image, (int(factor * sides[0]), int(factor * sides[1])))
    working = (round(image.shape[0] * scale), round(image.shape[1] * scale))
    image = np.clip(enlarge(image, working), 0, 1)
    padding = (-working[0] % multiple, -working[1] % multiple)
    image = np.pad(image, ((0, padding[0]), (0, padding[1]), (0, 0)), mode="reflect")
    return image * 2 - 1, Plan(target, working, padding)


def finish(output: Float[np.ndarray, "h w 3"], plan: Plan, picture: Picture) -> Picture:
    """The picture made of a network output in [-1, 1], with or without the padding, and of what `picture` carries."""
    rgb = output[: plan.working[0], : plan.working[1]].astype(np.float32) / 2 + 0.5
    if plan.working != plan.target:
        rgb = resize(rgb, plan.target)
    rgb = np.clip(rgb, 0, 1)
    if picture.gray:
        rgb = np.repeat((rgb @ LUMA)[..., None], 3, -1)
    beyond_srgb = picture.rgb - np.clip(picture.rgb, 0, 1)
    if beyond_srgb.any():
        rgb = rgb + resize(beyond_srgb, plan.target)
    alpha = None if picture.alpha is None else np.clip(resize(picture.alpha, plan.target), 0, 1)
    exif = _exif_for_size(picture.exif, plan.target) if picture.exif else None
    return dataclasses.replace(picture, rgb=rgb, alpha=alpha, exif=exif)


def _exif_for_size(exif: bytes, size: tuple[int, int]) -> bytes:
    """The block with the picture's new size, where it names one."""
    block = Image.Exif()
    block.load(exif)
    details = block.get_ifd(IFD.Exif)
    for tag, side in ((Base.ExifImageHeight, size[0]), (Base.ExifImageWidth, size[1])):
        if tag in details:
            details[tag] = side
    return block.tobytes()
