"""Convolutions with strides, dilation, groups and padding; what cannot be adapted is refused."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import close

from pisa_jax.adapters import injection
from pisa_jax.adapters.layer_maps import linear_map
from pisa_jax.config import AdapterSpec

X = np.random.default_rng(0).normal(size=(2, 9, 8, 6)).astype(np.float32)
LAYERS = {
    "dilation": nn.Conv(4, (3, 3), kernel_dilation=2, parent=None),
    "groups": nn.Conv(4, (3, 3), feature_group_count=2, parent=None),
    "dilated input": nn.Conv(4, (3, 3), padding=1, input_dilation=(1, 2), parent=None),
    "padding": nn.Conv(4, (3, 2), strides=2, padding=1, parent=None),
    "pairs": nn.Conv(4, (3, 2), padding=(1, (0, 2)), parent=None),
    "valid": nn.Conv(4, (3, 3), padding="VALID", use_bias=False, parent=None),
}


def adapted(layer, params, tree, spec, x):
    @jax.jit
    def run(scale):
        with nn.intercept_methods(injection.interceptor({"": tree}, {"": spec}, {"": scale})):
            return layer.apply({"params": params[""]}, jnp.asarray(x))

    return run(np.float32(0.7))


def nonzero_adapter(params, spec):
    tree = injection.init_adapter(jax.random.key(1), params, spec)
    return jax.tree.map(lambda leaf: leaf + 0.1, tree)


@pytest.mark.parametrize("decomposition", ["lora", "dora"])
@pytest.mark.parametrize("name", LAYERS)
def test_the_layer_is_honoured(name, decomposition):
    layer, spec = LAYERS[name], AdapterSpec(decomposition, rank=3, targets="")
    params = {"": layer.init(jax.random.key(0), X)["params"]}
    tree = nonzero_adapter(params, spec)
    merged = injection.merge(params, {"": tree}, {"": spec}, {"": 0.7})
    expected = layer.apply({"params": merged[""]}, X)
    assert np.abs(expected - layer.apply({"params": params[""]}, X)).max() > 0.01
    close(adapted(layer, params, tree, spec, X), expected, 5e-5)


@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (nn.Conv(4, (3, 3), padding="CIRCULAR", parent=None), X),
        (nn.Conv(4, (3, 3), mask=np.ones((3, 3, 6, 4)), parent=None), X),
        (nn.Conv(4, (3,), parent=None), X[:, 0]),
    ],
    ids=["circular", "mask", "one axis"],
)
def test_other_layers_are_refused(layer, x):
    params = {"": layer.init(jax.random.key(0), x)["params"]}
    spec = AdapterSpec(rank=3, targets="")
    with pytest.raises(
        ValueError, match="adapters support two-dimensional convolutions with padding SAME, VALID or by"
    ):
        adapted(layer, params, nonzero_adapter(params, spec), spec, x)


def test_names_of_scales_are_checked():
    params = {"": LAYERS["valid"].init(jax.random.key(0), X)["params"]}
    spec = AdapterSpec(rank=3, targets="")
    trees, specs = {"pix": nonzero_adapter(params, spec)}, {"pix": spec}
    for scales in ({"pxi": 1.0}, {"pix": 1.0, "sem": 1.0}, {}):
        with pytest.raises(ValueError, match="scales: expected 1, found"):
            injection.merge(params, trees, specs, scales)
    with pytest.raises(ValueError, match=r"missing pix; unexpected pxi; did you mean 'pix'\?"):
        injection.interceptor(trees, specs, {"pxi": jnp.ones(())})


@pytest.mark.parametrize("padding", [(1, 1), (1, (0, 2))])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_convolution_to_few_outputs_and_its_gradients(padding, dtype):
    """An input of 12 channels and a kernel of 3 x 2 to 2 outputs: computed as one product for all taps."""
    x, kernel = (
        jax.random.normal(jax.random.key(seed), shape) for seed, shape in ((0, (2, 5, 4, 12)), (1, (3, 2, 12, 2)))
    )
    module = nn.Conv(2, (3, 2), padding=padding, dtype=dtype, use_bias=False, parent=None)
    y, found = jax.vjp(linear_map(module), x, kernel)
    other, expected = jax.vjp(
        lambda x, kernel: module.clone(dtype=jnp.float32).apply({"params": {"kernel": kernel}}, x), x, kernel
    )
    assert y.dtype == dtype
    tolerance = 1e-5 if dtype == jnp.float32 else 2e-2
    for each, plain in zip((y, *found(other.astype(dtype))), (other, *expected(other)), strict=True):
        np.testing.assert_allclose(each.astype(jnp.float32), plain, atol=tolerance * float(abs(plain).max()))
