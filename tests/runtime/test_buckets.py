"""Runs in an emulated bucket: the run directory, its lock, checkpoints, logs, traces and adapters."""

import contextlib
import json
import logging
import time

import jax
import jax.numpy as jnp
import pytest
from event_files import events
from jax._src import compilation_cache
from jax._src import config as jax_config
from small_adapters import assert_same, random_adapters
from small_checkpoints import restored, save, tree

from pisa_jax.adapters.files import load_adapters, save_adapters
from pisa_jax.config import Config, Stage
from pisa_jax.runtime import run_lock, run_log
from pisa_jax.runtime.checkpoint import COMMIT_FILE, Checkpoints, Progress
from pisa_jax.runtime.mirror import Mirror
from pisa_jax.runtime.remote_paths import delete, open_path, uploaded
from pisa_jax.runtime.run_directory import (
    CONFIG_FILE,
    check_run_directory,
    claim_run_directory,
    require_run_directory,
    use_compilation_cache,
)


def config(out, **fields):
    return Config(out=str(out), stages=(Stage("pix", steps=4),), **fields)


def claim(bucket, resume=False, overwrite=False, lifetime=None):
    check_run_directory(config(bucket), resume, overwrite)
    return claim_run_directory(config(bucket), resume, overwrite, lifetime)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_run_is_claimed_resumed_and_overwritten(bucket):
    run = claim(bucket)
    assert json.loads((run / CONFIG_FILE).read_text())["out"] == bucket
    with pytest.raises(FileExistsError, match=f"{bucket} exists; give --resume"):
        claim(bucket)
    (run / "checkpoints" / "4" / "file").write_text("")
    claim(bucket, resume=True)
    assert names(run) == ["checkpoints", CONFIG_FILE]
    claim(bucket, overwrite=True)
    assert names(run) == [CONFIG_FILE]
    with pytest.raises(FileNotFoundError, match=r"nothing to resume: gs://.* is not a run directory"):
        claim(f"{bucket}/other", resume=True)


def test_the_program_that_starts_last_goes_on(bucket, monkeypatch, caplog):
    with contextlib.ExitStack() as first, contextlib.ExitStack() as second:
        run = claim(bucket, lifetime=first)
        require_run_directory(config(bucket))
        monkeypatch.setattr(run_lock, "_PROGRAM", "restarted")
        with caplog.at_level(logging.WARNING):
            claim(bucket, resume=True, lifetime=second)
        (record,) = caplog.records
        assert f"{bucket} was last used by process " in record.getMessage()
        require_run_directory(config(bucket))
        monkeypatch.undo()
        with pytest.raises(
            OSError, match=r"taken over by process .* \(restarted\), which was started later; this prog"
        ):
            require_run_directory(config(bucket))
        first.close()  # leaves the mark of the other
        assert (run / run_lock.LOCK_FILE).exists()
        monkeypatch.setattr(run_lock, "_PROGRAM", "restarted")
    assert names(run) == [CONFIG_FILE]


def test_a_bucket_that_does_not_exist_is_one_line(bucket):
    with pytest.raises(OSError, match="the run directory cannot be written, give another with --out") as raised:
        claim("gs://missing/run")
    assert "\n" not in str(raised.value)


def test_checkpoints_are_restored_and_incomplete_or_damaged_ones_are_not(bucket, caplog):
    folder = open_path(bucket)
    with contextlib.closing(Checkpoints(folder)) as run:
        assert run.recover() is None
    save(folder, 2, 4, 6)
    checkpoints = folder / "checkpoints"
    assert names(checkpoints) == ["4", "6"]
    (checkpoints / "6" / COMMIT_FILE).unlink()  # a run that was killed: the number of the folder is no proof
    assert restored(folder) == 4
    save(folder, 8)  # orbax deletes the incomplete one before it saves
    assert names(checkpoints) == ["4", "8"]
    data = max((checkpoints / "8" / "state" / "d").iterdir(), key=lambda path: path.stat().length)
    data.write_bytes(data.read_bytes()[::-1])
    with caplog.at_level(logging.WARNING, logger="pisa_jax"):
        assert restored(folder) == 4
    [report] = [message for message in caplog.messages if "is damaged" in message]
    assert "state/d/" in report
    assert "has other content than was written" in report
    assert names(checkpoints) == ["4", "damaged_8"]


def test_a_failed_save_names_the_newest_complete_checkpoint(bucket, monkeypatch):
    folder = open_path(bucket)
    save(folder, 2, 4)
    (folder / "checkpoints" / "9" / "file").write_text("incomplete")
    run = Checkpoints(folder)
    (folder / "checkpoints" / "9" / "file").write_text("incomplete")

    def fail(*_, **__):
        raise KeyError("a client's own error")

    monkeypatch.setattr(run._manager, "save", fail)
    with pytest.raises(
        OSError, match=r"\(checkpoint 4 is intact\); check the bucket and continue with --resume: .*own"
    ):
        run.save(6, tree(6), tree(6), Progress(0, {}))
    run.close()


def wait_until(condition):
    for _ in range(3000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("nothing happened for 30 seconds")


def test_event_files_and_the_history_are_uploaded(bucket, monkeypatch):
    monkeypatch.setattr(run_log, "EVENT_FILE_BYTES", 200)
    folder = open_path(bucket)
    for first, step in ((0, 7), (5, 9)):  # the second start repeats two steps
        log = run_log.RunLog(folder, batch_size=2, total=10, first=first)
        log.log(step, {"pix/l2": 0.5})
        log.log(step + 1, {"pix/l2": 0.25})
        log.close()
    files = names(folder / "tensorboard")
    assert len(files) >= 4  # none of them grows without a limit
    found = events(folder / "tensorboard")
    assert {step: found["pix/l2"][step].simple_value for step in (7, 8, 9, 10)} == {7: 0.5, 8: 0.25, 9: 0.5, 10: 0.25}
    restarts, lost = found["run/restarts"], found["run/lost_steps"]
    assert [(restarts[step].simple_value, lost[step].simple_value) for step in (7, 10)] == [(0, 0), (1, 3)]


def test_what_changes_is_copied_at_intervals_and_a_failure_is_reported_once(bucket, monkeypatch, caplog):
    mirror = Mirror(open_path(bucket), interval=0.01)
    (mirror.local / "log").write_text("one")
    wait_until(lambda: (open_path(bucket) / "log").exists())

    def refuse(*_):
        raise OSError("no network")

    with monkeypatch.context() as patch:
        patch.setattr("pisa_jax.runtime.mirror.copy_file", refuse)
        (mirror.local / "log").write_text("more")
        wait_until(lambda: caplog.messages)
    mirror.close()
    assert (open_path(bucket) / "log").read_text() == "more"
    assert caplog.messages == [f"log could not be copied to {bucket}: no network"]
    assert not mirror.local.exists()


def test_adapters_are_written_and_read(bucket, tmp_path):
    adapters = random_adapters()
    path = open_path(bucket) / "adapters.safetensors"
    with uploaded(path) as file:
        save_adapters(file, adapters)
    save_adapters(tmp_path / "adapters.safetensors", adapters)
    assert path.read_bytes() == (tmp_path / "adapters.safetensors").read_bytes()
    assert_same(load_adapters(str(path)), adapters)
    (open_path(bucket) / "no.safetensors").write_text("text")
    with pytest.raises(ValueError, match=f"{bucket}/no.safetensors"):
        load_adapters(f"{bucket}/no.safetensors")


def test_compiled_programs_are_kept_in_the_bucket(bucket):
    before = jax.config.jax_compilation_cache_dir
    compilation_cache.reset_cache()
    try:
        jax.config.update("jax_compilation_cache_dir", "chosen/by/the/user")
        use_compilation_cache(config(bucket))
        assert jax.config.jax_compilation_cache_dir == "chosen/by/the/user"
        jax.config.update("jax_compilation_cache_dir", None)
        use_compilation_cache(config(bucket))
        with jax_config.persistent_cache_min_compile_time_secs(0.0):
            jax.jit(lambda x: jnp.tan(x) @ x)(jnp.ones((3, 3)))
        cache = open_path(bucket) / "compilation_cache"
        assert any(name.endswith("-cache") for name in names(cache))
        claim(bucket)  # it is no content of another program
        delete(cache)
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
        compilation_cache.reset_cache()
