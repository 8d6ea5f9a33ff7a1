"""Checks of the output files that flags name, before a command begins its work."""

import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

from pisa_jax.runtime.file_identity import file_id


def check_output_files(outputs: Mapping[str, Path], inputs: Iterable[Path]) -> None:
    """Raise ValueError unless the files {flag: path} can be written, are different, and are none of the inputs."""
    protected = {file_id(path) for path in inputs}
    flags: dict[Path, str] = {}
    for flag, path in outputs.items():
        if path.is_dir():
            raise ValueError(f"{flag} {path} is a folder; give the name of a file")
        folder = path.absolute().parent
        if not folder.is_dir():
            raise ValueError(f"{flag} {path}: the folder {path.parent} does not exist")
        if (identity := file_id(path)) and identity in protected:
            raise ValueError(f"{flag} {path} is an input and would be overwritten; give another name")
        if (other := flags.setdefault(path.resolve(), flag)) != flag:
            raise ValueError(f"{other} and {flag} are both {path}; give each a name of its own")
        try:
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            raise ValueError(f"{flag} {path} cannot be written: {error.strerror}") from None
