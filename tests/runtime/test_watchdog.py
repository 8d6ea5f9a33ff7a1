"""The watchdog expires once a beat is overdue, and never while nothing is expected."""

import threading
import time

from pisa_jax.runtime.watchdog import Watchdog

SHORT = 0.1 / 60


def test_it_expires_after_the_last_beat():
    expired = threading.Event()
    with Watchdog(SHORT, expired.set) as watchdog:
        assert not expired.wait(0.3)  # before the first beat
        watchdog.beat()
        start = time.monotonic()
        assert expired.wait(30)
        assert time.monotonic() - start >= 0.1 - 0.01


def test_beats_and_pauses_delay_it():
    expired = threading.Event()
    with Watchdog(10 / 60, expired.set) as watchdog:
        watchdog.beat()
        due = watchdog._due
        watchdog.beat()
        assert watchdog._due >= due
        with watchdog.paused():
            assert watchdog._due is None
        assert watchdog._due >= due
    assert not expired.is_set()


def test_nothing_expires_while_it_is_paused():
    expired = threading.Event()
    with Watchdog(SHORT, expired.set) as watchdog, watchdog.paused():
        assert not expired.wait(0.3)


def test_zero_minutes_switch_it_off():
    expired = threading.Event()
    with Watchdog(0, expired.set) as watchdog:
        watchdog.beat()
        assert not expired.wait(0.2)
