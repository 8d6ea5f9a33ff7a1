"""Buckets: the few sizes of arrays in which images of all sizes are computed, so that few programs are compiled.

An image is padded to a bucket that covers it; `sd.padding` removes every effect of the padding. The sides of buckets
are on a grid. Images whose sizes are known beforehand share fewer buckets than the grid has. Sizes are (height, width)
in latents.
"""

import itertools
from collections.abc import Callable, Iterable, Sequence

Size = tuple[int, int]

MODES = ("exact", "off")
# The step of the grid is an eighth of the side or less, so padding is less than an eighth of a side.
STEPS = 8
# Without a plan, an image uses a bucket that is in use if this has at most so many times the area of its own.
MOST_AREA = 1.3


def check_mode(mode: str) -> None:
    """Raise ValueError unless `mode` is one of MODES."""
    if mode not in MODES:
        raise ValueError(f"buckets is {mode!r}; use one of {', '.join(map(repr, MODES))}")


def grid_side(side: int) -> int:
    """Return the smallest multiple of a power of two that is at least `side`, with a step of at most an eighth of it.

    >>> [grid_side(side) for side in (1, 16, 17, 33, 65, 128, 129)]
    [1, 16, 18, 36, 72, 128, 144]
    """
    step = 1
    while 2 * STEPS * step < side:
        step *= 2
    return -(-side // step) * step


def grid_size(size: Size) -> Size:
    """Return the bucket of the grid for a size."""
    return grid_side(size[0]), grid_side(size[1])


def covering(sizes: Iterable[Size]) -> Size:
    """Return the smallest size that covers all sizes."""
    heights, widths = zip(*sizes, strict=True)
    return max(heights), max(widths)


def choose_buckets(
    sizes: Sequence[Size],
    cost_of: Callable[[Sequence[Size]], int],
    most: int,
    saved: float,
    known: Sequence[Size] = (),
) -> list[Size]:
    """Choose buckets for images of the given sizes.

    Starting from the grid, the two buckets whose union adds the least area are joined, until all buckets together cost
    at most `most` and no union adds less than `saved`. Then every bucket gives way to known ones that cover its images,
    unless these add more than `saved`.

    Args:
        cost_of: sizes of the images of one bucket -> its cost, such as the number of its programs.
        saved: area whose computation takes as long as the compilation that one bucket less saves.
        known: buckets that have been compiled before.
    """
    groups: dict[Size, list[Size]] = {}
    for size in sizes:
        groups.setdefault(grid_size(size), []).append(size)

    def added(pair):
        union = covering(pair)
        return sum((_area(union) - _area(bucket)) * len(groups[bucket]) for bucket in pair)

    while len(groups) > 1:
        pair = min(itertools.combinations(groups, 2), key=added)
        if sum(map(cost_of, groups.values())) <= most and added(pair) >= saved:
            break
        members = groups.pop(pair[0]) + groups.pop(pair[1])
        groups.setdefault(covering(pair), []).extend(members)
    replaced = (_known_instead(bucket, members, known, saved) for bucket, members in groups.items())
    return list(dict.fromkeys(itertools.chain.from_iterable(replaced)))


def _known_instead(bucket: Size, members: Sequence[Size], known: Sequence[Size], saved: float) -> list[Size]:
    """Return known buckets for images of one bucket, or this bucket where that takes longer than its compilation."""
    fitting = [[each for each in known if _covers(each, size)] for size in members]
    if bucket in known or not all(fitting):
        return [bucket]
    smallest = [min(each, key=_area) for each in fitting]
    return smallest if sum(map(_area, smallest)) - len(members) * _area(bucket) < saved else [bucket]


class Buckets:
    """The buckets in use. The result for an image is the same in each, up to rounding.

    `known` are those whose programs have been compiled by earlier runs.
    """

    def __init__(self):
        self.used: list[Size] = []
        self.planned: list[Size] = []
        self.known: list[Size] = []

    def plan(self, buckets: Iterable[Size]) -> None:
        """Use these buckets for all images that they cover."""
        self.planned = list(buckets)

    def of(self, size: Size) -> Size:
        """Return the bucket for an image of `size`."""
        own = grid_size(size)
        fitting = [bucket for bucket in self.planned if _covers(bucket, size)]
        fitting = fitting or [
            bucket
            for bucket in [*self.used, *self.known]
            if _covers(bucket, size) and _area(bucket) <= MOST_AREA * _area(own)
        ]
        if own in self.used or not fitting:
            chosen = own
        else:
            chosen = min(fitting, key=_area)
        if chosen not in self.used:
            self.used.append(chosen)
        return chosen


def _area(size: Size) -> int:
    return size[0] * size[1]


def _covers(bucket: Size, size: Size) -> bool:
    return bucket[0] >= size[0] and bucket[1] >= size[1]
