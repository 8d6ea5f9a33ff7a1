"""Run log: TensorBoard scalars and images, and the progress line."""

import resource
import time
from types import SimpleNamespace

import pytest
from event_files import events
from PIL import Image

from pisa_jax.runtime import run_log


class Clock:
    """Replaces the `time` module of the run log; it advances only by `sleep`."""

    def __init__(self):
        self.now = 0.0

    def sleep(self, seconds):
        self.now += seconds

    def module(self):
        return SimpleNamespace(
            perf_counter=lambda: self.now,
            time=lambda: 1_700_000_000 + self.now,
            strftime=time.strftime,
            localtime=time.gmtime,
        )


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(run_log, "time", clock.module())
    return clock


def test_a_full_disk_is_an_error_with_advice_and_does_not_block(tmp_path):
    log = run_log.RunLog(tmp_path, batch_size=6, total=40, first=10)
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


def test_logged_values_can_be_read(tmp_path, clock, capsys):
    log = run_log.RunLog(tmp_path, batch_size=6, total=40, first=10)
    clock.sleep(2.0)
    log.step_flops = 5e12
    log.log(20, {"pix/l2": 0.25, "pix/skipped": 0.0}, [0.5, 0.1, 1.5])
    log.log_scalars(20, {"validation/psnr": 31.5})
    log.log_image(20, "validation", Image.new("RGB", (30, 20), (10, 20, 30)))
    log.close()
    found = events(tmp_path / "tensorboard")
    assert found["pix/l2"][20].simple_value == 0.25
    assert found["validation/psnr"][20].simple_value == 31.5
    image = found["validation"][20].image
    assert (image.width, image.height) == (30, 20)
    assert image.encoded_image_string.startswith(b"\x89PNG")
    times = {name: values[20].simple_value for name, values in found.items() if name.startswith("time/")}
    assert times.pop("time/compile") >= 0
    # 10 steps of 6 images in 2 seconds, half a second of which waiting for data; the hosts waited 0.1 to 1.5 seconds.
    hosts = {"data_fastest_host": 0.01, "data_slowest_host": 0.15}
    expected = {"step": 0.2, "data": 0.05, "compute": 0.15, "images_per_second": 30.0} | hosts
    assert times == pytest.approx({f"time/{name}": value for name, value in expected.items()})
    assert found["device/tflops"][20].simple_value == 25.0
    assert found["run/restarts"][20].simple_value == 0
    # Output to a terminal is a progress bar; here it is one line per call. 20 steps are left, which is 4 seconds.
    assert capsys.readouterr().out == "step 20/40: pix/l2 0.25, 30 images/s, ends Tue 22:13\n"


def test_speed_is_measured_since_the_previous_log(tmp_path, clock, capsys):
    log = run_log.RunLog(tmp_path, batch_size=2, total=40, first=0)
    clock.sleep(10.0)
    log.log(10, {}, [5.0])
    clock.sleep(1.0)
    log.log(20, {"pix/skipped": 3.0})
    log.close()
    assert "pix/skipped 3, 20 images/s" in capsys.readouterr().out
    found = events(tmp_path / "tensorboard")
    assert found["time/step"][20].simple_value == pytest.approx(0.1)
    assert found["time/data"][20].simple_value == 0.0


def test_other_work_is_no_time_of_steps(tmp_path, clock, capsys):
    """Neither for the speed nor for the expected end, also if it is nested."""
    log = run_log.RunLog(tmp_path, batch_size=2, total=40, first=0)
    clock.sleep(10.0)
    with log.left_out():
        clock.sleep(100.0)
        with log.left_out():
            clock.sleep(100.0)
    log.log(20, {})
    log.close()
    assert events(tmp_path / "tensorboard")["time/step"][20].simple_value == pytest.approx(0.5)
    assert capsys.readouterr().out == "step 20/40: 4 images/s, ends Tue 22:17\n"


def test_restarts_and_repeated_steps_are_counted(tmp_path):
    # Killed at step 7 after a checkpoint at 5; stopped and saved at 8; killed before the first log line.
    for first, steps in ((0, (3, 7)), (5, (6, 8)), (8, ()), (8, (9,))):
        log = run_log.RunLog(tmp_path, batch_size=2, total=10, first=first)
        for step in steps:
            log.log(step, {})
        log.close()
    found = events(tmp_path / "tensorboard")
    for tag, expected in (("run/restarts", {3: 0, 8: 1, 9: 3}), ("run/lost_steps", {3: 0, 8: 2, 9: 2})):
        assert {step: found[tag][step].simple_value for step in expected} == expected


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"restarts": "x"}'])
def test_a_damaged_history_begins_again(tmp_path, content):
    (tmp_path / run_log.HISTORY_FILE).write_text(content)
    log = run_log.RunLog(tmp_path, batch_size=2, total=10, first=0)
    log.log(1, {})
    log.close()
    assert events(tmp_path / "tensorboard")["run/restarts"][1].simple_value == 0
