"""Files in Google Cloud Storage buckets (gs://BUCKET/FOLDER) beside local ones, through `etils.epath` and gcsfs."""

import contextlib
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import fsspec
from etils import epath

from pisa_jax.runtime.atomic_write import atomic_write
from pisa_jax.runtime.messages import error_text

BUCKET_PREFIX = "gs://"
# A path on a disk or in a bucket.
AnyPath = Path | epath.Path


def is_bucket(path: str | os.PathLike) -> bool:
    """Return True for paths in a bucket."""
    return os.fspath(path).startswith(BUCKET_PREFIX)


def open_path(path: str | os.PathLike) -> AnyPath:
    """Return a local path, or one in a bucket, which has the same methods.

    Raises:
        OSError: the path is in a bucket, and gcsfs is not installed.
    """
    if not is_bucket(path):
        return Path(path)
    if importlib.util.find_spec("gcsfs") is None:
        raise OSError(f"{os.fspath(path)} is in a bucket, which needs gcsfs: pip install 'pisa_jax[gcp]'")
    # Without this, a process never sees the files that others write into a folder that it has listed before.
    for protocol in ("gs", "gcs"):
        fsspec.config.conf.setdefault(protocol, {})["use_listings_cache"] = False
    return epath.Path(path)


def absolute(path: AnyPath) -> AnyPath:
    """Return the absolute path; paths in a bucket are absolute."""
    return path if is_bucket(path) else path.absolute()


@contextlib.contextmanager
def bucket_errors(path: str | os.PathLike) -> Iterator[None]:
    """Convert the errors of the storage client, which have many types, to OSErrors that name the path."""
    try:
        yield
    except (OSError, ValueError):
        raise
    except Exception as error:
        if not is_bucket(path):
            raise
        raise OSError(f"{os.fspath(path)} cannot be used: {error_text(error)[:300]}") from error


def write_text(path: AnyPath, text: str) -> None:
    """Write a text file as a whole: a bucket shows an object only when it is complete."""
    if is_bucket(path):
        path.write_text(text)
        return
    with atomic_write(path) as file:
        file.write_text(text)


def delete(path: AnyPath) -> None:
    """Delete a file, or a folder with its content."""
    if is_bucket(path):
        epath.Path(path).rmtree()
    elif path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def rename(path: AnyPath, target: AnyPath) -> None:
    """Rename a folder and replace one of the new name; in a bucket its objects are copied and deleted."""
    if target.exists():
        delete(target)
    if is_bucket(path):
        system, source = _file_system(path)
        system.copy(source, _file_system(target)[1], recursive=True)
        delete(path)
    else:
        path.rename(target)


def copy_file(source: AnyPath, target: AnyPath) -> None:
    """Copy a file between a disk and a bucket; replaces `target`."""
    with bucket_errors(target if is_bucket(target) else source):
        epath.Path(source).copy(target, overwrite=True)


def copy_folder(source: AnyPath, target: AnyPath) -> None:
    """Copy the files of a folder and its subfolders between a disk and a bucket."""
    for child in source.iterdir():
        if child.is_dir():
            copy_folder(child, target / child.name)
        else:
            target.mkdir(parents=True, exist_ok=True)
            copy_file(child, target / child.name)


@contextlib.contextmanager
def local_copy(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a local file with the content of `path`: itself, or a temporary copy of a file in a bucket.

    Raises:
        OSError: the file cannot be read. Errors of the block that name the copy name the file in the bucket instead.
    """
    if not is_bucket(path):
        yield Path(path)
        return
    source = open_path(path)
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / source.name
        try:
            copy_file(source, copy)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{source} does not exist") from error
        try:
            yield copy
        except (OSError, ValueError) as error:
            kind = OSError if isinstance(error, OSError) else ValueError
            raise kind(str(error).replace(str(copy), str(source))) from error


@contextlib.contextmanager
def uploaded(path: AnyPath) -> Iterator[Path]:
    """Yield the local file to write for `path`: itself, or a temporary file that is uploaded if the block succeeds."""
    if not is_bucket(path):
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        local = Path(folder) / path.name
        yield local
        copy_file(local, path)


def _file_system(path: AnyPath) -> tuple[fsspec.AbstractFileSystem, str]:
    """Return the client of a bucket, the same as that of `etils.epath`, and the path without its scheme."""
    return fsspec.core.url_to_fs(os.fspath(path), finalize_on_close=True)


def object_checksums(folder: AnyPath) -> dict[str, list]:
    """Return size and CRC32C of the objects below a folder of a bucket, by name; the bucket keeps these sums."""
    system, root = _file_system(folder)
    found = system.find(root, detail=True)
    return {name.removeprefix(f"{root}/"): [info["size"], info["crc32c"]] for name, info in found.items()}
