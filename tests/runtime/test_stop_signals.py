"""The first signal is recorded, also while the main thread is busy; the second one ends the program."""

import os
import signal
import subprocess
import sys
import time

import pytest

from pisa_jax.runtime.stop_signals import StopSignals

# The main thread is in C code for minutes, as when it compiles: Python calls no signal handler there.
BUSY = """
import hashlib
from pisa_jax.runtime.stop_signals import StopSignals
with StopSignals() as stop:
    print("ready", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"password", b"salt", 10**9)
"""

pytestmark = pytest.mark.usefixtures("interruptible")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_recorded(number):
    with StopSignals() as stop:
        assert stop.received is None
        os.kill(os.getpid(), number)
        end = time.monotonic() + 10
        while stop.received is None and time.monotonic() < end:
            time.sleep(0.01)
        assert stop.received == number
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.set_wakeup_fd(-1) == -1


def test_an_ignored_signal_remains_ignored():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with StopSignals() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        end = time.monotonic() + 10
        while stop.received is None and time.monotonic() < end:
            time.sleep(0.01)
        assert stop.received == signal.SIGTERM
    assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_second_ends_the_program_at_once(number):
    with subprocess.Popen(
        [sys.executable, "-c", BUSY], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "ready\n"
        start = time.monotonic()
        process.send_signal(number)
        assert process.stderr.readline() == "\n"
        assert process.stderr.readline().startswith(f"{number.name}: the run stops after this step and is saved")
        process.send_signal(number)
        errors = process.stderr.read()
        assert process.wait(10) == 128 + number
        assert time.monotonic() - start < 10
    assert "a second signal ends the program at once; the last checkpoint is intact" in errors
