"""Checkpoints of small trees: what was saved is restored, and damage of any file is found and survived."""

import json
import logging
import os
import shutil

import jax
import jax.numpy as jnp
import pytest
from small_checkpoints import restored, save, tree

from pisa_jax.runtime.checkpoint import Checkpoints, Progress
from pisa_jax.runtime.checksums import CHECKSUMS_FILE

# Reads of damaged checkpoints leave threads of tensorstore that report to an event loop that is closed.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints") / "run"
    folder.mkdir()
    save(folder, 2, 4)
    return folder


@pytest.fixture
def saved(two_steps, tmp_path):
    """A run directory with the checkpoints 2 and 4."""
    return shutil.copytree(two_steps, tmp_path / "run")


def largest(folder):
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "truncated data": lambda step: os.truncate(largest(step / "state" / "ocdbt.process_0" / "d"), 10),
    "flipped bit in the state": lambda step: flip(largest(step / "state" / "ocdbt.process_0" / "d")),
    "flipped bit in the adapters": lambda step: flip(largest(step / "adapters" / "ocdbt.process_0" / "d")),
    "empty data": lambda step: os.truncate(largest(step / "adapters"), 0),
    "missing data": lambda step: largest(step / "adapters").unlink(),
    "missing state": lambda step: shutil.rmtree(step / "state"),
    "missing adapters": lambda step: shutil.rmtree(step / "adapters"),
    "empty progress": lambda step: os.truncate(step / "progress" / "metadata", 0),
    "empty metadata": lambda step: os.truncate(step / "state" / "_METADATA", 0),
    "missing manifest": lambda step: (step / "state" / "manifest.ocdbt").unlink(),
    "empty checksums": lambda step: os.truncate(step / CHECKSUMS_FILE, 0),
    "checksums of another kind": lambda step: (step / CHECKSUMS_FILE).write_text("[1]"),
    "empty newer folder": lambda step: (step.parent / "6").mkdir(),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_the_newest_sound_checkpoint_is_used(saved, damage, caplog):
    DAMAGES[damage](saved / "checkpoints" / "4")
    expected, broken = (4, 6) if damage == "empty newer folder" else (2, 4)
    with caplog.at_level(logging.WARNING, logger="pisa_jax"):
        assert restored(saved) == expected
    named, repeated = (record.getMessage() for record in caplog.records if record.name.startswith("pisa_jax.runtime"))
    assert f"{saved / 'checkpoints' / str(broken)} is damaged" in named
    assert repeated == f"continuing from checkpoint {expected}; repeated steps: 2"
    save(saved, broken)  # the step of the damaged one is free again
    assert restored(saved) == broken
    assert (saved / "checkpoints" / f"damaged_{broken}").is_dir()


def test_what_a_killed_run_left_unfinished_is_deleted(saved):
    unfinished = saved / "checkpoints" / "6.orbax-checkpoint-tmp"
    shutil.copytree(saved / "checkpoints" / "4", unfinished)
    assert restored(saved) == 4
    save(saved, 6)  # orbax deletes it in a thread, which it waits for before it saves
    assert not unfinished.exists()
    assert restored(saved) == 6


def test_damaged_twice_at_the_same_step(saved):
    for _ in range(2):
        DAMAGES["empty progress"](saved / "checkpoints" / "4")
        assert restored(saved) == 2
        save(saved, 4)


def test_without_a_sound_checkpoint_nothing_is_renamed(saved):
    checkpoints = saved / "checkpoints"
    DAMAGES["missing state"](checkpoints / "2")
    DAMAGES["truncated data"](checkpoints / "4")
    with pytest.raises(OSError, match="no checkpoint of this run can be used") as raised:
        restored(saved)
    message = str(raised.value)
    assert "\n" not in message
    assert f"{checkpoints / '2'}: " in message
    assert f"{checkpoints / '4'}: state/ocdbt.process_0/d/" in message
    assert "has 10 bytes instead of" in message
    assert {path.name for path in checkpoints.iterdir()} == {"2", "4"}


@pytest.mark.parametrize("damage", [None, "truncated data", "missing state", "empty progress"])
def test_checkpoints_without_checksums_are_read_before_they_are_used(saved, damage):
    """Older programs wrote none."""
    for step in ("2", "4"):
        (saved / "checkpoints" / step / CHECKSUMS_FILE).unlink()
    if damage:
        DAMAGES[damage](saved / "checkpoints" / "4")
    assert restored(saved) == (2 if damage else 4)


def test_the_checksums_cover_all_items(saved):
    step = saved / "checkpoints" / "4"
    names = json.loads((step / CHECKSUMS_FILE).read_text())
    assert {name.split("/")[0] for name in names} == {"adapters", "state", "progress"}
    files = {path.relative_to(step).as_posix() for path in step.glob("*/**/*") if path.is_file()}
    assert set(names) <= files
    assert not [path for path in step.iterdir() if path.name.startswith(".")]


def test_a_checkpoint_of_other_arrays_is_named(saved):
    run = Checkpoints(saved)
    shapes = {"other": jax.ShapeDtypeStruct((2,), jnp.float32)}
    with pytest.raises(ValueError, match="checkpoints/4 does not fit the adapters of this run"):
        run.restore({"pix": shapes}, shapes)
    run.close()
    assert restored(saved) == 4


@pytest.mark.parametrize("step", [3, 4])
def test_a_save_behind_a_later_checkpoint_is_an_error(saved, step):
    with pytest.raises(OSError, match=f"checkpoint {step} cannot be saved, because .*checkpoints/4 exists"):
        save(saved, step)


def test_a_skipped_save_is_an_error(saved, monkeypatch):
    run = Checkpoints(saved)
    monkeypatch.setattr(run._manager, "save", lambda *_, **__: False)
    with pytest.raises(OSError, match=r"could not be written \(checkpoint 4 is intact\).*skipped checkpoint 6"):
        run.save(6, tree(6), tree(6), Progress(0, {}))
    run.close()


def test_a_new_run_has_no_checkpoint(tmp_path):
    run = Checkpoints(tmp_path)
    assert run.latest is None
    assert run.recover() is None
    run.close()


def kept(folder, best, values, stages=None, keep=1):
    """Save one checkpoint per value of a validation metric (None: no validation); returns the steps that are kept."""
    run = Checkpoints(folder, keep=keep, best=best)
    for step, value in enumerate(values, 1):
        metrics = None if value is None else {"l2": value, "psnr": value}
        run.save(step, tree(step), tree(step), Progress(stages[step - 1] if stages else 0, {}), metrics)
        run.wait()
    found = sorted(int(path.name) for path in (folder / "checkpoints").iterdir()), run.best
    run.close()
    return found


def test_the_number_of_checkpoints(tmp_path):
    assert kept(tmp_path, None, [None] * 5, keep=3) == ([3, 4, 5], None)


def test_the_best_checkpoint_is_kept(tmp_path):
    assert kept(tmp_path / "l2", "l2", [5.0, 2.0, None, 3.0]) == ([2, 4], 2)
    assert kept(tmp_path / "psnr", "psnr", [5.0, 2.0, None, 3.0]) == ([1, 4], 1)
    assert kept(tmp_path / "none", "psnr", [None, None]) == ([2], None)


def test_the_best_checkpoint_of_the_newest_stage_is_kept(tmp_path):
    assert kept(tmp_path, "psnr", [9.0, 8.0, 2.0, 3.0, 1.0], stages=[0, 0, 1, 1, 1]) == ([4, 5], 4)


def test_the_best_checkpoint_is_known_after_a_resume(tmp_path):
    save(tmp_path, 1)  # of a run without keep_best
    run = Checkpoints(tmp_path, keep=1, best="l2")
    for step, value in ((2, 1.0), (3, 2.0)):
        run.save(step, {"pix": tree(step)}, tree(step), Progress(0, {"batches": step}), {"l2": value})
    run.close()
    run = Checkpoints(tmp_path, keep=1, best="l2")
    run.save(4, {"pix": tree(4)}, tree(4), Progress(0, {"batches": 4}), {"l2": 3.0})
    assert run.best == 2
    run.close()
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["2", "4"]
    assert restored(tmp_path) == 4
