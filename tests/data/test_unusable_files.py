"""Training files that cannot be used: unreadable, missing, too small, or replaced; workers that are killed."""

import json
import logging
import multiprocessing
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

from pisa_jax.data.loader import make_loader
from pisa_jax.data.samples import MAX_SMALL, _upscale_window, crop_pair
from pisa_jax.data.sources import SourceImage, fake_source, folder_source, list_source


def unchanged(gt, rng):
    return gt


def loader(source, **options):
    return make_loader(source, **{"batch_size": 4, "crop": 16, "seed": 3, "degrade": unchanged} | options)


def save(path, width=20, height=20, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)).save(path)


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def paths(batches):
    return {str(path) for batch in batches for path in batch["path"]}


# --- files of lists


def test_missing_files_of_a_list_are_found_before_the_first_batch(tmp_path):
    save(tmp_path / "0.png")
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "list.txt").write_text("0.png\n" * 50 + "no.png\npipe.png\n")
    with pytest.raises(
        OSError, match=r"2 images cannot be read, at most 0.03 are allowed(.|\n)*no\.png(.|\n)*pipe\.png"
    ):
        loader(list_source(tmp_path / "list.txt")).check_files()
    reader = loader(list_source(tmp_path / "list.txt"), max_bad_share=0.7)
    assert paths(take(reader, 20)) == {"0.png"}
    assert set(reader.bad_files) == {"no.png", "pipe.png"}


def test_a_second_list_has_a_limit_of_its_own(tmp_path):
    save(tmp_path / "0.png")
    (tmp_path / "general.txt").write_text("0.png\n" * 300)
    (tmp_path / "hq.txt").write_text("".join(f"no{index}.png\n" for index in range(80)))
    reader = loader(list_source(tmp_path / "general.txt", tmp_path / "hq.txt", 0.2), max_bad_share=0.5)
    with pytest.raises(
        OSError,
        match=r"80 images cannot be read, at most 40 are allowed; continue with a larger data\.max_bad_share"
        r"(.|\n)*and 30 others",
    ):
        next(reader)


def test_a_file_that_a_list_names_often_is_counted_once(tmp_path):
    save(tmp_path / "0.png")
    (tmp_path / "bad.png").write_bytes(b"nothing")
    (tmp_path / "list.txt").write_text(("0.png\n" * 8 + "./bad.png\nbad.png\n") * 10)
    reader = loader(list_source(tmp_path / "list.txt"), max_bad_share=0.5)
    take(reader, 20)
    assert list(reader.bad_files) == ["bad.png"]
    strict = loader(list_source(tmp_path / "list.txt"), max_bad_share=0.49)  # of two distinct files, not of 100 lines
    with pytest.raises(OSError, match=r"1 images cannot be read, at most 0\.98"):
        take(strict, 20)


# --- small and thin images


def test_images_smaller_than_half_the_crop_are_left_out_and_counted(tmp_path, caplog):
    for name, size in {"dot": (1, 1), "thin": (300, 7), "half": (8, 9), "small": (15, 30), "large": (16, 16)}.items():
        save(tmp_path / f"{name}.png", *size)
    with caplog.at_level(logging.WARNING):
        reader = loader(folder_source(tmp_path))
        assert paths(take(reader, 30)) == {"half.png", "small.png", "large.png"}
    assert reader.counts == {"unreadable": 0, "small": 2, "upscaled": 2}
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 4
    assert any("left out 2 images that are too small so far (data.min_size_share)" in message for message in messages)
    everything = loader(folder_source(tmp_path), min_size_share=0.0)
    assert len(paths(take(everything, 30))) == 5
    assert paths(take(loader(folder_source(tmp_path), min_size_share=1.0), 30)) == {"large.png"}


def test_a_source_of_small_images_only_raises_an_error(tmp_path):
    save(tmp_path / "dot.png", 3, 30)
    with pytest.raises(
        OSError, match=rf"{MAX_SMALL} images in a row are smaller than 8 pixels, e\.g\. dot.png is 3 x 30"
    ):
        next(loader(folder_source(tmp_path)))


def test_a_window_of_a_long_image_is_that_of_the_upscaled_image():
    image = np.asarray(Image.fromarray(fake_source(1, 60)[0].image).resize((300, 6)))
    size, crop, left = (32, 1600), 32, 777
    whole = np.asarray(Image.fromarray(image).resize(size[::-1], Image.BICUBIC))[:, left : left + crop]
    assert np.abs(_upscale_window(image, size, 0, left, crop).astype(int) - whole).max() <= 1


MEMORY = """
import resource, sys
import numpy as np
from pisa_jax.data.samples import crop_pair
from pisa_jax.data.sources import SourceImage
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
before = peak()
for shape in ((2, 2000), (20000, 2), (1, 20000)):
    image = np.zeros((*shape, 3), np.uint8)
    crop_pair(SourceImage(image, "thin", image), 512, True, np.random.default_rng(0))
print(peak() - before)
"""


def test_memory_for_a_long_image_is_that_of_a_crop():
    command = [sys.executable, "-c", MEMORY]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    assert int(done.stdout) < 100  # MiB; the upscaled image of 20000 x 1 has 15 GB


@pytest.mark.parametrize("shape", [(2, 300), (300, 2)])
def test_pairs_of_long_images_are_cropped_together(shape):
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
    gt, lq = crop_pair(SourceImage(image, "thin", 255 - image), 16, True, np.random.default_rng(1))
    assert gt.shape == lq.shape == (16, 16, 3)
    assert np.abs(gt.astype(int) - (255 - lq)).max() <= 2


# --- resume


def test_a_replaced_image_is_noticed_at_a_resume(tmp_path):
    for index in range(3):
        save(tmp_path / f"{index}.png", seed=index)
    state = loader(folder_source(tmp_path)).get_state()
    os.utime(tmp_path / "1.png", (0, 0))  # as a copy has
    loader(folder_source(tmp_path)).set_state(state)
    save(tmp_path / "1.png", seed=7)
    with pytest.raises(ValueError, match="the data differs from that of the saved run: contents was"):
        loader(folder_source(tmp_path)).set_state(state)


def test_changed_prompts_and_shares_are_noticed_at_a_resume():
    source, prompts = fake_source(4, 20), {"fake/000000": "dog", "fake/000001": "cat"}
    state = json.loads(json.dumps(loader(source, prompts=prompts).get_state()))
    loader(source, prompts=dict(reversed(prompts.items()))).set_state(state)
    for changed in (prompts | {"fake/000000": "cow"}, None):
        with pytest.raises(ValueError, match="prompts was"):
            loader(source, prompts=changed).set_state(state)
    with pytest.raises(ValueError, match=r"min_size_share was 0\.5 and is 1\.0"):
        loader(source, prompts=prompts, min_size_share=1.0).set_state(state)


def test_a_state_of_an_older_version_is_resumed_with_a_line(caplog):
    state = loader(fake_source(4, 20)).get_state()
    added = ("contents", "prompts", "min_size_share")
    old = {key: value for key, value in state["fingerprint"].items() if key not in added}
    with caplog.at_level(logging.WARNING):
        loader(fake_source(4, 20)).set_state({"batches": 2, "fingerprint": old})
    (message,) = [record.getMessage() for record in caplog.records]
    assert "contents, min_size_share, prompts of the data cannot be compared" in message
    with pytest.raises(ValueError, match="seed was 3 and is 4"):
        loader(fake_source(4, 20), seed=4).set_state({"batches": 2, "fingerprint": old})


# --- processes


def test_a_killed_worker_ends_the_run_with_one_sentence():
    reader = loader(fake_source(8, 20), workers=1)
    next(reader)
    (worker,) = [child for child in multiprocessing.active_children() if "grain" in child.name]
    os.kill(worker.pid, signal.SIGKILL)
    with pytest.raises(OSError, match=r"a data worker was ended from outside.*data\.workers.*exit code -9"):
        take(reader, 30)
    reader.close()


def test_an_error_of_the_degradation_keeps_its_type():
    def fail(gt, rng):
        raise RuntimeError("own error")

    with pytest.raises(RuntimeError, match="own error"):
        next(loader(fake_source(2, 20), degrade=fail))
