"""Agreement, failures and the common step to stop at: several processes are threads with a store of their own."""

import contextlib
import os
import signal
import threading
import time

import pytest

from pisa_jax.runtime import agreement, failures, key_value_store
from pisa_jax.runtime.failures import FAILED, TRY_AGAIN, Failure, FailureWatch, Refused
from pisa_jax.runtime.stop_signals import StopSignals
from pisa_jax.runtime.stop_step import StopStep


class Store:
    """The functions of `key_value_store` for processes that are threads with a number as their name."""

    def __init__(self, count):
        self.count, self.texts, self.changed = count, {}, threading.Condition()

    def put(self, key, text):
        with self.changed:
            self.texts[key] = text
            self.changed.notify_all()

    def wait_for(self, key, seconds):
        with self.changed:
            if not self.changed.wait_for(lambda: key in self.texts, min(seconds, 0.05 if key == "failed" else 20)):
                raise TimeoutError(key)
            return self.texts[key]

    def read_folder(self, folder):
        with self.changed:
            return {key.split("/")[-1]: text for key, text in self.texts.items() if key.startswith(f"{folder}/")}

    def connected(self):
        return self.count > 1

    def process_count(self):
        return self.count

    def process_index(self):
        return int(threading.current_thread().name.split()[0])


@pytest.fixture
def store(monkeypatch):
    store = Store(2)
    for name in ("put", "wait_for", "read_folder", "connected", "process_count", "process_index"):
        monkeypatch.setattr(key_value_store, name, getattr(store, name))
    # Each process counts its own calls.
    monkeypatch.setattr(agreement, "_calls", Calls())
    return store


class Calls(dict):
    """Counts by process and name."""

    def _key(self, name):
        return threading.current_thread().name, name

    def __getitem__(self, name):
        return self.get(self._key(name), 0)

    def __setitem__(self, name, value):
        super().__setitem__(self._key(name), value)


def in_each(function, count=2):
    """Call a function of the number of the process in each; returns the results or errors."""
    results = [None] * count

    def call(index):
        try:
            results[index] = function(index)
        except Exception as error:
            results[index] = error

    threads = [threading.Thread(target=call, args=(index,), name=str(index)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    return results


def test_values_are_gathered_in_order(store):
    assert (
        in_each(lambda index: [agreement.gather("a", index), agreement.gather("a", 10 * index)])
        == [[[0, 1], [0, 10]]] * 2
    )


def test_one_process_needs_no_store():
    assert agreement.gather("a", {"b": 1}) == [{"b": 1}]
    with pytest.raises(OSError, match="unreadable"), agreement.agreement():
        raise OSError("unreadable")


def test_equal_facts_are_accepted(store):
    def run(index):
        with agreement.agreement() as facts:
            facts |= {"seed": 1, "sizes": [1, 2]}
        return "ready"

    assert in_each(run) == ["ready", "ready"]


def test_a_failure_is_the_reason_in_all_processes(store):
    def run(index):
        with agreement.agreement():
            if index == 1:
                raise FileNotFoundError("photos is not a folder")

    for found in in_each(run):
        assert isinstance(found, Refused)
        assert str(found).startswith("process 1 on ")
        assert str(found).endswith(": photos is not a folder")
    assert "failed" in store.texts  # at once, for processes that are not ready yet


def test_equal_reasons_are_named_once(store):
    def run(index):
        with agreement.agreement():
            raise OSError("the server is down")

    first, second = map(str, in_each(run))
    assert first == second
    assert first.count("the server is down") == 1
    assert first.startswith("process 0 on ")
    assert ", 1 on " in first


def test_different_facts_are_named(store):
    def run(index):
        with agreement.agreement() as facts:
            facts |= {"seed": 3, "the version of jax": f"0.{index}", **({"crop": 512} if index else {})}

    for found in in_each(run):
        assert isinstance(found, Refused)
        assert str(found).startswith("process 1 on ")
        assert "the version of jax is '0.1' and in process 0 '0.0'" in str(found)
        assert "crop is 512 and in process 0 None" in str(found)
        assert "seed" not in str(found)


@pytest.fixture
def exits(monkeypatch):
    """Exit codes by process. A thread that ends its process waits forever: the program of the tests goes on."""
    codes = {}

    def leave(code):
        codes[key_value_store.process_index()] = code
        threading.Event().wait()

    monkeypatch.setattr(os, "_exit", leave)
    monkeypatch.setattr(failures, "GRACE", 0.05)
    return codes


def watch(index):
    """A watch whose thread belongs to a process."""
    found = FailureWatch("train.py")
    found._thread.name = f"{index} watch"
    return found


def wait_until(condition):
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize("failing", [0, 1])
def test_all_processes_end_with_the_reason_of_one(store, exits, capsys, failing):
    watches = [watch(index).__enter__() for index in range(2)]
    thread = threading.Thread(
        target=lambda: watches[failing].end(OSError("the disk is full")), name=str(failing), daemon=True
    )
    thread.start()
    wait_until(lambda: len(exits) == 2)
    assert exits == {0: FAILED, 1: FAILED}
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 2
    for line in errors:
        assert line.startswith(f"train.py: process {failing} on ")
        assert line.endswith(": the disk is full")


def test_a_lost_process_is_not_the_reason_of_another_failure(store):
    in_each(lambda index: failures.publish(Failure("lost", TRY_AGAIN) if index == 0 else Failure("disk full")))
    found = failures.published()
    assert found.code == FAILED
    assert found.message.startswith("process 1 on ")
    assert "lost" not in found.message


def test_stacks_are_shown_by_all(store):
    in_each(lambda index: failures.publish(Failure("no step", TRY_AGAIN, stacks=True)) if index else None)
    assert failures.published().stacks
    assert failures.published().code == TRY_AGAIN


def test_a_watch_that_is_closed_ends_nothing(store, exits):
    with contextlib.ExitStack() as closing:
        watches = [closing.enter_context(watch(index)) for index in range(2)]
    in_each(lambda index: failures.publish(Failure("late")))
    assert not any(found._thread.is_alive() for found in watches)
    assert not exits


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (OSError("full"), FAILED),
        (KeyError("bug"), FAILED),
        (ConnectionError("gone"), TRY_AGAIN),
        (TimeoutError("late"), TRY_AGAIN),
        (failures.jax.errors.JaxRuntimeError("INTERNAL: Connection closed by peer"), TRY_AGAIN),
        (failures.jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory"), FAILED),
    ],
)
def test_exit_codes(error, code):
    assert failures.failure_of(error).code == code


@pytest.mark.parametrize("signaled", [0, 1])
def test_all_processes_stop_after_the_same_step(store, signaled):
    """Process 1 is two steps behind; process 0 may not wait for it, since steps need both."""
    signals = [StopSignals(), StopSignals()]
    steps = [StopStep(found) for found in signals]
    for index, step in enumerate(steps):
        step._thread.name = f"{index} stop"
        step.__enter__()
    assert not steps[0].reached(7)
    assert not steps[1].reached(5)
    signals[signaled].received = signal.SIGTERM
    wait_until(lambda: all(step._last is not None for step in steps))
    assert [[step.reached(number) for number in (6, 7, 8)] for step in steps] == [[False, False, True]] * 2
    assert [step.number for step in steps] == [signal.SIGTERM] * 2
    assert not any(step.at_once for step in steps)
    for step in steps:
        step.__exit__(None, None, None)


def test_one_process_stops_after_its_step():
    signals = StopSignals()
    with StopStep(signals) as step:
        assert not step.reached(1)
        assert not step.at_once
        signals.received = signal.SIGINT
        assert step.reached(2)
        assert step.at_once
        assert step.number == signal.SIGINT
    assert not StopStep(None).reached(3)
