"""Checksums of the files in a folder, in a file of the folder itself, to detect damage when the folder is read."""

import hashlib
import json
from pathlib import Path

from pisa_jax.runtime.atomic_write import atomic_write

CHECKSUMS_FILE = "checksums.json"


def write_checksums(folder: Path) -> None:
    """Write the sizes and SHA-256 sums of all files in the subfolders of `folder` to its `checksums.json`."""
    files = sorted(path for path in folder.glob("*/**/*") if path.is_file())
    found = {path.relative_to(folder).as_posix(): [path.stat().st_size, _sha256(path)] for path in files}
    with atomic_write(folder / CHECKSUMS_FILE) as file:
        file.write_text(json.dumps(found, indent=1))


def find_damage(folder: Path) -> str | None:
    """Compare the files of `folder` with its `checksums.json`; returns the first difference, or None."""
    try:
        expected = json.loads((folder / CHECKSUMS_FILE).read_text())
        for name, (size, sha256) in expected.items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != size:
                return f"{name} has {path.stat().st_size} bytes instead of {size}"
            if _sha256(path) != sha256:
                return f"{name} has other content than was written"
    except OSError as error:
        return f"it cannot be read: {error}"
    except (ValueError, TypeError, AttributeError):
        return f"{CHECKSUMS_FILE} is damaged"
    return None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
