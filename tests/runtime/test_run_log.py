"""Run log: TensorBoard scalars and images, and the progress line."""

import resource

import pytest
from event_files import events
from PIL import Image

from pisa_jax.runtime import run_log


@pytest.fixture
def folder(tmp_path):
    return tmp_path


def test_a_full_disk_is_told_and_nothing_waits_for_it(folder):
    log = run_log.RunLog(folder, batch_size=6, total=40, first=10)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**9, before[1]))  # no file may grow beyond this
    try:
        with pytest.raises(
            OSError, match=r"tensorboard cannot be written; free space and continue with --resume: .*27"
        ):
            log.log_scalars(20, {f"pix/{index}": 1.0 for index in range(100)})
        log.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_what_is_logged_can_be_read(folder, capsys):
    log = run_log.RunLog(folder, batch_size=6, total=40, first=10)
    log.add_data_wait(0.001)
    log.log(20, {"pix/l2": 0.25, "pix/skipped": 0.0})
    log.log_scalars(20, {"validation/psnr": 31.5})
    log.log_image(20, "validation", Image.new("RGB", (30, 20), (10, 20, 30)))
    log.close()
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
