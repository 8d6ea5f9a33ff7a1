"""The lock of a run directory: a lock of the file system, or a mark in a bucket, which has no locks."""

import contextlib
import fcntl
import logging
import os
import socket
import uuid
from collections.abc import Iterator

from pisa_jax.runtime.remote_paths import AnyPath, bucket_errors, is_bucket

logger = logging.getLogger(__name__)

LOCK_FILE = ".lock"
# Tells two programs apart that have one process number and one host name, as in restarted containers.
_PROGRAM = uuid.uuid4().hex[:8]


@contextlib.contextmanager
def write_errors(folder: AnyPath) -> Iterator[None]:
    """Add to the errors of a disk or bucket that a run directory is the one that cannot be written."""
    try:
        with bucket_errors(folder):
            yield
    except OSError as error:
        raise OSError(f"the run directory cannot be written, give another with --out: {error}") from error


def check_lock(folder: AnyPath) -> None:
    """Raise OSError if another program holds the lock of a local run directory."""
    if not is_bucket(folder) and (folder / LOCK_FILE).exists():
        with _file_lock(folder):
            pass


def lock(folder: AnyPath) -> contextlib.AbstractContextManager[None]:
    """Hold a run directory: on a disk until the process ends in any way, in a bucket until another program starts.

    Raises:
        OSError: another program holds the lock (on a disk), or it cannot be written.
    """
    return _mark(folder) if is_bucket(folder) else _file_lock(folder)


def require_lock(folder: AnyPath) -> None:
    """Raise OSError if another program has started on this run directory in a bucket; nothing to do on a disk."""
    if is_bucket(folder):
        mark = folder / LOCK_FILE
        holder = mark.read_text() if mark.exists() else "another program"
        if holder != _describe(folder):
            raise OSError(
                f"{folder} was taken over by {holder}, which was started later; this program ends without saving"
            )


def _describe(folder: AnyPath) -> str:
    text = f"process {os.getpid()} on {socket.gethostname()}"
    return f"{text} ({_PROGRAM})" if is_bucket(folder) else text


@contextlib.contextmanager
def _file_lock(folder: AnyPath) -> Iterator[None]:
    with write_errors(folder):
        file = (folder / LOCK_FILE).open("a+")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise OSError(
                f"{folder} is in use by {file.read() or 'another program'}; wait until it ends, or give another "
                "directory with --out"
            ) from None
        except OSError as error:
            logger.warning("%s cannot be locked (%s): start no second program on it", folder, error)
        with contextlib.suppress(OSError):  # a full disk; the text serves only the message above
            file.truncate(0)
            file.write(_describe(folder))
            file.flush()
        yield


@contextlib.contextmanager
def _mark(folder: AnyPath) -> Iterator[None]:
    """Mark a run directory in a bucket as ours.

    A program that was killed leaves its mark, so a mark is no reason to refuse: the program that started last goes on,
    and an earlier one that still runs finds the mark changed when it would save (`require_lock`).
    """
    mark = folder / LOCK_FILE
    if mark.exists():
        logger.warning(
            "%s was last used by %s, which did not end by itself; if it still runs, it ends at its next checkpoint",
            folder,
            mark.read_text(),
        )
    with write_errors(folder):
        mark.write_text(_describe(folder))
    try:
        yield
    finally:
        with contextlib.suppress(Exception):  # the bucket cannot be reached any more: the mark remains
            require_lock(folder)
            mark.unlink()
