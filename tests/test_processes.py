"""Runs of two processes with a toy model: what one process meets ends both, within seconds, with its reason."""

import os
import signal
import time

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image
from programs import Program, connection, ended, started

from pisa_jax.training import ADAPTERS_FILE

TOY = ROOT / "tests" / "toy_run.py"
ENDLESS = ["--stages.0.steps", 10**7, "--save-every", 10**7, "--log-every", 1]
# Seconds after which all processes must have ended.
LIMIT = 30


def toy(out, *more, fault=(), **named):
    """Start one process with a fault of faulty.py; options that are not named `cwd` are its environment."""
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "tests")))
    program = [ROOT / "tests" / "faulty.py", *fault, TOY] if fault else [TOY]
    return Program(*program, TOY, "--out", out, *more, PYTHONPATH=paths, **named)


def pair(out, *more, each=({}, {})):
    """Start two connected processes; `each` has options that only one of them has."""
    named = connection()
    return started([toy(out, *more, **named, JAX_PROCESS_ID=str(index), **each[index]) for index in range(2)])


def seconds_until_the_end(processes):
    start = time.monotonic()
    for process in processes:
        process.end()
    return time.monotonic() - start


def write_photos(folder, names):
    folder.mkdir(parents=True)
    for index, name in enumerate(names):
        pixels = np.random.default_rng(index).integers(0, 256, (20, 24, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{name}.png")


def test_an_unreadable_source_of_one_process_ends_both_before_anything_is_compiled(tmp_path):
    write_photos(tmp_path / "0" / "photos", "abcd")
    (tmp_path / "1").mkdir()
    source = ["--data.source", "folder", "--data.path", "photos"]
    each = [{"cwd": tmp_path / name} for name in "01"]
    with pair(tmp_path / "run", *source, each=each) as processes:
        processes[0].wait_for("2 processes on 1 host, 2 local and 4 global devices (cpu)")
        assert seconds_until_the_end(processes) < LIMIT
        for process in processes:
            errors = ended(process, 1)
            assert errors.count("train.py: process 1 on ") == 1
            assert errors.strip().endswith("photos is not a folder")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_another_order_of_the_files_is_refused(tmp_path):
    """The same number of images, under other names, in the second process."""
    write_photos(tmp_path / "0" / "photos", "abcd")
    write_photos(tmp_path / "1" / "photos", "abce")
    source = ["--data.source", "folder", "--data.path", "photos"]
    with pair(tmp_path / "run", *source, each=[{"cwd": tmp_path / name} for name in "01"]) as processes:
        processes[0].wait_for("2 processes")
        assert seconds_until_the_end(processes) < LIMIT
        for process in processes:
            assert "the training data's source is " in ended(process, 1)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("lost", [0, 1])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_lost_process_ends_the_other_one(tmp_path, lost, number):
    """Killed, or stopped so that it answers no more; launchers start the run again after codes other than 1 and 2."""
    with pair(tmp_path / "run", *ENDLESS) as processes:
        processes[lost].wait_for("step 20/" if lost == 0 else "[Gloo]")
        if lost:
            processes[0].wait_for("step 20/")
        processes[lost].send_signal(number)
        assert seconds_until_the_end([processes[1 - lost]]) < LIMIT
        assert processes[1 - lost].returncode not in (0, 1, 2)


@pytest.mark.slow
def test_a_later_error_of_one_process_ends_both(tmp_path):
    with pair(tmp_path / "run", *ENDLESS, each=[{}, {"TOY_FAULT": "fail 20"}]) as processes:
        processes[0].wait_for("step 19/")
        assert seconds_until_the_end(processes) < LIMIT
        for process in processes:
            errors = ended(process, 1)
            assert "train.py: process 1 on " in errors
            assert errors.strip().endswith(": the disk of this batch is broken")


@pytest.mark.slow
def test_a_step_that_does_not_end_shows_the_stacks_of_both(tmp_path):
    with pair(tmp_path / "run", *ENDLESS, "--hang-minutes", 0.1, each=[{}, {"TOY_FAULT": "hang 20"}]) as processes:
        processes[0].wait_for("step 19/")
        assert seconds_until_the_end(processes) < LIMIT
        for process in processes:
            errors = ended(process, 75)
            assert "no step has ended for 0.1 minutes (hang_minutes)" in errors
            assert "most recent call first" in errors


@pytest.mark.slow
def test_a_run_that_is_preempted_twice_ends_bit_equal(tmp_path):
    """SIGTERM and kill -9 of the first process while it writes a checkpoint; the same command every time."""
    steps = ["--stages.0.steps", 30, "--stages.1.steps", 30, "--save-every", 10, "--resume", "auto"]
    with pair(tmp_path / "whole", *steps) as processes:
        for process in processes:
            ended(process)
    with pair(tmp_path / "run", *steps, each=[{"fault": ("terminated", "10")}, {}]) as processes:
        for process in processes:
            assert "train.py: stopped and saved at step " in ended(process, 143)
    with pair(tmp_path / "run", *steps, each=[{"fault": ("killed", "50")}, {}]) as processes:
        processes[0].wait_for("continuing after step ")
        processes[0].wait_for("step 50/")
        assert seconds_until_the_end(processes) < LIMIT
        assert processes[0].returncode == -signal.SIGKILL
        assert processes[1].returncode not in (0, 1, 2)
    with pair(tmp_path / "run", *steps) as processes:
        processes[0].wait_for("continuing after step 40 of 60")
        for process in processes:
            ended(process)
    whole, found = (tmp_path / name / ADAPTERS_FILE for name in ("whole", "run"))
    assert found.read_bytes() == whole.read_bytes()


@pytest.mark.slow
@pytest.mark.usefixtures("interruptible")
def test_a_second_signal_ends_a_process_of_two_at_once(tmp_path):
    """The second process never reaches the step at which both would stop."""
    steps = ["--stages.0.steps", 10**7, "--save-every", 10]
    with pair(tmp_path / "run", *steps, each=[{}, {"TOY_FAULT": "hang 35"}]) as processes:
        processes[0].wait_for("step 30/")
        time.sleep(2)
        processes[0].send_signal(signal.SIGTERM)
        time.sleep(2)
        processes[0].send_signal(signal.SIGTERM)
        assert seconds_until_the_end(processes[:1]) < 5
        assert processes[0].returncode == 143
    assert (tmp_path / "run" / "checkpoints" / "30").exists()
