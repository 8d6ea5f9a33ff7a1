"""Runs that do not fit their devices are refused before anything is loaded, with what fits."""

import dataclasses
import re
import runpy

import pytest
from asset_paths import ROOT
from mock_devices import THREE_AXES, TWO_AXES, gpu_hosts, tpu_slices

from pisa_jax import training
from pisa_jax.config import Config, Stage
from pisa_jax.runtime import distributed
from pisa_jax.runtime.chips import CHIPS
from pisa_jax.training_mesh import check_batch, check_mesh, run_hours, step_tflop

PUBLISHED = runpy.run_path(str(ROOT / "configs" / "sd21.py"))["config"]


def v5p(chips, **axes):
    return distributed.make_mesh(**axes, devices=tpu_slices("TPU v5", THREE_AXES[chips], (2, 2, 1)))


def test_the_published_batch_on_more_chips_than_images():
    with pytest.raises(ValueError, match="batch_size 16 cannot be divided over 64 devices x accumulate 1") as error:
        check_mesh(PUBLISHED, v5p(64))
    message = str(error.value)
    slices = re.findall(r"(\d+) \(([\d.]+) (hours|minutes)\)", message)
    assert [int(size) for size, _, _ in slices] == [4, 8, 16, 64, 128, 256]
    assert "use a slice of 4 (" in message
    assert "or 16 (" in message
    assert "where a larger one is no gain" in message
    assert "or --batch-size 64 (" in message
    assert "expected at 40% of the peak" in message
    # 16 images at a time on 16 chips take as long as 64 on 64.
    minutes = [float(value) for _, value, unit in slices if unit == "minutes"]
    assert minutes[-4] == pytest.approx(minutes[-3], abs=1)


def test_batches_that_fit_are_accepted():
    check_mesh(PUBLISHED, v5p(16))
    check_mesh(PUBLISHED, v5p(16, fsdp=8))
    accumulated = dataclasses.replace(PUBLISHED, accumulate=4)
    with pytest.raises(ValueError, match="16 devices x accumulate 4: use a slice of 4 "):
        check_batch(accumulated, v5p(16))


def test_devices_of_unknown_speed_get_no_estimate():
    config = Config(out="", stages=(Stage("pix", 1),), batch_size=4)
    unknown = [dataclasses.replace(device, device_kind="other") for device in gpu_hosts(1, 1)]
    with pytest.raises(ValueError, match=r"a slice of 1, 2 or 4 devices .* or --batch-size 8, 16 or 32 here$"):
        check_batch(config, distributed.make_mesh(devices=unknown))


def test_hours_follow_from_the_operations():
    pix, sem = PUBLISHED.stages
    total = 16 * (4000 * step_tflop(PUBLISHED, pix) + 8500 * step_tflop(PUBLISHED, sem))
    chip = CHIPS["TPU v5"]
    assert run_hours(PUBLISHED, 16, 16, chip) == pytest.approx(total / (16 * 459 * 0.4) / 3600)
    assert run_hours(PUBLISHED, 16, 16, chip) < 0.5  # minutes
    small = dataclasses.replace(PUBLISHED, data=dataclasses.replace(PUBLISHED.data, crop=256))
    assert step_tflop(small, pix) == step_tflop(PUBLISHED, pix) / 4


def test_weights_that_fsdp_does_not_divide_are_refused():
    twelve = distributed.make_mesh(fsdp=3, devices=gpu_hosts(3, 1)[:12])
    with pytest.raises(ValueError, match=r"mesh_fsdp 3 does not divide .* use 1, 2 or 4$"):
        check_mesh(dataclasses.replace(PUBLISHED, batch_size=12), twelve)


def test_weights_that_do_not_fit_are_refused():
    float32 = dataclasses.replace(PUBLISHED, dtype="float32", data=dataclasses.replace(PUBLISHED.data, prompts="x"))
    small = dataclasses.replace(tpu_slices("TPU v5 lite", (*TWO_AXES[4], 1), (2, 2, 1))[0], device_kind="NVIDIA L4")
    check_mesh(float32, distributed.make_mesh(data=1, devices=[small]))
    CHIPS_OF_8 = CHIPS["NVIDIA L4"]._replace(memory=8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(CHIPS, "NVIDIA L4", CHIPS_OF_8)
        with pytest.raises(ValueError, match=r"the weights need 8\.\d GiB per device, and a L4 has 8: raise mesh_fsdp"):
            check_mesh(float32, distributed.make_mesh(data=1, devices=[small]))


def test_nothing_is_loaded_before_the_check(tmp_path, monkeypatch):
    def load(*_):
        raise AssertionError("loaded")

    for name in ("training_loader", "load_model", "load_perceptual", "load_start"):
        monkeypatch.setattr(training, name, load)
    config = dataclasses.replace(PUBLISHED, out=str(tmp_path / "run"), batch_size=4)
    with pytest.raises(ValueError, match="batch_size 4 cannot be divided over 8 devices"):
        training.train(config)
    assert not (tmp_path / "run").exists()
