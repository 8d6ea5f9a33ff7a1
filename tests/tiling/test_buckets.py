"""The choice of buckets."""

import pytest

from pisa_jax.tiling.buckets import Buckets, choose_buckets, covering, grid_side, grid_size


def area(size):
    return size[0] * size[1]


def test_padding_is_less_than_an_eighth_of_a_side():
    for side in range(1, 2000):
        padded = grid_side(side)
        assert padded >= side
        assert padded - side < max(padded / 8, 1)
        assert grid_side(padded) == padded
    assert len({grid_side(side) for side in range(64, 513)}) == 25


def test_buckets_of_unknown_sizes_are_on_the_grid_or_in_use():
    buckets = Buckets()
    assert buckets.of((64, 90)) == (64, 96)
    assert buckets.of((56, 80)) == (56, 80)  # the bucket in use has more than 1.3 times this area
    assert buckets.of((62, 88)) == (64, 96)
    assert buckets.of((61, 66)) == (64, 72)
    assert buckets.used == [(64, 96), (56, 80), (64, 72)]


def test_planned_buckets_cover_their_images():
    sizes = [(h, w) for h in range(60, 130, 7) for w in range(60, 130, 9)]
    buckets = Buckets()
    buckets.plan(choose_buckets(sizes, lambda members: 3, 24, 0.0))
    used = {buckets.of(size) for size in sizes}
    assert len(used) <= 8
    for size in sizes:
        assert covering([buckets.of(size), size]) == buckets.of(size)
    padded = sum(area(buckets.of(size)) for size in sizes)
    assert padded < 1.3 * sum(map(area, sizes))
    assert buckets.of((500, 20)) == grid_size((500, 20))  # an image that nobody planned


def test_buckets_are_joined_where_compilation_takes_longer():
    sizes = [(64, 64), (64, 72), (128, 128)]
    assert set(choose_buckets(sizes, lambda members: 3, 24, 0.0)) == set(sizes)
    assert set(choose_buckets(sizes, lambda members: 3, 24, 64 * 8 + 1.0)) == {(64, 72), (128, 128)}
    assert choose_buckets(sizes, lambda members: 3, 24, 1e6) == [(128, 128)]
    assert choose_buckets(sizes, lambda members: 3, 3, 0.0) == [(128, 128)]
    assert choose_buckets([], lambda members: 3, 24, 0.0) == []


def test_known_buckets_replace_those_that_they_cover_at_little_cost():
    sizes = [(60, 60), (58, 62), (96, 100)]
    known = [(64, 64), (200, 200)]
    cost = {"cost_of": lambda members: 3, "most": 24}
    assert set(choose_buckets(sizes, **cost, saved=0.0)) == {(60, 60), (60, 64), (96, 104)}
    assert set(choose_buckets(sizes, **cost, saved=600.0, known=known)) == {(64, 64), (96, 104)}
    assert set(choose_buckets(sizes, **cost, saved=600.0, known=[(60, 64), *known])) == {(60, 64), (96, 104)}
    assert set(choose_buckets(sizes, **cost, saved=1e6, known=known)) == {(64, 64), (200, 200)}


def test_a_known_bucket_serves_images_that_nobody_planned():
    buckets = Buckets()
    buckets.known = [(64, 64), (300, 300)]
    assert buckets.of((60, 60)) == (64, 64)
    assert buckets.of((200, 200)) == grid_size((200, 200))


@pytest.mark.parametrize("mode", ["on", "Exact", ""])
def test_modes(mode):
    from pisa_jax import Settings

    with pytest.raises(ValueError, match=rf"buckets is '{mode}'; use one of 'exact', 'off'"):
        Settings(buckets=mode)
