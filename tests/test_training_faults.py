"""Runs that are disturbed, and what they can continue with; a toy model makes them cheap."""

import json
import logging
import os
import shutil
import signal
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file
from test_base_model import SPEC, toy_model

from pisa_jax import training, training_loop, training_run
from pisa_jax.config import Config, Data, Stage, Validation
from pisa_jax.runtime.stop_signals import StopSignals

RATE = 1e-3


def config(out, steps=(3, 4), rate=RATE, **fields):
    """Two stages, an average of the adapters, and a checkpoint after every step."""
    common = {"learning_rate": rate, "spec": SPEC}
    stages = Stage("pix", steps[0], **common), Stage("sem", steps[1], frozen=("pix",), **common)
    data = Data(source="fake", crop=16, workers=0)
    defaults = {"batch_size": 2, "mesh_data": 1, "ema": 0.5, "save_every": 1, "log_every": 1, "data": data}
    return Config(out=str(out), stages=stages, **(defaults | fields))


def train(run, **options):
    return training.train(run, model=toy_model(), **options)


def steps_of(out):
    return sorted(int(path.name) for path in (out / "checkpoints").iterdir() if path.name.isdecimal())


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The directory of an uninterrupted run."""
    return train(config(tmp_path_factory.mktemp("runs") / "whole")).parent


@pytest.fixture
def whole(finished):
    """The adapters of the uninterrupted run."""
    return (finished / training.ADAPTERS_FILE).read_bytes()


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for index in range(6):
        pixels = np.random.default_rng(index).integers(0, 256, (20, 24, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
    return folder


def test_more_steps_at_a_resume_equal_a_longer_run(finished, tmp_path, capsys):
    longer = train(config(tmp_path / "longer", steps=(3, 6)))
    copy = shutil.copytree(finished, tmp_path / "copy")
    capsys.readouterr()
    assert train(config(copy, steps=(3, 6)), resume=True).read_bytes() == longer.read_bytes()
    assert "continuing after step 7 of 9" in capsys.readouterr().out


def test_the_steps_after_a_damaged_checkpoint_are_repeated(finished, whole, tmp_path, caplog):
    """The stop is in the second stage, so that the average of the first one is restored as well."""
    copy = shutil.copytree(finished, tmp_path / "copy")
    (copy / training.ADAPTERS_FILE).unlink()
    assert steps_of(copy) == [6, 7]
    data = max((copy / "checkpoints/7/state").rglob("*"), key=lambda path: path.stat().st_size)
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    with caplog.at_level(logging.WARNING, logger="pisa_jax"):
        assert train(config(copy), resume=True).read_bytes() == whole
    named, repeated = (record.getMessage() for record in caplog.records if record.name.startswith("pisa_jax.runtime"))
    assert f"{data.relative_to(copy / 'checkpoints/7')} has other content than was written" in named
    assert repeated == "continuing from checkpoint 6; repeated steps: 1"


def replace_steps(monkeypatch, replacement):
    """Let `replacement(step)` take the place of every compiled step; returns a function that ends this."""
    compile_stage = training.compile_stage

    def compile_replaced(*arguments):
        programs = compile_stage(*arguments)
        return programs._replace(step=replacement(programs.step))

    monkeypatch.setattr(training, "compile_stage", compile_replaced)
    return lambda: monkeypatch.setattr(training, "compile_stage", compile_stage)


def broken_from(monkeypatch, first, change):
    """Let `change` break the state after all steps from `first` on; returns a function that ends this."""

    def break_step(step):
        def run(*arrays):
            state, measured = step(*arrays)
            return change(state, measured) if int(state.step) >= first else (state, measured)

        return run

    return replace_steps(monkeypatch, break_step)


@pytest.mark.parametrize("average", [0.0, 0.5])
def test_adapters_that_are_not_finite_are_neither_saved_nor_exported(tmp_path, monkeypatch, average):
    """As by an update that overflows; lowering the rate must help, so no checkpoint may hold them."""

    def overflow(state, measured):
        name = "ema" if average else "adapter"
        tree = jax.tree.map(lambda leaf: leaf * np.inf, getattr(state, name))
        return state._replace(**{name: tree}), measured

    out = tmp_path / "run"
    repair = broken_from(monkeypatch, 3, overflow)
    with pytest.raises(FloatingPointError, match=r"adapter pix .* not finite in 2 of 2 layers.*checkpoint 2 is intact"):
        train(config(out, ema=average))
    assert steps_of(out) == [1, 2]
    assert not (out / training.ADAPTERS_FILE).exists()
    repair()
    found = load_file(train(config(out, ema=average, rate=RATE / 10), resume=True))
    assert all(np.isfinite(value).all() for value in found.values())


def test_a_run_that_stopped_over_bad_steps_continues_with_a_lower_rate(tmp_path, monkeypatch):
    out = tmp_path / "run"
    repair = broken_from(monkeypatch, 2, lambda state, measured: (state, measured | {"bad_streak": state.step - 1}))
    with pytest.raises(FloatingPointError, match=r"2 steps in a row, up to step 3.*--resume and a lower learning rate"):
        train(config(out, max_bad_steps=2))
    repair()
    assert train(config(out, max_bad_steps=2, rate=RATE / 10), resume=True).exists()


def test_a_run_that_stopped_over_bad_files_continues_with_a_larger_share(tmp_path, photos):
    (photos / "3.png").write_bytes(b"<html>404</html>")
    data = {"source": "folder", "path": str(photos), "crop": 16, "workers": 0}
    out = tmp_path / "run"
    with pytest.raises(OSError, match="max_bad_share"):
        train(config(out, data=Data(**data)))
    assert train(config(out, data=Data(**data, max_bad_share=0.2)), resume=True).exists()


def stop_during(monkeypatch, name, count):
    """Return signals that are received during call number `count` of a function of a run."""
    module = training if name in ("export", "compile_stage") else training_loop
    stop, function, calls = StopSignals(), getattr(module, name), []

    def interrupted(*arguments, **options):
        calls.append(arguments)
        if len(calls) == count:
            stop.received = signal.SIGTERM
        return function(*arguments, **options)

    monkeypatch.setattr(module, name, interrupted)
    return stop


@pytest.mark.parametrize(
    ("function", "count", "step"),
    [
        ("log_validation", 1, 0),  # before the first step
        ("compile_stage", 1, 0),
        ("place_batch", 2, 2),
        ("log_validation", 2, 2),
        ("save", 2, 3),  # while a checkpoint is written: the next step is saved as well
        ("export", 1, 3),  # between the stages
        ("make_frozen", 2, 3),
        ("place_batch", 4, 4),  # in the second stage
    ],
)
def test_a_signal_at_any_time_loses_nothing(tmp_path, monkeypatch, photos, whole, function, count, step):
    run = config(tmp_path / "run", validation=Validation(str(photos), count=1, every=2))
    stop = stop_during(monkeypatch, function, count)
    message = f"stopped (and saved )?at step {step} of 7; continue with --resume"
    with pytest.raises(training_run.Stop, match=message):
        train(run, stop=stop)
    assert steps_of(tmp_path / "run")[-1:] == [step] * bool(step)
    assert train(run, resume=True).read_bytes() == whole


def test_a_signal_during_the_last_step_lets_the_run_end(tmp_path, monkeypatch, whole):
    stop = stop_during(monkeypatch, "place_batch", 7)
    assert train(config(tmp_path / "run"), stop=stop).read_bytes() == whole


def test_a_resume_without_a_checkpoint_is_reported(finished, whole, tmp_path, capsys):
    copy = shutil.copytree(finished, tmp_path / "copy")
    shutil.rmtree(copy / "checkpoints")
    assert train(config(copy), resume=True).read_bytes() == whole
    assert "continuing after step 0 of 7" in capsys.readouterr().out


def test_fields_that_a_later_version_added_do_not_end_a_run(finished, whole, tmp_path):
    copy = shutil.copytree(finished, tmp_path / "copy")
    saved = json.loads((copy / "config.json").read_text())
    del saved["remat"], saved["stages"][0]["latent_window"], saved["data"]["max_bad_share"]
    for stage in saved["stages"]:
        del stage["spec"]["options"], stage["spec"]["rank_by_target"]
    (copy / "config.json").write_text(json.dumps(saved))
    assert train(config(copy), resume=True).read_bytes() == whole


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_memory_and_open_files_do_not_grow(tmp_path, monkeypatch, photos):
    """Over 1000 steps with checkpoints, validation and a worker process."""
    resident, files, log_step = {}, {}, training_loop.log_step

    def measured(run, stage, step, values):
        resident[step] = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
        files[step] = len(os.listdir("/proc/self/fd"))
        log_step(run, stage, step, values)

    monkeypatch.setattr(training_loop, "log_step", measured)
    data = Data(source="fake", crop=16, workers=1)
    watched = Validation(str(photos), count=2, every=20)
    train(config(tmp_path / "run", steps=(500, 500), save_every=20, log_every=10, data=data, validation=watched))
    assert len(resident) == 100

    def open_files(last):  # the least number of ten: a checkpoint that is being written has some; a leak would be 15
        return min(count for step, count in files.items() if last - 100 < step <= last)

    for last, begin in ((500, 200), (1000, 700)):  # both stages, after their first checkpoints
        assert resident[last] - resident[begin] < 20, resident
        assert open_files(last) <= open_files(begin) + 8, files
    assert open_files(1000) <= open_files(500) + 8
