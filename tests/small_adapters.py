"""Small random adapters for the tests of adapter files."""

import numpy as np

from pisa_jax.adapters.adapter_tree import Adapters
from pisa_jax.adapters.files import export_pisa_sr
from pisa_jax.config import AdapterSpec
from pisa_jax.runtime.tensor_files import read_tensors
from pisa_jax.runtime.trees import flatten

CONV, DENSE = "down_blocks_0/resnets_0/conv1", "up_blocks_1/attentions_0/transformer_blocks_0/attn1/to_out_0"
KERNELS = {CONV: (3, 3, 5, 7), DENSE: (5, 6), "mid_block/resnets_0/conv_shortcut": (1, 1, 5, 7)}


def random_adapters(rank=2, alpha=8.0, base_model="owner/name", names=("pix", "sem")) -> Adapters:
    """Return adapters of three layers with random factors."""
    rng = np.random.default_rng(0)

    def factors(shape):
        *window, c_in, c_out = shape
        shapes = {"a": (*window, c_in, rank), "b": (*[1] * len(window), rank, c_out)}
        return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}

    trees = {name: {path: factors(shape) for path, shape in KERNELS.items()} for name in names}
    return Adapters(trees, {name: AdapterSpec(rank=rank, alpha=alpha) for name in names}, base_model)


def assert_same(found: Adapters, expected: Adapters):
    """Assert equal specifications, base model and factors, bit by bit."""
    assert found.specs == expected.specs
    assert found.base_model == expected.base_model
    assert list(found.trees) == list(expected.trees)
    one, other = flatten(found.trees), flatten(expected.trees)
    assert set(one) == set(other)
    for path, array in other.items():
        np.testing.assert_array_equal(one[path], array, strict=True, err_msg=path)


def original_state(adapters, folder):
    """Return the tensors of the adapters in the format of the original PiSA-SR."""
    export_pisa_sr(folder / "original.safetensors", adapters)
    return dict(read_tensors(folder / "original.safetensors"))
