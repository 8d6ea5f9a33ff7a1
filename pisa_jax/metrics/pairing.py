"""Which result belongs to which ground truth: pictures of two or three folders, matched by name."""

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from pisa_jax.imaging.image_io import READABLE

# What tools append to a picture's name: _x4, x4, _LR4, _SR, _HR, _GT, _LQ; any number of them.
_TAIL = re.compile(r"([-_ ]?x\d+|[-_ ](lr|hr|sr|lq|gt)\d*)+$", re.IGNORECASE)


class EvaluationItem(NamedTuple):
    """The files of one picture; `name` is the file name of the first that is given of sr, lq."""

    name: str
    sr: Path | None
    gt: Path | None
    lq: Path | None


def list_pictures(path: Path) -> list[Path]:
    """The picture files directly inside a folder, sorted, or the one file. OSError if there is none."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise FileNotFoundError(f"{path} is neither a folder nor a file")
    endings = {ending for ending, kind in Image.registered_extensions().items() if kind in READABLE}
    found = sorted(p for p in path.iterdir() if p.suffix.lower() in endings and p.is_file())
    if not found:
        raise FileNotFoundError(f"no pictures in {path}")
    return found


def bare_stem(path: Path) -> str:
    """File name without ending and without scale and role marks: "0801x4", "0801_LR4" and "0801_SR" give "0801"."""
    return _TAIL.sub("", path.stem) or path.stem


def _match_keys(path: Path) -> tuple[str, str, str]:
    """What files are matched by, one after the other."""
    return path.name, path.stem, bare_stem(path)


def _index_by_key(files: Sequence[Path]) -> list[dict[str, list[Path]]]:
    """The files by each of `_match_keys`."""
    index = [defaultdict(list) for _ in _match_keys(Path())]
    for path in files:
        for known, key in zip(index, _match_keys(path), strict=True):
            known[key].append(path)
    return index


def _match(path: Path, index: list[dict[str, list[Path]]]) -> Path | str:
    """The one file that shares the first of `_match_keys` that any file shares; else what is wrong."""
    for key, files in zip(_match_keys(path), index, strict=True):
        found = files.get(key, ())
        if len(found) == 1:
            return found[0]
        if found:
            return f"several files match: {', '.join(p.name for p in found)}"
    return "no file of that name"


def pair_files(sr: Path | None, gt: Path | None, lq: Path | None) -> tuple[list[EvaluationItem], dict[str, str]]:
    """Items to measure and, by file name, what could not be paired.

    The pictures of `sr`, or of `lq` without it, are looked up in the other folders: by equal file name, else by equal
    stem, else by equal `bare_stem`. Two single files always belong together. A ground truth that nothing belongs to is
    reported too: the average would silently leave it out.
    """
    leaders = list_pictures(sr or lq)
    others = {name: list_pictures(path) for name, path in (("gt", gt), ("lq", lq if sr else None)) if path}
    indices = {name: _index_by_key(files) for name, files in others.items()}
    two_files = {name: path.is_file() and (sr or lq).is_file() for name, path in (("gt", gt), ("lq", lq)) if path}
    items, problems = [], {}
    for path in leaders:
        matches = {n: others[n][0] if two_files[n] else _match(path, index) for n, index in indices.items()}
        wrong = [f"{name}: {match}" for name, match in matches.items() if isinstance(match, str)]
        if wrong:
            problems[path.name] = "; ".join(wrong)
            continue
        items.append(
            EvaluationItem(path.name, path if sr else None, matches.get("gt"), matches.get("lq", path if lq else None))
        )
    used = Counter(item.gt for item in items if item.gt)
    shared = {item.name for item in items if item.gt and used[item.gt] > 1}
    problems |= {item.name: f"gt: {item.gt.name} belongs to several pictures" for item in items if item.name in shared}
    problems |= _unmatched(others.get("gt", []), used, problems)
    return [item for item in items if item.name not in shared], problems


def _unmatched(truths: list[Path], used: Mapping[Path, int], problems: Mapping[str, str]) -> dict[str, str]:
    """Ground truths without a picture, less those whose picture was reported already."""
    reported = {bare_stem(Path(name)) for name in problems}
    left = [p for p in truths if not used[p] and bare_stem(p) not in reported]
    return {f"{p.parent.name}/{p.name}": "no picture belongs to this ground truth" for p in left}
