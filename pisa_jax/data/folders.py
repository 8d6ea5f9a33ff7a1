"""Image files of a folder and its subfolders."""

import logging
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from pisa_jax.imaging.image_files import IMAGE_SUFFIXES

logger = logging.getLogger(__name__)

# Number of kinds of ignored entries that a report names.
REPORTED_KINDS = 8


class Listing(NamedTuple):
    """The image files below a folder as sorted relative names with "/", and the number of ignored entries by kind."""

    names: tuple[str, ...]
    ignored: Mapping[str, int]


def list_tree(folder: str | os.PathLike) -> Listing:
    """List the image files in `folder` and its subfolders.

    Hidden files and folders are ignored, and so are pipes, devices and broken links. Links to folders are followed;
    a folder that is reached several times, such as through a link to a parent folder, is listed once, under its own
    name rather than that of a link. Names that are not valid text keep their bytes (`os.fsdecode`).

    Raises:
        OSError: `folder` cannot be listed. Subfolders that cannot be listed are counted as ignored.
    """
    root, names, ignored = os.fspath(folder), [], Counter()
    listed, waiting = set(), {"folder": [""], "link": []}
    while waiting["folder"] or waiting["link"]:
        # Links come after all real folders, and entries in an order that does not depend on the file system.
        relative = (waiting["folder"] or waiting["link"]).pop()
        try:
            status = os.stat(os.path.join(root, relative))
            if (status.st_dev, status.st_ino) in listed:
                ignored["folders that are listed under another name"] += 1
                continue
            listed.add((status.st_dev, status.st_ino))
            with os.scandir(os.path.join(root, relative)) as entries:
                found = [(f"{relative}/{entry.name}" if relative else entry.name, _kind(entry)) for entry in entries]
        except OSError:
            if not relative:
                raise
            ignored["folders that cannot be read"] += 1
            continue
        for name, kind in sorted(found, reverse=True):
            if kind == "image":
                names.append(name)
            elif kind in waiting:
                waiting[kind].append(name)
            else:
                ignored[kind] += 1
    return Listing(tuple(sorted(names)), ignored)


def _kind(entry: os.DirEntry) -> str:
    """Classify an entry as "image", "folder", "link" (to a folder) or the kind under which it is ignored."""
    suffix = os.path.splitext(entry.name)[1].lower()
    if entry.name.startswith("."):
        return "hidden"
    try:
        if entry.is_dir():
            return "link" if entry.is_symlink() else "folder"
        if entry.is_file():
            return "image" if suffix in IMAGE_SUFFIXES else suffix or "without suffix"
    except OSError:  # a link to itself
        return "broken links"
    return "broken links" if entry.is_symlink() else "pipes or devices"


def image_names(folder: str | os.PathLike) -> tuple[str, ...]:
    """List the images of `folder` and its subfolders as sorted relative names, and log one line about them.

    The line has the number of images and of ignored entries by kind. Raises ValueError if there are no images.
    """
    if not Path(folder).is_dir():
        raise ValueError(f"{folder} is not a folder")
    names, ignored = list_tree(folder)
    if not names:
        found = f" ({_counts(ignored)} ignored)" if ignored else ""
        raise ValueError(
            f"no images in {folder} or its subfolders{found}; suffixes of images: {' '.join(IMAGE_SUFFIXES)}"
        )
    taken = Counter(os.path.splitext(name)[1].lower() for name in names)
    report = f"{folder}: {len(names)} images ({_counts(taken)})"
    if ignored:
        logger.warning("%s; ignored: %s", report, _counts(ignored))
    else:
        logger.info("%s", report)
    return names


def _counts(kinds: Mapping[str, int]) -> str:
    ordered = sorted(kinds.items(), key=lambda item: (-item[1], item[0]))
    parts = [f"{count} {kind}" for kind, count in ordered[:REPORTED_KINDS]]
    others = sum(count for _, count in ordered[REPORTED_KINDS:])
    return ", ".join(parts + [f"{others} of other kinds"] * bool(others))
