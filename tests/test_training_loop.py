"""The loop over steps: how far it runs ahead of the device and what it measures; starts that may be repeated."""

import logging
import queue
import threading
import time

import jax
import numpy as np
import pytest
from event_files import events
from test_training_faults import config, replace_steps, steps_of, train

from pisa_jax import training, training_loop
from pisa_jax.runtime.watchdog import Watchdog


class Device:
    """A device that computes steps one after the other; each takes some seconds."""

    def __init__(self, seconds):
        self.seconds, self.free, self.unfinished, self.most = seconds, 0.0, 0, 0

    def dispatch(self, measured):
        """Return the measurements of a step as arrays that are not there yet."""
        self.unfinished += 1
        self.most = max(self.most, self.unfinished)
        self.free = max(self.free, time.perf_counter()) + self.seconds
        end, done = self.free, []

        def wait():
            if not done:
                done.append(True)
                time.sleep(max(0.0, end - time.perf_counter()))
                self.unfinished -= 1

        return {name: Pending(value, wait) for name, value in measured.items()}


class Pending:
    def __init__(self, value, wait):
        self.value, self.block_until_ready = value, wait

    def __array__(self, dtype=None, copy=None):
        self.block_until_ready()
        return np.asarray(self.value, dtype)


def slow_device(monkeypatch, seconds):
    """Let the steps of a run take some seconds on a device that works beside the loop."""
    device = Device(seconds)

    def slow_down(step):
        def run(*arrays):
            state, measured = step(*arrays)
            return state, device.dispatch(measured)

        return run

    replace_steps(monkeypatch, slow_down)
    return device


def test_at_most_two_steps_are_in_flight(tmp_path, monkeypatch):
    device = slow_device(monkeypatch, 0.01)
    train(config(tmp_path / "run", steps=(12, 1), log_every=100, save_every=100))
    assert device.most == 2


def test_a_loader_that_is_faster_than_the_device_is_not_waited_for(tmp_path, monkeypatch):
    """It makes a batch in 30 ms and keeps two ready; a step takes 60 ms."""
    device = slow_device(monkeypatch, 0.06)
    place, ready = training_loop.place_batch, queue.Queue(2)

    def produce():
        while True:
            time.sleep(0.03)
            ready.put(None)

    def place_when_ready(run, batch):
        ready.get()
        return place(run, batch)

    threading.Thread(target=produce, daemon=True).start()
    monkeypatch.setattr(training_loop, "place_batch", place_when_ready)
    train(config(tmp_path / "run", steps=(30, 1), log_every=10, save_every=100))
    found = events(tmp_path / "run" / "tensorboard")
    assert found["time/data"][20].simple_value < 0.02
    assert found["time/step"][20].simple_value == pytest.approx(device.seconds, rel=0.5)


def test_validations_and_checkpoints_are_left_out_of_the_time_per_step(tmp_path, monkeypatch):
    slow_device(monkeypatch, 0.01)
    save = training_loop.save
    monkeypatch.setattr(training_loop, "save", lambda *arguments: time.sleep(1) or save(*arguments))
    train(config(tmp_path / "run", steps=(4, 1), log_every=2, save_every=1))
    assert events(tmp_path / "run" / "tensorboard")["time/step"][4].simple_value < 0.5


def test_every_step_is_a_beat_and_a_compilation_is_none(tmp_path, monkeypatch):
    """Compilations may take longer than the time in which a step must end."""
    watchdog = Watchdog(10, lambda: None)
    limited, compile_stage = [], training.compile_stage

    def recorded(kind, function):
        def run(*arguments):
            limited.append((kind, watchdog._due is not None))
            return function(*arguments)

        return run

    def compile_recorded(*arguments):
        programs = recorded("compilation", compile_stage)(*arguments)
        return programs._replace(step=recorded("step", programs.step))

    monkeypatch.setattr(training, "compile_stage", compile_recorded)
    train(config(tmp_path / "run"), watchdog=watchdog)
    assert limited == [("compilation", False)] * 2 + [("step", True)] * 7


def test_auto_starts_where_there_is_nothing_and_resumes_where_there_is_a_run(tmp_path, capsys):
    out = tmp_path / "run"
    first = train(config(out, steps=(1, 1)), resume="auto").read_bytes()
    assert "continuing" not in capsys.readouterr().out
    assert train(config(out, steps=(1, 1)), resume="auto").read_bytes() == first  # a finished run
    assert "continuing after step 2 of 2" in capsys.readouterr().out
    assert steps_of(out) == [1, 2]


def test_auto_accepts_what_a_start_that_was_killed_left(tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    (out / ".lock").touch()
    (out / "model.part").mkdir()
    assert train(config(out, steps=(1, 1)), resume="auto").exists()


def test_auto_refuses_other_folders_and_damaged_runs(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").touch()
    with pytest.raises(FileExistsError, match="exists and is not a run directory"):
        train(config(tmp_path / "photos"), resume="auto")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is damaged"):
        train(config(tmp_path / "run"), resume="auto")


def test_the_versions_of_the_packages_are_compared():
    found = training.package_versions()
    assert found["the version of jax"] == jax.__version__
    assert found.keys() >= {f"the version of {name}" for name in set(training.PACKAGES) - {"pisa_jax"}}


def test_hang_minutes_may_change_at_a_resume(tmp_path, caplog):
    out = tmp_path / "run"
    train(config(out, steps=(1, 1)))
    with caplog.at_level(logging.WARNING):
        train(config(out, steps=(1, 1), hang_minutes=0.0), resume=True)
    assert "hang_minutes" not in caplog.text
