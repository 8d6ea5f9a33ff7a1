"""Digest of the contents of many files, fast enough to be computed at every start of a run."""

import hashlib
import os
import stat
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np

# At most this many files are opened, and at least this many blocks are read of them altogether.
SAMPLED_FILES = 4096
SAMPLED_BLOCKS = 8192
BLOCK_BYTES = 4096
# On network disks the time of a call is latency; more threads than cores hide it.
THREADS = 16
# Files per task: a task of a thread pool costs more than a call of `stat`.
CHUNK = 512

T = TypeVar("T")


def file_sizes(paths: Sequence[str]) -> list[int]:
    """Sizes of files in bytes; -1 for what does not exist or is no regular file."""
    return _in_threads(_size, paths)


def digest_files(paths: Sequence[str], sizes: Sequence[int]) -> str:
    """Digest of files that changes when a file is replaced; `sizes` are from `file_sizes`.

    It covers the size of every file, and bytes of up to `SAMPLED_FILES` files at even distances in the list: all bytes
    if these files are small, else `SAMPLED_BLOCKS` blocks or more altogether, at even distances in each file, with its
    first and its last one. A compressed image that is replaced nearly always changes its size, and in a set of up to
    `SAMPLED_FILES` files also sampled bytes. In a larger set, another file of the same size may go unnoticed. A digest
    of all bytes would read the whole set at every start. Modification times are not used: copying a set changes them.
    """
    step = -(-len(paths) // SAMPLED_FILES) or 1
    sampled = [(path, size) for path, size in zip(paths[::step], sizes[::step], strict=True) if size > 0]
    blocks = max(2, SAMPLED_BLOCKS // max(1, len(sampled)))
    digest = hashlib.sha256(np.asarray(sizes, np.int64).tobytes())
    for part in _in_threads(lambda file: _sample(*file, blocks), sampled):
        digest.update(part)
    return digest.hexdigest()[:16]


def _size(path: str) -> int:
    try:
        status = os.stat(path)
    except (OSError, ValueError):  # ValueError: a name that no file can have
        return -1
    return status.st_size if stat.S_ISREG(status.st_mode) else -1


def _sample(path: str, size: int, blocks: int) -> bytes:
    """Digest of a whole file of up to `blocks` blocks, or of `blocks` blocks of a larger one."""
    digest = hashlib.sha256()
    try:
        with open(path, "rb", buffering=0) as file:
            if size <= blocks * BLOCK_BYTES:
                digest.update(file.read(size))
            else:
                for index in range(blocks):
                    file.seek(index * (size - BLOCK_BYTES) // (blocks - 1))
                    digest.update(file.read(BLOCK_BYTES))
    except OSError:  # counted as unreadable when the image is drawn
        return b"unreadable"
    return digest.digest()


def _in_threads(function: Callable[..., T], items: Sequence) -> list[T]:
    chunks = [items[start : start + CHUNK] for start in range(0, len(items), CHUNK)]
    with ThreadPoolExecutor(THREADS) as threads:
        return [result for results in threads.map(lambda chunk: [*map(function, chunk)], chunks) for result in results]
