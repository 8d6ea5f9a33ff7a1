"""Counts of the files that cannot be used as they are: unreadable, or smaller than the crop."""

import logging
from collections.abc import Iterable
from typing import Literal, NamedTuple

from pisa_jax.data.sources import FileSource, MixedSource, Source
from pisa_jax.data.text_files import normalize_path

logger = logging.getLogger(__name__)

# Number of files that the message of an error names.
NAMED_FILES = 50
LOGGED_AS = {
    "small": "left out %d images that are too small so far (data.min_size_share), the latest: %s",
    "upscaled": "upscaled %d images to the crop so far, the latest: %s",
}


class Unusable(NamedTuple):
    """A file that was replaced by another ("unreadable", "small") or upscaled, and why.

    `part` is its index in `parts`.
    """

    kind: Literal["unreadable", "small", "upscaled"]
    part: int
    name: str
    reason: str


def parts(source: Source) -> tuple[Source, ...]:
    """The sources that a mixture draws from; any other source itself."""
    return (source.general, source.hq) if isinstance(source, MixedSource) else (source,)


def file_name(source: Source, index: int) -> str:
    """Name under which image `index` of a source that is no mixture is counted."""
    return normalize_path(source.names[index]) if source.names else f"record {index}"


class UnusableFiles:
    """Counter of unusable files by distinct file; a list and a second list have limits of their own.

    The files of a list that do not exist are counted when the counter is made.
    """

    def __init__(self, source: Source, max_bad_share: float):
        self._found: dict[str, dict[tuple[int, str], str]] = {"unreadable": {}, "small": {}, "upscaled": {}}
        self._limits = []
        for index, part in enumerate(parts(source)):
            stored = isinstance(part, FileSource)
            self._limits.append(max_bad_share * (part.distinct if stored else len(part)))
            if stored and (missing := part.missing()):
                logger.warning(
                    "%d listed files do not exist in %s or are no regular files, e.g. %s",
                    len(missing),
                    part.root,
                    missing[0],
                )
                for name in missing:
                    self._found["unreadable"][index, normalize_path(name)] = (
                        f"{part.root / name} does not exist or is no regular file"
                    )

    @property
    def unreadable(self) -> dict[str, str]:
        """Reasons by name of file."""
        return {name: reason for (_, name), reason in self._found["unreadable"].items()}

    @property
    def counts(self) -> dict[str, int]:
        """Number of distinct files by kind."""
        return {kind: len(files) for kind, files in self._found.items()}

    def add(self, reports: Iterable[Unusable]) -> None:
        """Count files, and log every unreadable file once and the number of the others whenever it has doubled."""
        for kind, part, name, reason in reports:
            files = self._found[kind]
            if (part, name) in files:
                continue
            files[part, name] = reason
            if kind == "unreadable":
                logger.warning("skipped unreadable image %d: %s", len(files), reason)
            elif len(files).bit_count() == 1:  # 1, 2, 4, ...
                logger.warning(LOGGED_AS[kind], len(files), reason)

    def check(self) -> None:
        """Raise OSError with the unreadable files if a list has more of them than are allowed."""
        for index, limit in enumerate(self._limits):
            reasons = sorted(reason for (part, _), reason in self._found["unreadable"].items() if part == index)
            if len(reasons) > limit:
                more = len(reasons) - NAMED_FILES
                raise OSError(
                    f"{len(reasons)} images cannot be read, at most {limit:g} are allowed; continue with a larger "
                    "data.max_bad_share, or restore the files:\n"
                    + "\n".join(reasons[:NAMED_FILES] + [f"and {more} others"] * (more > 0))
                )
