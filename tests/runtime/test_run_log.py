"""What a run shows while it trains: scalars, sheets of pictures, validation figures, the progress line."""

import resource

import jax.numpy as jnp
import numpy as np
import pytest
from event_files import events
from PIL import Image

from pisa_jax import validation
from pisa_jax.config import Stage, Validation
from pisa_jax.metrics import psnr_ssim
from pisa_jax.runtime import run_log


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "pictures").mkdir()
    for name in ("b.png", "a.png", "c.png"):
        picture = np.kron(rng.integers(0, 256, (5, 6, 3), np.uint8), np.ones((8, 8, 1), np.uint8))
        Image.fromarray(picture).save(tmp_path / "pictures" / name)
    return tmp_path


def test_validation_pictures_are_the_same_every_time(folder):
    config = Validation(str(folder / "pictures"), count=2)
    pairs, again = (validation.validation_pairs(config, 32) for _ in range(2))
    assert [pair.name for pair in pairs] == ["a.png", "b.png"]
    for pair, other in zip(pairs, again, strict=True):
        assert pair.lq.shape == pair.gt.shape == (32, 32, 3)
        assert np.array_equal(pair.lq, other.lq)
        assert not np.array_equal(pair.lq, pair.gt)
    # The middle: 40 x 48, cut by 4 and 8 pixels.
    with Image.open(folder / "pictures" / "a.png") as whole:
        assert np.array_equal(pairs[0].gt, np.asarray(whole)[4:36, 8:40])
    with pytest.raises(ValueError, match=r"a\.png is 48 x 40, smaller than data\.crop 64"):
        validation.validation_pairs(config, 64)
    assert validation.validation_pairs(Validation(), 32) == []


def test_pairs_bring_their_own_lq(folder):
    for side in ("lq", "gt"):
        (folder / "pairs" / side).mkdir(parents=True)
        name = "a.png" if side == "gt" else "b.png"
        (folder / "pairs" / side / "a.png").write_bytes((folder / "pictures" / name).read_bytes())
    (pair,) = validation.validation_pairs(Validation(str(folder / "pairs")), 40)
    with Image.open(folder / "pictures" / "b.png") as lq:
        assert np.array_equal(pair.lq, np.asarray(lq)[:, 4:44])


def test_figures_are_means_over_the_pictures(folder):
    pairs = validation.validation_pairs(Validation(str(folder / "pictures")), 32)
    stage = Stage("sem", 1, frozen=("pix",))
    found, sheet = validation.validate(lambda lq: jnp.concatenate([lq, lq]), pairs, None, stage)
    expected = np.mean([psnr_ssim.psnr(pair.lq, pair.gt) for pair in pairs])
    assert found["psnr"] == pytest.approx(expected, abs=1e-6)
    l2 = np.mean([np.mean(np.square(np.float64(pair.lq) / 127.5 - np.float64(pair.gt) / 127.5)) for pair in pairs])
    assert found["l2"] == pytest.approx(l2, rel=1e-5)
    assert set(found) == {"l2", "psnr", "ssim"}
    assert sheet.width > 4 * 32  # LQ, pix, pix + sem, GT


def test_a_full_disk_is_told_and_nothing_waits_for_it(folder):
    watcher = run_log.RunLog(folder, batch_size=6, total=40, first=10)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**9, before[1]))  # no file may grow beyond this
    try:
        with pytest.raises(OSError, match=r"tensorboard cannot be written; free space and go on with --resume: .*27"):
            watcher.log_scalars(20, {f"pix/{index}": 1.0 for index in range(100)})
        watcher.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_what_is_logged_can_be_read(folder, capsys):
    watcher = run_log.RunLog(folder, batch_size=6, total=40, first=10)
    watcher.add_data_wait(0.001)
    watcher.log(20, {"pix/l2": 0.25, "pix/skipped": 0.0})
    watcher.log_scalars(20, {"validation/psnr": 31.5})
    watcher.log_image(20, Image.new("RGB", (30, 20), (10, 20, 30)))
    watcher.close()
    found = events(folder / "tensorboard")
    assert found["pix/l2"][20].simple_value == 0.25
    assert found["validation/psnr"][20].simple_value == 31.5
    picture = found["validation"][20].image
    assert (picture.width, picture.height) == (30, 20)
    assert picture.encoded_image_string.startswith(b"\x89PNG")
    step, data, compute, rate = (
        found[f"time/{name}"][20].simple_value for name in ("step", "data", "compute", "pictures_per_second")
    )
    assert data == pytest.approx(0.0001, rel=1e-3)  # over 10 steps
    assert data + compute == pytest.approx(step, rel=1e-3)
    assert rate == pytest.approx(6 / step, rel=1e-3)
    # No terminal here, so lines: what is measured, speed, the expected end.
    line = capsys.readouterr().out
    assert line.startswith("step 20/40: pix/l2 0.25, ")
    assert "skipped" not in line
    assert " pictures/s, ends " in line
