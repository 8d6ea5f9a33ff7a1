"""Conversion of kernels and module names between PyTorch and Flax."""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import golden
from tiny import read_json

from pisa_jax.runtime.torch_layout import flax_kernel, flax_module_path, torch_kernel, torch_module_name


def test_module_names_of_the_unet_are_converted_one_to_one():
    lists = read_json(golden("sd21_lora_modules.json"))
    names = [*lists["encoder"], *lists["decoder"], *lists["others"], *lists["not_adapted_matrices"]]
    paths = [flax_module_path(name) for name in names]
    assert len(set(paths)) == len(names) == 258 + 24
    assert [torch_module_name(path) for path in paths] == names
    assert not any("." in path or "/0" in path for path in paths)


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("conv_in", "conv_in"),
        ("time_embedding.linear_1", "time_embedding/linear_1"),
        ("mid_block.resnets.1.conv2", "mid_block/resnets_1/conv2"),
        (
            "up_blocks.3.attentions.2.transformer_blocks.0.attn2.to_out.0",
            "up_blocks_3/attentions_2/transformer_blocks_0/attn2/to_out_0",
        ),
        (
            "down_blocks.0.attentions.10.transformer_blocks.0.ff.net.0.proj",
            "down_blocks_0/attentions_10/transformer_blocks_0/ff/net_0/proj",
        ),
        ("text_model.encoder.layers.10.self_attn.q_proj", "text_model/encoder/layers/10/self_attn/q_proj"),
        (
            "down_blocks.0.attentions.0.transformer_blocks.0.ff.net.2",
            "down_blocks_0/attentions_0/transformer_blocks_0/ff/net_2",
        ),
    ],
)
def test_module_names(name, path):
    assert flax_module_path(name) == path
    assert torch_module_name(path) == name


@pytest.mark.parametrize("shape", [(5, 3), (5, 3, 2, 4), (5,), (), (2, 3, 4)], ids=str)
def test_kernels_are_restored_by_the_inverse_without_copies(shape):
    weight = np.arange(np.prod(shape, dtype=int), dtype=np.float32).reshape(shape)
    kernel = flax_kernel(weight)
    np.testing.assert_array_equal(torch_kernel(kernel), weight, strict=True)
    assert np.shares_memory(kernel, weight)
    if weight.ndim not in (2, 4):
        assert kernel is weight


def test_a_linear_layer_computes_the_same():
    rng = np.random.default_rng(0)
    weight, x = rng.normal(size=(5, 3)).astype(np.float32), rng.normal(size=(2, 3)).astype(np.float32)
    found = nn.Dense(5, use_bias=False).apply({"params": {"kernel": flax_kernel(weight)}}, x)
    np.testing.assert_allclose(found, x @ weight.T, rtol=1e-5)


def test_a_convolution_computes_the_same():
    rng = np.random.default_rng(0)
    weight, x = rng.normal(size=(5, 3, 2, 4)).astype(np.float32), rng.normal(size=(1, 3, 2, 4)).astype(np.float32)
    layer = nn.Conv(5, (2, 4), padding="VALID", use_bias=False)
    found = layer.apply({"params": {"kernel": flax_kernel(weight)}}, jnp.asarray(x.transpose(0, 2, 3, 1)))
    # The window covers the image: PyTorch's convolution is one sum over channels, rows and columns.
    np.testing.assert_allclose(found[0, 0, 0], np.einsum("oihw,ihw->o", weight, x[0]), rtol=1e-5)
