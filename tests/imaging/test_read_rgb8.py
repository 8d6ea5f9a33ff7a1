"""Reading of images as 8-bit RGB for metrics."""

import numpy as np
from PIL import Image

from pisa_jax.imaging.image_reading import read_rgb8


def test_alpha_is_dropped_and_gray_repeated_without_changing_values(tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (6, 5, 3), np.uint8)
    Image.fromarray(np.concatenate([image, image[..., :1]], axis=2)).save(tmp_path / "alpha.png")
    Image.fromarray(image[..., 0]).save(tmp_path / "gray.png")
    np.testing.assert_array_equal(read_rgb8(tmp_path / "alpha.png"), image)
    np.testing.assert_array_equal(read_rgb8(tmp_path / "gray.png"), np.repeat(image[..., :1], 3, axis=2))
