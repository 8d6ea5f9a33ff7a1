"""Traces of steps: chosen ones, and those after SIGUSR1."""

import os
import signal

import jax
import jax.numpy as jnp
import pytest

from pisa_jax.config import Config, Stage
from pisa_jax.runtime import profiling
from pisa_jax.runtime.remote_paths import open_path


@pytest.fixture
def steps(monkeypatch):
    """Steps between the start and the end of each trace, in place of JAX's profiler."""
    found = []

    def start(folder):
        assert os.path.isdir(folder)
        found.append([])

    monkeypatch.setattr(jax.profiler, "start_trace", start)
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: found[-1].append("end"))
    return found


def run(profiler, steps, found):
    for step in steps:
        profiler.before(step)
        if found and found[-1][-1:] != ["end"]:
            found[-1].append(step)
        profiler.after(step, ())


def test_chosen_steps_are_traced(tmp_path, steps):
    with profiling.Profiler(tmp_path, "3:5") as profiler:
        run(profiler, range(1, 9), steps)
    assert steps == [[3, 4, 5, "end"]]


def test_a_run_that_is_resumed_inside_traces_the_rest_and_one_that_ends_inside_is_closed(tmp_path, steps):
    with profiling.Profiler(tmp_path, "3:5") as profiler:
        run(profiler, range(4, 9), steps)
    with profiling.Profiler(tmp_path, "3:5") as profiler:
        run(profiler, range(1, 5), steps)
    assert steps == [[4, 5, "end"], [3, 4, "end"]]


def test_a_signal_traces_the_next_steps(tmp_path, steps):
    before = signal.getsignal(signal.SIGUSR1)
    with profiling.Profiler(tmp_path) as profiler:
        run(profiler, range(1, 4), steps)
        assert steps == []
        signal.raise_signal(signal.SIGUSR1)
        run(profiler, range(4, 20), steps)
        signal.raise_signal(signal.SIGUSR1)
        run(profiler, range(20, 40), steps)
    assert steps == [[*range(4, 4 + profiling.SIGNAL_STEPS), "end"], [*range(20, 20 + profiling.SIGNAL_STEPS), "end"]]
    assert signal.getsignal(signal.SIGUSR1) == before


def test_a_trace_that_cannot_start_does_not_stop_the_run(tmp_path, monkeypatch, caplog):
    def refuse(folder):
        raise RuntimeError("Profile has already been started.\nOnly one")

    monkeypatch.setattr(jax.profiler, "start_trace", refuse)
    with profiling.Profiler(tmp_path, "2:9") as profiler:
        for step in range(1, 10):
            profiler.before(step)
            profiler.after(step, ())
    assert caplog.messages == ["step 2 cannot be traced: Profile has already been started. Only one"]


def test_a_trace_is_written_for_xprof_also_to_a_bucket(tmp_path, bucket):
    for folder in (tmp_path, open_path(bucket)):
        with profiling.Profiler(folder, "1:1") as profiler:
            profiler.before(1)
            profiler.after(1, jnp.ones(3) + 1)
        (time,) = (folder / "plugins" / "profile").iterdir()
        assert any(path.name.endswith(".xplane.pb") for path in time.iterdir())


@pytest.mark.parametrize("steps", ["5", "5:3", "0:3", "a:b", "-1:3", "3:", "1:2:3"])
def test_wrong_steps_are_refused(steps):
    with pytest.raises(ValueError, match="give the first and the last step, such as 10:12"):
        Config(out="run", stages=(Stage("pix", steps=4),), profile_steps=steps)
