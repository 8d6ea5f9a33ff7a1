"""Whole runs of the debug config in an emulated bucket: killed, preempted, resumed, and used by `infer.py`."""

import os
import signal
import socket
import subprocess
import sys
import time

import pytest
from conftest import DATA, ROOT
from event_files import events

from pisa_jax.runtime.checkpoint import COMMIT_FILE
from pisa_jax.runtime.remote_paths import copy_folder, open_path
from pisa_jax.training_run import ADAPTERS_FILE

FIELDS = ["--data.crop", "32", "--keep", "100"]


class Program(subprocess.Popen):
    """A program of the repository; its output is in `log`."""

    def __init__(self, log, *line, **environment):
        self.log = log
        command = [sys.executable, *map(str, line)]
        with log.open("w") as file:
            super().__init__(command, cwd=ROOT, stdout=file, stderr=file, env=os.environ | environment)

    def wait_for(self, condition):
        """Wait until a condition holds while the program runs."""
        while not condition():
            assert self.poll() is None, self.log.read_text()
            time.sleep(0.05)

    def ends_with(self, *codes):
        """Wait for the end of the program and check its exit code."""
        assert self.wait(timeout=500) in codes, self.log.read_text()


def training(log, out, *more, **environment):
    # A killed process must not leave incomplete programs in the cache that all processes share.
    environment |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "1000"}
    return Program(log, "train.py", "configs/debug.py", "--out", out, *FIELDS, *more, **environment)


def saved(out, step):
    return (open_path(out) / "checkpoints" / str(step) / COMMIT_FILE).exists()


@pytest.mark.slow
def test_a_run_in_a_bucket_is_killed_and_resumed_and_its_adapters_are_used(bucket, tmp_path):
    whole = training(tmp_path / "whole.log", tmp_path / "whole")
    whole.ends_with(0)
    run = training(tmp_path / "killed.log", bucket)
    run.wait_for(lambda: saved(bucket, 4))
    run.kill()
    run.ends_with(-signal.SIGKILL)
    assert not saved(bucket, 8)
    resumed = training(tmp_path / "resumed.log", bucket, "--resume")
    resumed.ends_with(0)
    assert "continuing after step 4 of 8" in resumed.log.read_text()
    assert "did not end by itself" in resumed.log.read_text()

    folder = open_path(bucket)
    assert (folder / ADAPTERS_FILE).read_bytes() == (tmp_path / "whole" / ADAPTERS_FILE).read_bytes()
    names = {"config.json", "history.json", "model", "checkpoints", "tensorboard", ADAPTERS_FILE}
    assert {path.name for path in folder.iterdir()} == names
    found = events(folder / "tensorboard")
    assert set(found["sem/csd"]) == {5, 6, 7, 8}
    assert found["run/restarts"][8].simple_value == 1
    assert not (ROOT / "gs:").exists()

    copy_folder(folder / "model", tmp_path / "model")
    image = next((DATA / "demo").glob("*.jpg"))
    line = ["infer.py", "-i", image, "-o", tmp_path / "out", "--model", tmp_path / "model", "--min-size", 64, "-s", 1]
    for place in (bucket, tmp_path / "whole"):
        program = Program(tmp_path / "infer.log", *line, "--adapters", f"{place}/{ADAPTERS_FILE}")
        program.ends_with(0)
        (result,) = (tmp_path / "out").iterdir()
        result.rename(tmp_path / ("bucket.jpg" if place == bucket else "disk.jpg"))
    assert (tmp_path / "bucket.jpg").read_bytes() == (tmp_path / "disk.jpg").read_bytes()


def together(tmp_path, name, out):
    """Start two processes with two devices each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        named = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free.getsockname()[1]}", "JAX_NUM_PROCESSES": "2"}
    named |= {"XLA_FLAGS": os.environ["XLA_FLAGS"].replace("count=8", "count=2")}
    fields = ["--mesh-data", 2, "--mesh-fsdp", 2, "--batch-size", 4, "--stages.0.steps", 200, "--save-every", 50]
    return [
        training(tmp_path / f"{name}{index}.log", out, *fields, "--resume", "auto", **named, JAX_PROCESS_ID=str(index))
        for index in range(2)
    ]


@pytest.mark.slow
def test_two_processes_preempted_twice_end_bit_equal(bucket, tmp_path):
    """SIGTERM to one process, then kill -9 of both; the same command, with --resume auto, goes on each time."""
    started = []
    try:
        started += (undisturbed := together(tmp_path, "undisturbed", f"{bucket}/undisturbed"))
        for process in undisturbed:
            process.ends_with(0)
        out = f"{bucket}/disturbed"
        started += (first := together(tmp_path, "first", out))
        first[0].wait_for(lambda: "step 5/" in first[0].log.read_text())
        first[1].send_signal(signal.SIGTERM)
        for process in first:
            process.ends_with(143)
        started += (second := together(tmp_path, "second", out))
        second[0].wait_for(lambda: saved(out, 200))
        for process in second:
            process.kill()
            process.wait()
        assert not saved(out, 204)
        started += (third := together(tmp_path, "third", out))
        for process in third:
            process.ends_with(0)
    finally:
        for process in started:
            process.kill()
            process.wait()
    assert "continuing after step 200 of 204" in third[0].log.read_text()
    expected = (open_path(f"{bucket}/undisturbed") / ADAPTERS_FILE).read_bytes()
    assert (open_path(out) / ADAPTERS_FILE).read_bytes() == expected
