"""Scale maps of `pisa-sr infer`: gray image files, matched to the inputs by name."""

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np
from jaxtyping import Float32

from pisa_jax.imaging.image_data import ImageError
from pisa_jax.imaging.image_files import find_images
from pisa_jax.imaging.image_reading import read_image
from pisa_jax.imaging.network_input import COLORLESS

# Largest difference of the aspect ratios of a map and its image, in relative terms and in pixels of the map: tools
# round sizes, and few pixels hold no aspect ratio exactly.
TOLERANCE, TOLERANCE_PIXELS = 0.02, 1


def map_finder(path: Path) -> Callable[[Path], Path]:
    """Return a function from an input to its map: the file `path`, or the file with the input's stem in a folder.

    The function raises ValueError if the folder has no such file, or more than one.

    Raises:
        FileNotFoundError: `path` does not exist or is a folder without images.
    """
    by_stem: dict[str, list[Path]] = defaultdict(list)
    for file in find_images(path):
        by_stem[file.stem].append(file)
    if path.is_file():
        return lambda image: path

    def find(image: Path) -> Path:
        found = by_stem.get(image.stem, [])
        if len(found) == 1:
            return found[0]
        if not found:
            raise ValueError(f"there is no scale map {image.stem!r} in {path}; add an image file of that stem")
        raise ValueError(f"several scale maps match {image.name}: {', '.join(map(str, found))}; leave one of them")

    return find


def check_aspect_ratio(path: Path, size: tuple[int, int], image_size: tuple[int, int], turned: bool = False) -> None:
    """Raise ImageError if a map of `size` (width, height) has another aspect ratio than its image.

    With `turned`, the map may also have the inverse ratio.
    """
    sizes = [size, size[::-1]] if turned else [size]
    if not any(_have_one_aspect_ratio(each, image_size) for each in sizes):
        raise ImageError(
            f"the scale map {path} has {size[0]}x{size[1]} pixels, and its image {image_size[0]}x{image_size[1]}; a "
            "map covers its image and has the same aspect ratio"
        )


def _have_one_aspect_ratio(size: tuple[int, int], image_size: tuple[int, int]) -> bool:
    (width, height), (image_width, image_height) = size, image_size
    fitting = ((width, height * image_width / image_height), (height, width * image_height / image_width))
    return any(abs(side - fit) <= max(TOLERANCE * fit, TOLERANCE_PIXELS) for side, fit in fitting)


def read_scale_map(path: Path, image_size: tuple[int, int]) -> tuple[Float32[np.ndarray, "h w"], tuple[str, ...]]:
    """Read a map for an upright image of `image_size` (width, height): black is 0 and white is 1; and notes.

    Raises:
        ImageError: a file that is no image, has colors or another aspect ratio.
        OSError: the file cannot be read.
    """
    image = read_image(path)
    height, width = image.rgb.shape[:2]
    check_aspect_ratio(path, (width, height), image_size)
    if np.ptp(image.rgb, axis=-1).max() > COLORLESS:
        raise ImageError(f"the scale map {path} has colors; save it as a gray image")
    transparent = image.alpha is not None and image.alpha.min() < 1
    notes = (f"the alpha channel of {path} is ignored",) if transparent else ()
    return np.clip(image.rgb[..., 0], 0, 1), notes
