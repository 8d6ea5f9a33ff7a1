"""Operations of traced programs against closed forms."""

import jax
import jax.numpy as jnp
import pytest

from pisa_jax.runtime.compilation import compiling_for
from pisa_jax.runtime.operations import count_operations
from pisa_jax.sd import layers


def operations(function, *shapes):
    return count_operations(jax.make_jaxpr(function)(*(jnp.zeros(shape) for shape in shapes)))


def conv(x, kernel, **options):
    names = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=names, **options)


def test_products_and_convolutions():
    assert operations(jnp.matmul, (5, 3, 4), (4, 7)) == 2 * 5 * 3 * 4 * 7
    assert operations(conv, (2, 8, 8, 6), (3, 3, 6, 10)) == 2 * (2 * 8 * 8 * 10) * (3 * 3 * 6)
    grouped = lambda x, kernel: conv(x, kernel, feature_group_count=2)  # noqa: E731
    assert operations(grouped, (2, 8, 8, 6), (3, 3, 3, 10)) == 2 * (2 * 8 * 8 * 10) * (3 * 3 * 3)


def test_a_gradient_costs_twice_the_function():
    forward = operations(conv, (2, 8, 8, 6), (3, 3, 6, 10))
    both = operations(jax.grad(lambda x, kernel: conv(x, kernel).sum(), (0, 1)), (2, 8, 8, 6), (3, 3, 6, 10))
    assert both == pytest.approx(3 * forward, rel=0.5)  # positions outside of the image count for one of them

    def strided(x, kernel):
        names = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, kernel, (2, 2), [(0, 0), (0, 0)], dimension_numbers=names).sum()

    once = operations(strided, (1, 8, 8, 6), (2, 2, 6, 10))
    assert operations(jax.grad(strided), (1, 8, 8, 6), (2, 2, 6, 10)) == 2 * once


def test_loops_and_branches():
    def step(x, _):
        return x @ x, None

    assert operations(lambda x: jax.lax.scan(step, x, length=7)[0], (4, 4)) == 7 * 2 * 4**3
    branches = [lambda x: x, lambda x: x @ x, lambda x: x @ x @ x]
    assert operations(lambda x: jax.lax.switch(0, branches, x), (4, 4)) == 2 * 2 * 4**3
    assert operations(jax.checkpoint(jax.jit(lambda x: x @ x)), (4, 4)) == 2 * 4**3


def test_a_kernel_of_a_tpu_counts_as_the_formula_does():
    shape = (2, 512, 3, 64)
    expected = 2 * 2 * 2 * 3 * 512 * 512 * 64
    assert operations(jax.nn.dot_product_attention, shape, shape, shape) == expected
    with compiling_for("tpu"):
        assert operations(layers.attention, shape, shape, shape) == expected
        gradient = jax.grad(lambda *heads: layers.attention(*heads).sum(), (0, 1, 2))
        # Backward: the scores again for each of two kernels, and dv, dp, dk; dp, dq.
        assert operations(gradient, shape, shape, shape) == expected + 7 * expected / 2
