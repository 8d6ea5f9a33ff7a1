"""Files in memory that a page loads: each has an address that nobody can guess, and lives until it is removed."""

import secrets
import threading
from typing import NamedTuple

PREFIX = "/pisa-files/"


class SharedFile(NamedTuple):
    """Content of a file; one with a name is saved by the browser, others are shown."""

    data: bytes
    media_type: str
    name: str = ""


class SharedFiles:
    """The files of all visitors by address. Only the visitor who is given the address can load the file."""

    def __init__(self) -> None:
        self._files: dict[str, SharedFile] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._files)

    def add(self, file: SharedFile) -> str:
        """Keep a file, and return its address: 128 random bits."""
        url = PREFIX + secrets.token_urlsafe(16)
        with self._lock:
            self._files[url] = file
        return url

    def get(self, url: str) -> SharedFile | None:
        """Return the file at an address."""
        return self._files.get(url)

    def remove(self, url: str) -> None:
        """Drop the file at an address."""
        with self._lock:
            self._files.pop(url, None)
