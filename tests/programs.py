"""Programs in their own processes, alone or several that are connected; all are killed if they hang."""

import contextlib
import os
import socket
import subprocess
import sys
import threading

import jax
import pytest

LONGEST_WAIT = 300  # seconds; what takes longer hangs


class Program(subprocess.Popen):
    """A Python program and its arguments. Both pipes are read, otherwise it would block."""

    def __init__(self, *command, cwd=None, **environment):
        named = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        if precision := jax.config.jax_default_matmul_precision:  # tiny.py sets it
            named["JAX_DEFAULT_MATMUL_PRECISION"] = precision
        super().__init__(
            [sys.executable, *map(str, command)],
            env={**os.environ, "JAX_PLATFORMS": "cpu", **named, **environment},
            cwd=cwd,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._watchdog, self._errors = threading.Timer(LONGEST_WAIT, self.kill), []
        self._reader = threading.Thread(target=lambda: self._errors.extend(self.stderr))
        self._watchdog.start()
        self._reader.start()

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


def ended(process, code=0):
    """Wait for the end of a process and check its exit code; returns its error output."""
    errors = process.end()
    assert process.returncode == code, errors
    assert "Traceback" not in errors
    return errors


def connection(devices=2):
    """Return the environment of two connected processes with some devices each, without their numbers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    flags = os.environ["XLA_FLAGS"].replace("count=8", f"count={devices}")
    return {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2", "XLA_FLAGS": flags}


@contextlib.contextmanager
def started(processes):
    """Kill processes at the end of the body in any case."""
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.end()
