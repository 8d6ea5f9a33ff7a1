"""Checks of the output files that flags name, before a command begins its work."""

import tempfile
from collections.abc import Iterable
from pathlib import Path

from pisa_jax.runtime.file_identity import file_id


def check_output_file(flag: str, path: Path, inputs: Iterable[Path]) -> None:
    """Raise ValueError unless the file `path` of `flag` can be written and is none of the inputs."""
    if path.is_dir():
        raise ValueError(f"{flag} {path} is a folder; give the name of a file")
    folder = path.absolute().parent
    if not folder.is_dir():
        raise ValueError(f"{flag} {path}: the folder {path.parent} does not exist")
    identity = file_id(path)
    if identity and identity in map(file_id, inputs):
        raise ValueError(f"{flag} {path} is an input and would be overwritten; give another name")
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"{flag} {path} cannot be written: {error.strerror}") from None
