"""Checksums of the files in a folder, in a file of the folder itself, to detect damage when the folder is read."""

import hashlib
import json

from pisa_jax.runtime.remote_paths import AnyPath, is_bucket, object_checksums, write_text

CHECKSUMS_FILE = "checksums.json"


def write_checksums(folder: AnyPath) -> None:
    """Write the sizes and checksums of all files in the subfolders of `folder` to its `checksums.json`.

    They are SHA-256 sums on a disk, and in a bucket the CRC32C sums that the bucket computes: nothing is read back.
    """
    if is_bucket(folder):
        found = {name: entry for name, entry in object_checksums(folder).items() if "/" in name}
    else:
        files = sorted(path for path in folder.glob("*/**/*") if path.is_file())
        found = {path.relative_to(folder).as_posix(): [path.stat().st_size, _sha256(path)] for path in files}
    write_text(folder / CHECKSUMS_FILE, json.dumps(found, indent=1))


def find_damage(folder: AnyPath) -> str | None:
    """Compare the files of `folder` with its `checksums.json`; returns the first difference, or None."""
    try:
        expected = json.loads((folder / CHECKSUMS_FILE).read_text())
        stored = object_checksums(folder) if is_bucket(folder) else None
        for name, (size, checksum) in expected.items():
            found = stored.get(name) if stored is not None else _size_of(folder / name)
            if found is None:
                return f"{name} is missing"
            if found[0] != size:
                return f"{name} has {found[0]} bytes instead of {size}"
            if (found[1] if stored is not None else _sha256(folder / name)) != checksum:
                return f"{name} has other content than was written"
    except OSError as error:
        return f"it cannot be read: {error}"
    except (ValueError, TypeError, AttributeError):
        return f"{CHECKSUMS_FILE} is damaged"
    return None


def _size_of(path: AnyPath) -> list[int] | None:
    return [path.stat().st_size] if path.is_file() else None


def _sha256(path: AnyPath) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
