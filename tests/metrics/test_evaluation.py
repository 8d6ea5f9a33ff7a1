"""Evaluation of items in threads."""

import numpy as np
import pytest
from PIL import Image

from pisa_jax.metrics import registry
from pisa_jax.metrics.evaluation import evaluate
from pisa_jax.metrics.pairing import pair_files


@pytest.fixture
def items(tmp_path):
    """Three results and their ground truths, of which one result is not an image."""
    rng = np.random.default_rng(0)
    for folder in ("sr", "gt"):
        (tmp_path / folder).mkdir()
        for name in "abc":
            image = rng.integers(0, 256, (40, 48, 3), np.uint8)
            Image.fromarray(image).save(tmp_path / folder / f"{name}.png")
    (tmp_path / "sr" / "b.png").write_bytes(b"not an image")
    return pair_files(tmp_path / "sr", tmp_path / "gt", None)[0]


def test_scores_do_not_depend_on_the_number_of_workers(items):
    functions = registry.make_metrics(["psnr", "ssim", "perceptual"])
    evaluation = evaluate(items, functions, workers=1)
    assert evaluate(items, functions, workers=2) == evaluation
    assert evaluation.scores["sr"].keys() == {"a.png", "c.png"}
    assert evaluation.problems.keys() == {"b.png"}


def test_images_of_one_item_are_kept_and_every_item_is_counted(items):
    done = []
    evaluation = evaluate(items, {}, sheet_item="c.png", workers=2, on_done=lambda: done.append(1))
    assert list(evaluation.sheet_images) == ["sr", "ground truth"]
    np.testing.assert_array_equal(evaluation.sheet_images["ground truth"], np.asarray(Image.open(items[2].gt)))
    assert len(done) == 3
