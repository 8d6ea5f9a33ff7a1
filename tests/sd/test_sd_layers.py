"""GroupNorm, attention and upsampling against their definitions."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import close

from pisa_jax.runtime.compilation import compiler_options
from pisa_jax.sd import layers


def normal(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


@pytest.mark.parametrize("offset", [0.0, 300.0])
def test_group_norm_equals_float64(offset):
    x = np.asarray(normal(2, 5, 7, 12)) * np.linspace(0.01, 3, 12) + offset
    x = x.astype(np.float32)
    scale, bias = np.asarray(normal(12, seed=1)), np.asarray(normal(12, seed=2))
    grouped = x.astype(np.float64).reshape(2, 35, 4, 3)
    mean, var = grouped.mean((1, 3), keepdims=True), grouped.var((1, 3), keepdims=True)
    expected = ((grouped - mean) / np.sqrt(var + 1e-6)).reshape(x.shape) * scale + bias
    found = layers.group_norm(jnp.asarray(x), jnp.asarray(scale), jnp.asarray(bias), groups=4, epsilon=1e-6)
    np.testing.assert_allclose(found, expected, atol=2e-6 if offset == 0 else 2e-3)


def test_group_norm_keeps_bfloat16_but_computes_in_float32():
    x = (normal(1, 64, 64, 32) + 20).astype(jnp.bfloat16)
    ones, zeros = jnp.ones(32), jnp.zeros(32)
    found = layers.group_norm(x, ones, zeros, 32, 1e-5)
    assert found.dtype == jnp.bfloat16
    expected = layers.group_norm(x.astype(jnp.float32), ones, zeros, 32, 1e-5)
    np.testing.assert_allclose(np.asarray(found, np.float32), expected, atol=0.04)


@pytest.mark.parametrize(
    ("queries", "keys", "heads"), [(700, 700, 2), (257, 300, 1), (512, 77, 3), (40, 40, 2)], ids=str
)
def test_attention_equals_the_definition(queries, keys, heads):
    q, k, v = normal(2, queries, heads, 8), normal(2, keys, heads, 8, seed=1), normal(2, keys, heads, 8, seed=2)

    def definition(q, k, v):
        weights = jax.nn.softmax(jnp.einsum("bnhd,bmhd->bhnm", q, k) / np.sqrt(8), axis=-1)
        return jnp.einsum("bhnm,bmhd->bnhd", weights, v)

    np.testing.assert_allclose(layers.attention(q, k, v), definition(q, k, v), atol=2e-6)
    found, expected = (
        jax.grad(lambda q, k, v, f=f: jnp.sum(jnp.sin(f(q, k, v))), argnums=(0, 1, 2))(q, k, v)
        for f in (layers.attention, definition)
    )
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_attention_on_a_gpu_without_cudnn(monkeypatch, dtype):
    q, k, v = (normal(1, 512, 2, 16, seed=seed).astype(dtype) for seed in range(3))
    expected = jax.nn.dot_product_attention(q, k, v)
    layers.cudnn_attention_compiles.cache_clear()
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    found = layers.attention(q, k, v)
    layers.cudnn_attention_compiles.cache_clear()
    np.testing.assert_array_equal(np.asarray(found, np.float32), np.asarray(expected, np.float32))


@pytest.mark.parametrize(("positions", "kernel"), [(4096, True), (4095, False), (256, False)])
def test_attention_with_cudnn(monkeypatch, positions, kernel):
    """Lowering for CUDA needs its libraries, but no GPU."""
    pytest.importorskip("jax_plugins.xla_cuda13", reason="needs pip install -e '.[cuda]'", exc_type=ImportError)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(
        layers, "cudnn_attention_compiles", lambda dtype, channels: (dtype, channels) == (jnp.bfloat16, 64)
    )
    heads = jax.ShapeDtypeStruct((1, positions, 5, 64), jnp.bfloat16)
    gradient = jax.jit(jax.grad(lambda *heads: layers.attention(*heads).sum(), argnums=(0, 1, 2)))
    calls = ("__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward")
    allowed = [jax.export.DisabledSafetyCheck.custom_call(call) for call in calls]
    text = jax.export.export(gradient, platforms=["cuda"], disabled_checks=allowed)(heads, heads, heads).mlir_module()
    assert [f"@{call}(" in text for call in calls] == [kernel, kernel]


def test_long_attention_stores_no_score_matrix():
    q = jax.ShapeDtypeStruct((1, 8192, 1, 64), jnp.float32)
    compiled = jax.jit(layers.attention).lower(q, q, q).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 8192 * 8192 * 4 / 4


@pytest.mark.parametrize("shape", [(2, 5, 6, 3), (1, 1, 1, 3), (1, 2, 9, 3)], ids=str)
def test_upsample_conv_equals_a_convolution_of_the_upsampled_image(shape):
    x, kernel, bias = normal(*shape), normal(3, 3, 3, 4, seed=1), normal(4, seed=2)
    plain = nn.Conv(4, (3, 3), padding=1).apply(
        {"params": {"kernel": kernel, "bias": bias}}, layers.upsample_nearest(x)
    )
    np.testing.assert_allclose(layers.upsample_conv(x, kernel, bias), plain, atol=2e-5)


def test_upsample_nearest_repeats_pixels():
    x = jnp.arange(4.0).reshape(1, 2, 2, 1)
    assert layers.upsample_nearest(x)[0, :, :, 0].tolist() == [[0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 3, 3], [2, 2, 3, 3]]


@pytest.mark.parametrize("count", [1, 300, 5000])
def test_attention_over_the_first_keys(count):
    query, key, value = (jax.random.normal(jax.random.key(i), (n, 2, 8)) for i, n in enumerate((300, 5000, 5000)))
    expected = jax.nn.dot_product_attention(query[None], key[None, :count], value[None, :count])[0]
    close(jax.jit(layers.attention_over_first_keys)(query, key, value, jnp.array(count)), expected, 1e-5)


def test_group_norm_and_silu_write_only_their_result():
    """In the compiled program, a single instruction has a result of the size of the image."""
    image, channels = jax.ShapeDtypeStruct((1, 64, 48, 64), jnp.float32), jax.ShapeDtypeStruct((64,), jnp.float32)
    both = jax.jit(lambda x, *weights: nn.silu(layers.group_norm(x, *weights, 32, 1e-6)))
    text = both.trace(image, channels, channels).lower().compile(compiler_options()).as_text()
    entry = text[text.index("ENTRY") :].splitlines()[1:]
    made = [line for line in entry if " = f32[1,64,48,64]" in line and "parameter(" not in line]
    assert len(made) == 1
    assert made[0].strip().startswith("ROOT")
    assert "fusion(" in made[0]
