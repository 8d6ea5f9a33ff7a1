"""Matching of results, ground truths and LQ images by file name."""

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from pisa_jax.imaging.image_files import find_images

# Marks that tools append to the name of an image: _x4, x4, _LR4, _SR, _HR, _GT, _LQ; any number of them.
_TAIL = re.compile(r"([-_ ]?x\d+|[-_ ](lr|hr|sr|lq|gt)\d*)+$", re.IGNORECASE)


class EvaluationItem(NamedTuple):
    """Files of one image to evaluate; `name` is the file name of `sr`, or of `lq` where there is no `sr`."""

    name: str
    sr: Path | None
    gt: Path | None
    lq: Path | None


def bare_stem(path: Path) -> str:
    """File name without suffix and without scale and role marks: "0801x4", "0801_LR4" and "0801_SR" give "0801"."""
    return _TAIL.sub("", path.stem) or path.stem


def _match_keys(path: Path) -> tuple[str, str, str]:
    """Keys by which files are matched, in order of preference."""
    return path.name, path.stem, bare_stem(path)


def _index_by_key(files: Sequence[Path]) -> list[dict[str, list[Path]]]:
    """One table {key: files} for each of `_match_keys`."""
    index = [defaultdict(list) for _ in _match_keys(Path())]
    for path in files:
        for table, key in zip(index, _match_keys(path), strict=True):
            table[key].append(path)
    return index


def _match(path: Path, index: list[dict[str, list[Path]]]) -> Path | str:
    """The file with the first of `_match_keys` that any file has, or the reason why there is no single one."""
    for key, files in zip(_match_keys(path), index, strict=True):
        found = files.get(key, ())
        if len(found) == 1:
            return found[0]
        if found:
            return f"several files match: {', '.join(p.name for p in found)}"
    return "no file of that name"


def pair_files(sr: Path | None, gt: Path | None, lq: Path | None) -> tuple[list[EvaluationItem], dict[str, str]]:
    """Match files: (items to evaluate, {file name: reason why it is not matched}).

    The images of `sr`, or of `lq` where there is no `sr`, are looked up in the other folders: by equal file name, else
    by equal stem, else by equal `bare_stem`. Two single files always match. A ground truth without a result is a
    problem, too: a mean that silently ignores it is not comparable.
    """
    leaders = find_images(sr or lq)
    others = {name: find_images(path) for name, path in (("gt", gt), ("lq", lq if sr else None)) if path}
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
    problems |= {item.name: f"gt: {item.gt.name} matches several images" for item in items if item.name in shared}
    problems |= _unmatched(others.get("gt", []), used, problems)
    return [item for item in items if item.name not in shared], problems


def _unmatched(truths: list[Path], used: Mapping[Path, int], problems: Mapping[str, str]) -> dict[str, str]:
    """Problems of ground truths without a result, except those whose result is in `problems` already."""
    reported = {bare_stem(Path(name)) for name in problems}
    left = [p for p in truths if not used[p] and bare_stem(p) not in reported]
    return {f"{p.parent.name}/{p.name}": "no image matches this ground truth" for p in left}
