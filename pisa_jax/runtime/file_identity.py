"""Identity of files and folders as the file system judges it.

Paths do not decide it: a folder can be mounted under two names, links have names of their own, and some disks ignore
the case of names or normalize their characters.
"""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def file_id(path: str | os.PathLike) -> tuple[int, int] | None:
    """Return device and inode of a file or folder, links followed; None if there is no such file."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):  # ValueError: a null character
        return None
    return (status.st_dev, status.st_ino) if status.st_ino else None


def is_inside(path: Path, folder: Path) -> bool:
    """Return True if `path` is the existing folder `folder` or lies in it, by whatever name and mount.

    Raises:
        OSError: nothing can be written to `folder`.
    """
    real = Path(os.path.realpath(path))
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".") as mark:
        return any((parent / Path(mark.name).name).exists() for parent in (real, *real.parents))


class NameProbe:
    """Finds names that are one name, and paths that are one folder; `probe_names` makes it for a folder.

    Names are created as small files in a temporary subfolder: the file system itself decides whether two are equal,
    whether a name is allowed, and whether the folder is writable. The subfolder also shows which paths lead to the
    folder.
    """

    def __init__(self, folder: Path, scratch: Path):
        self._folder, self._scratch = folder, scratch
        self._owners: list[Any] = []

    def is_folder_of(self, path: Path) -> bool:
        """Return True if the file `path` is directly inside the folder, by whatever name and mount."""
        parents = {path.parent, Path(os.path.realpath(path)).parent}
        return any((parent / self._scratch.name).exists() for parent in parents)

    def take(self, name: str, owner: Any) -> Any:
        """Take a name for `owner` and return None, or return the owner who has already taken it.

        Raises:
            OSError: the file system does not allow the name.
        """
        file = self._scratch / name
        try:
            with open(file, "x") as record:
                record.write(str(len(self._owners)))
        except FileExistsError:
            return self._owners[int(file.read_text())]
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self._folder / name)) from None
        self._owners.append(owner)
        return None


@contextlib.contextmanager
def probe_names(folder: Path) -> Iterator[NameProbe]:
    """Yield a `NameProbe` of an existing folder; nothing of it remains afterwards.

    Raises:
        OSError: nothing can be written to the folder.
    """
    with tempfile.TemporaryDirectory(prefix=".", dir=folder, ignore_cleanup_errors=True) as scratch:
        yield NameProbe(folder, Path(scratch))
