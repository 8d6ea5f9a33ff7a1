"""Whole runs: stopped, killed, resumed, over devices and processes; the model is tiny and random."""

import dataclasses
import os
import random
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from conftest import ROOT
from safetensors.numpy import load_file

from pisa_jax import training
from pisa_jax.config import AdapterSpec, Config, Data, Stage

SPEC = AdapterSpec(rank=2)


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """Runs of one shape compile once."""
    folder = tmp_path_factory.mktemp("compiled")
    jax.config.update("jax_compilation_cache_dir", str(folder))
    yield folder
    jax.config.update("jax_compilation_cache_dir", None)


def config(out, **changes):
    stages = (
        Stage("pix", steps=2, learning_rate=1e-2, spec=SPEC),
        Stage("sem", steps=2, frozen=("pix",), csd=1.0, learning_rate=1e-2, spec=SPEC),
    )
    values = {"model": "random", "stages": stages, "data": Data(source="fake", crop=32, workers=0), "batch_size": 2}
    return Config(out=str(out), **{**values, "log_every": 1, "save_every": 100, **changes})


@pytest.fixture(scope="module")
def whole(tmp_path_factory, cache):
    """The adapters of a run that nothing stopped."""
    return training.run(config(tmp_path_factory.mktemp("runs") / "whole"))


def stopped_after(monkeypatch, steps):
    monkeypatch.setattr(training, "told_to_stop", lambda run, step: step in steps)


def test_a_run_stopped_and_resumed_is_bit_equal(whole, tmp_path, monkeypatch):
    run, stops = config(tmp_path / "run"), [1, 2, 3]  # in both stages and between them
    stopped_after(monkeypatch, stops)
    for index, step in enumerate(stops):
        with pytest.raises(training.Stop, match=f"saved at step {step} of 4; go on with --resume"):
            training.run(run, resume=index > 0)
    resumed = training.run(run, resume=True)
    assert resumed.read_bytes() == whole.read_bytes()
    found = load_file(resumed)
    assert {name.split("/")[0] for name in found} == {"pix", "sem"}
    # All but the queries and keys of attention over a single position have moved from B = 0.
    moved = [np.abs(value).max() > 0 for name, value in found.items() if name.endswith("/b")]
    assert np.mean(moved) > 0.9


def test_the_frozen_adapter_and_the_base_stay_as_they_are(whole, tmp_path, monkeypatch):
    run = config(tmp_path / "run")
    stopped_after(monkeypatch, [3])
    kept = []
    place = training.place_frozen

    def remember(*arguments):
        kept.append(place(*arguments))
        return kept[-1]

    monkeypatch.setattr(training, "place_frozen", remember)
    with pytest.raises(training.Stop):
        training.run(run)
    after_pix = load_file(tmp_path / "run" / training.ADAPTERS_FILE)
    complete = load_file(whole)
    assert set(after_pix) == {name for name in complete if name.startswith("pix/")}
    assert all(np.array_equal(after_pix[name], complete[name]) for name in after_pix)
    first, second = kept
    same = jax.tree.map(np.array_equal, first.unet, second.teacher)
    assert all(jax.tree.leaves(same))


def test_folders_and_configs_that_do_not_fit(whole, tmp_path):
    run = config(whole.parent)
    before = whole.read_bytes()
    with pytest.raises(FileExistsError, match="give --resume to go on with it, --overwrite"):
        training.run(run)
    changed = dataclasses.replace(run, seed=7, stages=(run.stages[0], dataclasses.replace(run.stages[1], csd=2.0)))
    with pytest.raises(ValueError, match=r"seed was 0 and is 7; stages/1/csd was 1.0 and is 2.0"):
        training.run(changed, resume=True)
    with pytest.raises(FileNotFoundError, match="nothing to resume"):
        training.run(config(tmp_path / "none"), resume=True)
    assert training.run(dataclasses.replace(run, log_every=5), resume=True).read_bytes() == before
    with pytest.raises(ValueError, match="crop 36 is not a multiple of 8"):
        training.run(config(tmp_path / "crop", data=Data(source="fake", crop=36, workers=0)))


def test_steps_that_are_never_finite_stop_the_run(tmp_path, monkeypatch, whole):
    batch = training.place_batch
    broken = lambda run, arrays: batch(run, {**arrays, "gt": arrays["gt"] * np.nan})  # noqa: E731
    monkeypatch.setattr(training, "place_batch", broken)
    with pytest.raises(FloatingPointError, match="2 steps in a row, up to step 2"):
        training.run(config(tmp_path / "run", max_bad_steps=2))


def command(out, *more):
    arguments = ["--out", str(out), "--data.crop", "32", "--perceptual", "squeeze"]
    return [sys.executable, str(ROOT / "train.py"), str(ROOT / "configs" / "debug.py"), *arguments, *map(str, more)]


def environment(cache, **more):
    named = {
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PLATFORMS": "cpu",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    return {**os.environ, **named, **more}


@pytest.mark.slow
@pytest.mark.parametrize("kills", [3])
def test_killed_at_random_moments_it_still_ends_with_the_same_adapters(tmp_path, cache, kills):
    """kill -9 anywhere, then --resume; benchmarks/kill.py does it twenty times."""
    subprocess.run(command(tmp_path / "whole"), env=environment(cache), check=True, capture_output=True)
    start = time.perf_counter()
    subprocess.run(command(tmp_path / "again"), env=environment(cache), check=True, capture_output=True)
    typical, out, draw = time.perf_counter() - start, tmp_path / "run", random.Random(0)
    for _ in range(kills):
        resume = ["--resume"] if (out / "config.json").exists() else []
        process = subprocess.Popen(command(out, "--save-every", 1, *resume), env=environment(cache))
        time.sleep(draw.uniform(0.3, 1.0) * typical)
        process.kill()
        process.wait()
    resume = ["--resume"] if (out / "config.json").exists() else []
    subprocess.run(command(out, "--save-every", 1, *resume), env=environment(cache), check=True, capture_output=True)
    expected = (tmp_path / "whole" / training.ADAPTERS_FILE).read_bytes()
    assert (out / training.ADAPTERS_FILE).read_bytes() == expected


@pytest.mark.slow
def test_sigterm_saves_and_exits(tmp_path, cache):
    out = tmp_path / "run"
    process = subprocess.Popen(command(out, "--stages.0.steps", 500, "--log-every", 1), env=environment(cache))
    while not list((out / "tensorboard").glob("*")) if out.exists() else True:
        time.sleep(0.2)
    time.sleep(25)
    process.send_signal(signal.SIGTERM)
    assert process.wait(120) == 143
    assert any(path.name.isdecimal() for path in (out / "checkpoints").iterdir())


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "devices", "fsdp"), [(1, 8, 2), (2, 2, 2)], ids=["8 devices", "2 processes x 2"])
def test_devices_and_processes_change_nothing_but_rounding(tmp_path, cache, processes, devices, fsdp):
    def train(out, processes, devices, fsdp):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        running = []
        for index in range(processes):
            more = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
            if processes > 1:
                more |= {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": str(processes)}
                more |= {"JAX_PROCESS_ID": str(index)}
            arguments = command(out, "--mesh-fsdp", fsdp, "--batch-size", 8)
            running.append(subprocess.Popen(arguments, env=environment(cache, **more)))
        assert [process.wait(500) for process in running] == [0] * processes
        return load_file(out / training.ADAPTERS_FILE)

    alone, together = train(tmp_path / "alone", 1, 1, 1), train(tmp_path / "together", processes, devices, fsdp)
    assert alone.keys() == together.keys()
    for name in alone:
        # Adam's first steps are lr * sign(g): elements with tiny gradients may flip, so a quantile.
        assert np.quantile(np.abs(alone[name] - together[name]), 0.95) < 1e-4, name
