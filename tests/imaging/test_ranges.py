"""Conversions between value ranges, over all 256 levels."""

import jax
import numpy as np
import pytest

from pisa_jax.imaging import ranges

LEVELS = np.arange(256, dtype=np.uint8)


def test_uint8_to_float_is_correctly_rounded():
    np.testing.assert_array_equal(ranges.uint8_to_unit(LEVELS), (LEVELS / 255).astype(np.float32))
    assert ranges.uint8_to_unit(LEVELS).dtype == ranges.uint8_to_signed(LEVELS).dtype == np.float32
    assert ranges.uint8_to_signed(LEVELS)[[0, 255]].tolist() == [-1, 1]


def test_uint8_to_signed_is_the_composition_in_every_bit():
    expected = ranges.unit_to_signed(ranges.uint8_to_unit(LEVELS))
    np.testing.assert_array_equal(ranges.uint8_to_signed(LEVELS), expected)


def test_all_levels_survive_the_round_trips():
    np.testing.assert_array_equal(ranges.unit_to_uint8(ranges.uint8_to_unit(LEVELS)), LEVELS)
    np.testing.assert_array_equal(ranges.signed_to_uint8(ranges.uint8_to_signed(LEVELS)), LEVELS)


def test_values_outside_the_range_are_clipped():
    assert ranges.unit_to_uint8(np.float32([-0.2, 1.3])).tolist() == [0, 255]
    assert ranges.signed_to_uint8(np.float32([-1.2, 1.3])).tolist() == [0, 255]


@pytest.mark.parametrize("function", [ranges.unit_to_signed, ranges.signed_to_unit])
def test_jax_and_numpy_give_equal_bits(function):
    values = np.random.default_rng(0).uniform(-1, 1, 4096).astype(np.float32)
    np.testing.assert_array_equal(jax.jit(function)(values), function(values))
