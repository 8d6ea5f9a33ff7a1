"""Parameter trees keyed by path, such as "down_blocks_0/resnets_0/conv1/kernel"; selection and comparison."""

import difflib
import re
from collections.abc import Iterable, Mapping
from typing import Any

SEPARATOR = "/"


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Convert nested dicts to one dict keyed by path.

    >>> flatten({"conv_in": {"kernel": 1, "bias": 2}})
    {'conv_in/kernel': 1, 'conv_in/bias': 2}
    """
    flat = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}{SEPARATOR}")
        else:
            flat[prefix + name] = value
    return flat


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Inverse of `flatten`.

    >>> unflatten({"conv_in/kernel": 1, "conv_in/bias": 2})
    {'conv_in': {'kernel': 1, 'bias': 2}}
    """
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *parents, name = path.split(SEPARATOR)
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = value
    return tree


def select(paths: Iterable[str], pattern: str) -> list[str]:
    """Return the paths that contain a match of the regular expression `pattern`, in order.

    Raises:
        ValueError: no path matches; the message shows the first paths.
    """
    paths = list(paths)
    found = [path for path in paths if re.search(pattern, path)]
    if not found:
        raise ValueError(f"the pattern {pattern!r} matches none of {len(paths)} paths, such as {', '.join(paths[:3])}")
    return found


def suggest(name: str, allowed: Iterable[str]) -> str:
    """Return "; did you mean 'x'?" for the allowed name closest to `name`, or "" if none is close."""
    # The time of a comparison grows with the square of the length, and names may come from a damaged file.
    close = difflib.get_close_matches(name, list(allowed), n=1) if len(name) < 200 else []
    return f"; did you mean {close[0]!r}?" if close else ""


def shape_diff(expected: Mapping[str, tuple], found: Mapping[str, tuple], limit: int = 8) -> str:
    """List the differences of two path -> shape maps, one per line, at most `limit`; "" if there are none."""
    lines = [f"missing     {path} {shape}" for path, shape in expected.items() if path not in found]
    lines += [
        f"unexpected  {path} {shape}{suggest(path, expected)}" for path, shape in found.items() if path not in expected
    ]
    lines += [
        f"wrong shape {path} {found[path]}, expected {shape}"
        for path, shape in expected.items()
        if path in found and tuple(found[path]) != tuple(shape)
    ]
    if len(lines) > limit:
        lines = [*lines[:limit], f"... and {len(lines) - limit} more"]
    return "\n".join(lines)
