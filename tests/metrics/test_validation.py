"""Validation images and their metrics."""

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from pisa_jax.config import Stage, Validation
from pisa_jax.metrics import psnr_ssim, validation


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    for name in ("b.png", "a.png", "c.png"):
        image = np.kron(rng.integers(0, 256, (5, 6, 3), np.uint8), np.ones((8, 8, 1), np.uint8))
        Image.fromarray(image).save(tmp_path / "images" / name)
    return tmp_path


def test_validation_images_are_reproducible(folder):
    config = Validation(str(folder / "images"), count=2)
    pairs, again = (validation.validation_images(config, 32) for _ in range(2))
    assert [pair.name for pair in pairs] == ["a.png", "b.png"]
    for pair, other in zip(pairs, again, strict=True):
        assert pair.lq.shape == pair.gt.shape == (32, 32, 3)
        assert np.array_equal(pair.lq, other.lq)
        assert not np.array_equal(pair.lq, pair.gt)
    # The middle: 40 x 48, cut by 4 and 8 pixels.
    with Image.open(folder / "images" / "a.png") as whole:
        assert np.array_equal(pairs[0].gt, np.asarray(whole)[4:36, 8:40])
    assert validation.validation_images(Validation(), 32) == []


def test_unusable_images_are_reported_and_skipped(folder, caplog):
    """The others keep their degradation; images after the first `count` take the places."""
    images = folder / "images"
    config = Validation(str(images), count=2)
    _, second, third = validation.validation_images(Validation(str(images)), 32)
    Image.new("RGB", (40, 24)).save(images / "a.png")
    (images / "b0.png").write_text("no image")
    found = validation.validation_images(config, 32)
    assert [image.name for image in found] == ["b.png", "c.png"]
    assert np.array_equal(found[0].lq, second.lq)
    assert np.array_equal(found[1].gt, third.gt)
    messages = [record.getMessage() for record in caplog.records]
    assert messages[0] == "skipped validation image: a.png is 40 x 24, smaller than data.crop 32"
    assert "b0.png" in messages[1]


def test_a_folder_without_a_usable_image_is_refused(folder):
    with pytest.raises(ValueError, match=r"none of its 3 images can be used, such as: a\.png is 48 x 40, smaller than"):
        validation.validation_images(Validation(str(folder / "images")), 64)
    (folder / "empty").mkdir()
    with pytest.raises((OSError, ValueError), match="empty"):
        validation.validation_images(Validation(str(folder / "empty")), 32)


def test_pairs_bring_their_own_lq(folder):
    for side in ("lq", "gt"):
        (folder / "pairs" / side).mkdir(parents=True)
        name = "a.png" if side == "gt" else "b.png"
        (folder / "pairs" / side / "a.png").write_bytes((folder / "images" / name).read_bytes())
    (pair,) = validation.validation_images(Validation(str(folder / "pairs")), 40)
    with Image.open(folder / "images" / "b.png") as lq:
        assert np.array_equal(pair.lq, np.asarray(lq)[:, 4:44])


def test_metrics_are_means_over_the_images(folder):
    pairs = validation.validation_images(Validation(str(folder / "images")), 32)
    stage = Stage("sem", 1, frozen=("pix",))
    found, sheet = validation.evaluate(lambda lq: jnp.concatenate([lq, lq]), pairs, None, stage)
    expected = np.mean([psnr_ssim.psnr(pair.lq, pair.gt) for pair in pairs])
    assert found["psnr"] == pytest.approx(expected, abs=1e-6)
    l2 = np.mean([np.mean(np.square(np.float64(pair.lq) / 127.5 - np.float64(pair.gt) / 127.5)) for pair in pairs])
    assert found["l2"] == pytest.approx(l2, rel=1e-5)
    assert set(found) == {"l2", "psnr", "ssim"}
    assert sheet.width > 4 * 32  # LQ, pix, pix + sem, GT
