"""Checks of keys and lists, with messages that show the differences."""

from collections.abc import Collection, Iterable, Sequence
from typing import Any

from pisa_jax.runtime.messages import excerpt
from pisa_jax.runtime.trees import suggest


def check_keys(header: str, expected: Collection[str], found: Collection[str]) -> None:
    """Raise ValueError, with the differences, unless two collections hold the same keys."""
    missing = sorted(set(expected) - set(found))
    unexpected = sorted(set(found) - set(expected))
    problems = [f"missing {shorten(missing)}"] if missing else []
    if unexpected:
        problems.append(f"unexpected {shorten(unexpected)}{suggest(unexpected[0], missing or expected)}")
    if problems:
        raise ValueError(f"{header}: expected {len(expected)}, found {len(found)}: {'; '.join(problems)}")


def check_empty(header: str, problems: Sequence[str]) -> None:
    """Raise ValueError with `header` and the first problems, if there are any."""
    if problems:
        raise ValueError(f"{header}: {shorten(problems, '; ', length=200)}")


def shorten(names: Iterable[Any], separator: str = ", ", limit: int = 4, length: int = 120) -> str:
    """Join the first `limit` names, cut to `length` since they may come from a damaged file, and count the rest.

    >>> shorten("abcdef")
    'a, b, c, d and 2 more'
    """
    names = list(names)
    return separator.join(excerpt(name, length) for name in names[:limit]) + (
        f" and {len(names) - limit} more" if len(names) > limit else ""
    )
