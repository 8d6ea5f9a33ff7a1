"""Whole runs: stopped, killed, resumed, over devices and processes; the model is tiny and random."""

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from conftest import DATA, ROOT, shared_data
from event_files import events
from safetensors.numpy import load_file

from pisa_jax import training
from pisa_jax.adapters import files
from pisa_jax.cli import train
from pisa_jax.runtime import distributed
from pisa_jax.runtime.checkpoint import Checkpoints
from pisa_jax.runtime.weights_digest import weights_digest
from pisa_jax.sd import pretrained, random_model
from pisa_jax.train_step import Frozen

# Two steps of each stage, all losses, an average of the adapters, on one device. The rate is small: at 1e-3
# eight elements whose tiny gradients rounding flips change the next step's gradient by 16 %, on any mesh.
RATE = 1e-5
SHORT = {"data.crop": 32, "batch-size": 4, "ema": 0.5, "stages.0.steps": 2, "stages.1.steps": 2, "save-every": 1}
SHORT |= {f"stages.{index}.learning-rate": RATE for index in (0, 1)}


def arguments(out, *more):
    """Return the arguments of `train.py`; of repeated options the last one counts."""
    short = [part for name, value in SHORT.items() for part in (f"--{name}", value)]
    return [str(part) for part in (ROOT / "configs" / "debug.py", "--out", out, *short, *more)]


def config(out, *more):
    return train.read(arguments(out, *more))[0]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The adapters of an uninterrupted run."""
    return training.train(config(tmp_path_factory.mktemp("runs") / "whole"))


def close_to(found, expected):
    """Compare a quantile: Adam's first steps are lr * sign(g), so elements with tiny gradients may change sign."""
    found, expected = load_file(found), load_file(expected)
    assert found.keys() == expected.keys()
    for name in found:
        assert np.quantile(np.abs(found[name] - expected[name]), 0.95) < 0.1 * RATE, name


class Interrupted(NamedTuple):
    """Records of a run that was stopped after every step and resumed."""

    adapters: Path
    # adapters.safetensors after the pixel stage.
    after_pix: dict[str, np.ndarray]
    # For every start: the weights of its stage, and the compiled step.
    frozen: list[Frozen]
    steps: list[Any]


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    run, stops = config(tmp_path_factory.mktemp("runs") / "run"), [1, 2, 3]  # in both stages and between them
    frozen, steps, after_pix = [], [], {}
    make, compile_step = training.make_frozen, training.jit_train_step
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(training, "asked_to_stop", lambda run, step: step in stops)
        patched.setattr(training, "make_frozen", lambda *a, **named: frozen.append(make(*a, **named)) or frozen[-1])
        patched.setattr(training, "jit_train_step", lambda *a: steps.append(compile_step(*a)) or steps[-1])
        for index, step in enumerate(stops):
            with pytest.raises(training.Stop, match=f"saved at step {step} of 4; continue with --resume"):
                training.train(run, resume=index > 0)
            if step == 3:
                after_pix = load_file(Path(run.out) / training.ADAPTERS_FILE)
        adapters = training.train(run, resume=True)
    return Interrupted(adapters, after_pix, frozen, steps)


def test_a_run_stopped_and_resumed_is_bit_equal(whole, interrupted):
    assert interrupted.adapters.read_bytes() == whole.read_bytes()
    found = load_file(interrupted.adapters)
    assert {name.split("/")[0] for name in found} == {"pix", "sem"}
    # All but the queries and keys of attention over a single position have moved from B = 0.
    moved = [np.abs(value).max() > 0 for name, value in found.items() if name.endswith("/b")]
    assert np.mean(moved) > 0.9


def test_the_frozen_adapter_and_the_base_stay_as_they_are(whole, interrupted):
    after_pix, complete = interrupted.after_pix, load_file(whole)
    assert set(after_pix) == {name for name in complete if name.startswith("pix/")}
    assert all(np.array_equal(after_pix[name], complete[name]) for name in after_pix)
    same = jax.tree.map(np.array_equal, interrupted.frozen[0].unet, interrupted.frozen[-1].teacher)
    assert all(jax.tree.leaves(same))


def test_a_stage_is_traced_once(interrupted):
    """Neither a new step number nor a restored state triggers another trace."""
    # The third start found its stage complete.
    assert [step._cache_size() for step in interrupted.steps] == [1, 1, 0, 1, 1]


def test_folders_and_configs_that_do_not_fit(whole, tmp_path):
    run = config(whole.parent)
    before = whole.read_bytes()
    with pytest.raises(FileExistsError, match="give --resume to continue the run, or --overwrite"):
        training.train(run)
    changed = dataclasses.replace(run, seed=7, stages=(run.stages[0], dataclasses.replace(run.stages[1], csd=2.0)))
    with pytest.raises(ValueError, match=r"seed was 0 and is 7; stages/1/csd was 1.0 and is 2.0"):
        training.train(changed, resume=True)
    with pytest.raises(FileNotFoundError, match="nothing to resume"):
        training.train(config(tmp_path / "none"), resume=True)
    assert training.train(dataclasses.replace(run, log_every=5), resume=True).read_bytes() == before
    with pytest.raises(ValueError, match="crop 34 is not a multiple of 4"):
        training.train(config(tmp_path / "crop", "--data.crop", 34))
    with pytest.raises(ValueError, match="stage pix: latent_window 9 is more than the 8 latents along a crop of 32"):
        training.train(config(tmp_path / "window", "--stages.0.latent-window", 9))
    with pytest.raises(ValueError, match="stage sem: targets: the pattern 'nosuchlayer' matches none of"):
        training.train(config(tmp_path / "targets", "--stages.1.spec.targets", "nosuchlayer"))
    with pytest.raises(ValueError, match=r"data\.crop 4 is too small for the perceptual loss"):
        training.train(config(tmp_path / "small", "--data.crop", 4))
    with pytest.raises(ValueError, match="batch_size 4 cannot be divided over 8 devices"):
        training.train(config(tmp_path / "batch", "--mesh-data", -1))
    assert not list(tmp_path.iterdir())


def test_the_weights_decide_whether_a_resumed_run_has_its_model(whole, tmp_path):
    """The folder of the model may move; other weights are refused, and a checkpoint without a digest is accepted."""
    run, before = config(whole.parent), whole.read_bytes()
    shutil.copytree(whole.parent / "model", tmp_path / "moved")
    random_model.write_random_model(tmp_path / "other", "nano", seed=1)
    loaded = {name: pretrained.load_pretrained(tmp_path / name) for name in ("moved", "other")}
    digests = {name: weights_digest(model.params) for name, model in loaded.items()}
    assert files.load_adapters(whole).base_digest == weights_digest(loaded["moved"].params["unet"])
    named = {name: dataclasses.replace(run, model=str(tmp_path / name)) for name in loaded}
    with pytest.raises(
        ValueError, match=rf"other is not the model .* are {digests['other']}, .* on {digests['moved']}"
    ):
        training.train(named["other"], resume=True)
    assert whole.read_bytes() == before
    training.train(named["moved"], resume=True)
    trained, again = load_file(whole), training.train(run, resume=True)
    assert again.read_bytes() == before
    jax.tree.map(np.testing.assert_array_equal, load_file(again), trained)
    with pytest.MonkeyPatch.context() as patched:
        progress = Checkpoints.progress
        patched.setattr(Checkpoints, "progress", lambda self: progress(self)._replace(model=None))
        training.train(named["other"], resume=True)
    training.train(run, resume=True)


def test_a_folder_that_is_not_a_run_is_never_deleted(tmp_path):
    for name, content in (("photo.jpg", "a photograph"), ("config.json", '{"model": "of something else"}')):
        folder = tmp_path / name.split(".")[0]
        folder.mkdir()
        (folder / name).write_text(content)
        for overwrite in (False, True):
            with pytest.raises(FileExistsError, match="exists and is not a run directory; give another with --out"):
                training.train(config(folder), overwrite=overwrite)
        assert (folder / name).read_text() == content
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text(json.dumps(dataclasses.asdict(config(run))))
    (run / "old").touch()
    training.claim_run_directory(config(run), resume=False, overwrite=True)
    assert {path.name for path in run.iterdir()} == {"config.json", ".lock"}
    killed = tmp_path / "killed"  # while it wrote its first file
    killed.mkdir()
    (killed / ".0f.json").touch()
    training.claim_run_directory(config(killed), resume=False, overwrite=False)
    assert (killed / "config.json").exists()


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"run directory cannot be written, give another with --out: .*file/run"):
        training.train(config(tmp_path / "file" / "run"))


def test_steps_that_are_never_finite_stop_the_run(tmp_path, monkeypatch, whole):
    batch = training.place_batch
    broken = lambda run, arrays: batch(run, {**arrays, "gt": arrays["gt"] * np.nan})  # noqa: E731
    monkeypatch.setattr(training, "place_batch", broken)
    with pytest.raises(FloatingPointError, match="2 steps in a row, up to step 2"):
        training.train(config(tmp_path / "run", "--max-bad-steps", 2))


@pytest.mark.slow
@pytest.mark.parametrize(("data", "fsdp"), [(8, 1), (4, 2)])
def test_eight_devices_change_nothing_but_rounding(tmp_path, data, fsdp):
    alone = training.train(config(tmp_path / "alone", "--batch-size", 8, "--accumulate", 2))
    mesh = ["--mesh-data", data, "--mesh-fsdp", fsdp]
    close_to(training.train(config(tmp_path / "together", "--batch-size", 8, *mesh)), alone)


def test_meshes():
    assert dict(distributed.make_mesh().shape) == {"data": 8, "fsdp": 1}
    assert dict(distributed.make_mesh(fsdp=4).shape) == {"data": 2, "fsdp": 4}
    assert distributed.make_mesh(data=2, fsdp=2).size == 4
    with pytest.raises(ValueError, match="a mesh of data 3 x fsdp 4 has 12 devices, and there are 8"):
        distributed.make_mesh(data=3, fsdp=4)


LONGEST_WAIT = 300  # seconds; what takes longer hangs


class Training(subprocess.Popen):
    """`python train.py` in its own process, killed if it hangs. Both pipes are read, otherwise it would block.

    `fault` is (the fault, the name of the file at which it happens) of faulty.py.
    """

    def __init__(self, out, *more, fault=(), **environment):
        named = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        if precision := jax.config.jax_default_matmul_precision:  # tiny.py sets it
            named["JAX_DEFAULT_MATMUL_PRECISION"] = precision
        super().__init__(
            [sys.executable, *self._program(fault), *arguments(out, *more)],
            env={**os.environ, "JAX_PLATFORMS": "cpu", **named, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._watchdog, self._errors = threading.Timer(LONGEST_WAIT, self.kill), []
        self._reader = threading.Thread(target=lambda: self._errors.extend(self.stderr))
        self._watchdog.start()
        self._reader.start()

    @staticmethod
    def _program(fault):
        program = str(ROOT / "train.py")
        return [str(ROOT / "tests" / "faulty.py"), *fault, program] if fault else [program]

    def wait_for(self, beginning):
        """Read the output up to a line with this beginning."""
        if not any(line.startswith(beginning) for line in self.stdout):
            pytest.fail(f"ended before {beginning!r}: {self.end()}")

    def end(self):
        """Wait for the end of the process; returns its error output."""
        if not self.stdout.closed:
            with self:  # waits, and closes the pipes
                self.stdout.read()
                self._reader.join()
            self._watchdog.cancel()
        return "".join(self._errors)


def complete(out):
    """Return the steps of the complete checkpoints of a run."""
    return {int(path.name) for path in (out / "checkpoints").glob("*") if path.name.isdecimal()}


def ended(process, code=0):
    """Wait for the end of a process and check its exit code; returns its error output."""
    errors = process.end()
    assert process.returncode == code, errors
    assert "Traceback" not in errors
    return errors


def test_killed_at_any_point_it_still_ends_with_the_same_adapters(whole, tmp_path):
    """kill -9, then --resume; benchmarks/kill.py does it twenty times at random moments."""
    out = tmp_path / "run"
    # While the first checkpoint is written, between the stages, and while the last checkpoint is written.
    for name in ("1", training.ADAPTERS_FILE, "4"):
        process = Training(out, *["--resume"] * out.exists(), fault=("killed", name))
        ended(process, -signal.SIGKILL)
    ended(Training(out, "--resume"))
    assert (out / training.ADAPTERS_FILE).read_bytes() == whole.read_bytes()


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_saves_and_exits(whole, tmp_path):
    out = tmp_path / "run"
    process = Training(out, "--stages.0.steps", 500, "--save-every", 500)
    process.wait_for("step 2/502")
    process.send_signal(signal.SIGINT)
    errors = ended(process, 130)
    (latest,) = complete(out)
    assert 2 <= latest < 500
    assert f"stopped and saved at step {latest} of 502; continue with --resume" in errors


def test_a_full_disk_stops_the_run_and_nothing_is_lost(whole, tmp_path):
    # The process must not leave incomplete programs in the cache that the other processes share.
    cache = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "1000"}
    errors = ended(Training(tmp_path / "run", fault=("full disk", "1"), **cache), 1)
    (message,) = (line for line in errors.splitlines() if line.startswith("train.py: "))
    assert "checkpoint 1 is intact); free space and continue with --resume" in message
    assert training.train(config(tmp_path / "run"), resume=True).read_bytes() == whole.read_bytes()


@contextlib.contextmanager
def started_together(out, *more, fault=()):
    """Start two processes with two devices each; they are killed at the end of the test in any case."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        named = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free.getsockname()[1]}", "JAX_NUM_PROCESSES": "2"}
    named |= {"XLA_FLAGS": os.environ["XLA_FLAGS"].replace("count=8", "count=2")}
    more = ["--mesh-data", 2, "--mesh-fsdp", 2, *more]
    processes = [Training(out, *more, fault=fault, **named, JAX_PROCESS_ID=str(index)) for index in range(2)]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.end()


def test_two_processes_agree_to_rounding_and_one_device_can_resume(whole, tmp_path):
    """Two processes are killed while the last checkpoint of the pixel stage is written; this process continues."""
    with started_together(tmp_path / "run", fault=("killed", "2")) as processes:
        ended(processes[0], -signal.SIGKILL)
    assert complete(tmp_path / "run") == {1}
    close_to(training.train(config(tmp_path / "run"), resume=True), whole)


@pytest.mark.slow
def test_two_processes_end_together(whole, tmp_path):
    watched = ["--validation.path", DATA / "demo", "--validation.count", 1]
    with started_together(tmp_path / "run", *watched) as processes:
        for process in processes:
            ended(process)
    close_to(tmp_path / "run" / training.ADAPTERS_FILE, whole)


@pytest.mark.slow
def test_two_processes_stop_at_the_same_step_after_one_signal(tmp_path):
    with started_together(tmp_path / "run", "--stages.0.steps", 500, "--save-every", 500) as processes:
        processes[0].wait_for("step 2/502")
        processes[1].send_signal(signal.SIGTERM)
        messages = {ended(process, 143).splitlines()[-1] for process in processes}
    assert len(messages) == 1
    assert "continue with --resume" in messages.pop()


@pytest.mark.slow
@pytest.mark.external
def test_it_learns(tmp_path):
    """On held-out photographs, `pix` lowers l2, and `sem` on top of it lowers the perceptual distance."""
    held_out = ["--validation.path", shared_data("eval/Kodak24"), "--out", tmp_path / "run"]
    line = [ROOT / "configs" / "learn.py", "--data.path", shared_data("train/photos"), *held_out]
    run, _ = train.read([str(part) for part in line])
    training.train(run)
    found = events(tmp_path / "run" / "tensorboard")
    pix, sem = (stage.steps for stage in run.stages)
    l2, psnr, distance = (
        {step: found[f"validation/{name}"][step].simple_value for step in (0, pix, pix + sem)}
        for name in ("l2", "psnr", "perceptual")
    )
    assert l2[pix] < 0.67 * l2[0]
    assert psnr[pix] > psnr[0] + 2
    assert distance[pix + sem] < 0.95 * distance[pix]
