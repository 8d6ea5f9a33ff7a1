"""Training samples: an image of a source is read, cropped, flipped and degraded; latents are only cropped."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from PIL import Image

from pisa_jax.data.latents import LatentSource
from pisa_jax.data.sources import MixedSource, Source, SourceImage
from pisa_jax.data.text_files import normalize_path
from pisa_jax.data.unusable_files import Unusable, file_name, parts
from pisa_jax.imaging.arrays import RGB8, Latents
from pisa_jax.imaging.ranges import uint8_to_unit, unit_to_uint8

DegradeFunction = Callable[[np.ndarray, np.random.Generator], np.ndarray]

# Consecutive unreadable images that stop a worker: with 10 % unreadable images, 1 in 1e10 samples stops by chance.
MAX_FAILURES = 10
# Consecutive images that are too small and stop a worker: with 95 % of them, 1 in 1e22 samples stops by chance.
MAX_SMALL = 1000
# Images are upscaled as a whole up to this multiple of the area of a crop; of longer ones only the window is upscaled.
MAX_UPSCALED = 16


class TrainingSample(NamedTuple):
    """A training pair as sent between processes: images of 8 bits, a quarter of the size of float32, or latents."""

    gt: RGB8 | Latents
    lq: RGB8 | Latents
    path: str
    use_prompt: bool
    unusable: tuple[Unusable, ...]


def read_source_image(
    source: Source, index: int, rng: np.random.Generator, least: float = 0
) -> tuple[SourceImage, tuple[Unusable, ...]]:
    """Read image `index`, or random others until one is readable and its shorter side has at least `least` pixels.

    Returns it and the files that it replaces. Raises OSError with all reasons after `MAX_FAILURES` unreadable or
    `MAX_SMALL` small images in a row.
    """
    replaced: list[Unusable] = []
    while True:
        part, position = source.choose(index, rng) if isinstance(source, MixedSource) else (0, index)
        chosen = parts(source)[part]
        try:
            source_image = chosen[position]
            height, width = source_image.image.shape[:2]
            if min(height, width) >= least:
                return source_image, tuple(replaced)
            kind, reason = "small", f"{source_image.path} is {width} x {height}; {least:g} pixels are needed"
        except OSError as error:
            kind, reason = "unreadable", str(error)
        replaced.append(Unusable(kind, part, file_name(chosen, position), reason))
        reasons = [report.reason for report in replaced if report.kind == kind]
        if kind == "unreadable" and len(reasons) == MAX_FAILURES:
            raise OSError(f"{MAX_FAILURES} images in a row cannot be read:\n" + "\n".join(reasons))
        if kind == "small" and len(reasons) == MAX_SMALL:
            raise OSError(
                f"{MAX_SMALL} images in a row are smaller than {least:g} pixels, e.g. {reasons[0]}; lower data.crop or "
                "data.min_size_share"
            )
        index = int(rng.integers(len(source)))


def crop_pair(
    source_image: SourceImage, crop: int, flip: bool, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray | None]:
    """Crop the same random crop x crop window of GT and LQ, mirrored left-right with probability 1/2 if `flip`.

    Images smaller than the crop are first upscaled (bicubic) until their shorter side equals it. LQ is None for a
    source without LQ images.
    """
    images = [source_image.image] if source_image.lq is None else [source_image.image, source_image.lq]
    height, width = source_image.image.shape[:2]
    scale = max(1.0, crop / min(height, width))
    if scale > 1:
        height, width = max(crop, round(height * scale)), max(crop, round(width * scale))
    whole = scale > 1 and height * width <= MAX_UPSCALED * crop**2
    if whole:
        bicubic = Image.Resampling.BICUBIC
        images = [np.asarray(Image.fromarray(image).resize((width, height), bicubic)) for image in images]
    top, left = int(rng.integers(height - crop + 1)), int(rng.integers(width - crop + 1))
    if scale > 1 and not whole:
        images = [_upscale_window(image, (height, width), top, left, crop) for image in images]
        top = left = 0
    step = -1 if flip and rng.random() < 0.5 else 1
    crops = [np.ascontiguousarray(image[top : top + crop, left : left + crop][:, ::step]) for image in images]
    return crops[0], crops[1] if len(crops) > 1 else None


def _upscale_window(image: np.ndarray, size: tuple[int, int], top: int, left: int, crop: int) -> np.ndarray:
    """Upscale only a window of a long, thin image; equal to the window of the upscaled image up to rounding."""
    rows, columns = image.shape[0] / size[0], image.shape[1] / size[1]
    right, bottom = min((left + crop) * columns, image.shape[1]), min((top + crop) * rows, image.shape[0])
    box = (left * columns, top * rows, right, bottom)
    return np.asarray(Image.fromarray(image).resize((crop, crop), Image.Resampling.BICUBIC, box=box))


def make_training_sample(
    index: int,
    rng: np.random.Generator,
    *,
    source: Source,
    crop: int,
    flip: bool,
    null_prompt_probability: float,
    min_size_share: float,
    degrade: DegradeFunction | None,
) -> TrainingSample:
    """Read, crop, flip and degrade image `index`; pairs are not degraded. `rng` draws all random numbers."""
    source_image, unusable = read_source_image(source, index, rng, min_size_share * crop)
    height, width = source_image.image.shape[:2]
    if min(height, width) < crop:
        reason = f"{source_image.path} is {width} x {height}"
        unusable = (*unusable, Unusable("upscaled", 0, normalize_path(source_image.path), reason))
    gt, lq = crop_pair(source_image, crop, flip, rng)
    use_prompt = bool(rng.random() >= null_prompt_probability)
    if lq is None:
        degraded = degrade(uint8_to_unit(gt), rng)
        if degraded.shape != gt.shape:
            raise ValueError(
                f"degrade returned shape {degraded.shape} for a crop of shape {gt.shape}; shapes must match"
            )
        lq = unit_to_uint8(degraded)
    return TrainingSample(gt, lq, source_image.path, use_prompt, unusable)


def make_latent_sample(
    index: int, rng: np.random.Generator, *, source: LatentSource, crop: int, null_prompt_probability: float
) -> TrainingSample:
    """Crop the same random window of crop x crop latents of pair `index`.

    The window is not mirrored: the latents of a mirrored image are not the mirrored latents of the image.
    """
    pair = source[index]
    top, left = (int(rng.integers(side - crop + 1)) for side in pair.image.shape[:2])
    window = np.s_[top : top + crop, left : left + crop]
    use_prompt = bool(rng.random() >= null_prompt_probability)
    return TrainingSample(pair.image[window], pair.lq[window], pair.path, use_prompt, ())
