"""GroupNorm, attention, convolution and upsampling against their definitions."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from tiny import close

from pisa_jax.runtime import distributed
from pisa_jax.runtime.compilation import compiler_options, compiling_for
from pisa_jax.sd import layers
from pisa_jax.training_report import format_collectives, topology_devices


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


@pytest.mark.parametrize(("queries", "keys", "heads", "channels"), [(384, 512, 2, 64), (512, 384, 1, 256)], ids=str)
def test_attention_of_a_tpu_equals_the_plain_formula(queries, keys, heads, channels):
    """The kernel runs in the interpreter of Pallas, forward and backward."""
    q, k, v = (normal(1, n, heads, channels, seed=n + i) for i, n in enumerate((queries, keys, keys)))

    def loss(attention, q, k, v):
        return jnp.sum(jnp.sin(attention(q, k, v)))

    gradient = jax.value_and_grad(loss, argnums=(1, 2, 3))
    expected = gradient(jax.nn.dot_product_attention, q, k, v)
    with compiling_for("tpu"), pltpu.force_tpu_interpret_mode():
        found = gradient(layers.attention, q, k, v)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "kernel"),
    [
        ((4, 4096, 5, 64), True),
        ((4, 1024, 10, 64), True),
        ((4, 4096, 1, 512), True),
        ((3, 4096, 5, 64), True),  # computed completely by each of four devices
        ((4, 2500, 5, 64), False),
        ((4, 256, 20, 64), False),
    ],
)
def test_kernels_of_a_tpu(shape, kernel):
    """Traced for four devices: the kernel of a device computes its part of the batch."""
    mesh = jax.sharding.AbstractMesh((2, 2), ("data", "fsdp"))
    heads = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    with compiling_for("tpu"), jax.sharding.use_abstract_mesh(mesh):
        gradient = jax.grad(lambda *heads: layers.attention(*heads).astype(jnp.float32).sum(), argnums=(0, 1, 2))
        text = str(jax.make_jaxpr(gradient)(heads, heads, heads))
    assert text.count("pallas_call[") == 3 * kernel
    if kernel:
        part = shape[0] // 4 if shape[0] % 4 == 0 else shape[0]
        assert f"bf16[{part},{shape[2]},{shape[1]},{shape[3]}]" in text


@pytest.mark.parametrize("platform", ["gpu", "tpu"])
def test_large_windows_store_no_score_matrix_without_a_kernel(platform):
    """10 000 positions, as of 100 x 100 latents, and heads that cuDNN does not support."""
    q = jax.ShapeDtypeStruct((1, 10_000, 1, 512), jnp.float32)
    with compiling_for(platform):
        text = str(jax.make_jaxpr(layers.attention)(q, q, q))
    assert "10000,10000" not in text
    assert "256,10000" in text


@pytest.mark.slow
def test_attention_compiled_for_a_tpu_stores_no_scores():
    """Four images of 64 x 64 latents on four chips: plain products would store 480 MiB per chip."""
    pytest.importorskip("libtpu", reason="needs pip install libtpu")
    mesh = distributed.make_mesh(devices=topology_devices("v5e:2x2"))
    heads = jax.ShapeDtypeStruct((4, 4096, 5, 64), jnp.bfloat16, sharding=distributed.batch_sharding(mesh))
    gradient = jax.grad(lambda *heads: layers.attention(*heads).astype(jnp.float32).sum(), argnums=(0, 1, 2))
    with compiling_for("tpu"), jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        compiled = jax.jit(gradient).lower(heads, heads, heads).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 2**20
    assert format_collectives(compiled.as_text()) == "none"


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


def conv_and_gradients(function, dtype, *, positions, padding=((1, 1), (1, 1)), strides=(1, 1)):
    x, kernel = normal(1, 2, positions // 2, 5).astype(dtype), normal(3, 3, 5, 24, seed=1).astype(dtype)
    y, gradients = jax.vjp(lambda *arrays: function(*arrays, strides, padding, **CONV_OPTIONS), x, kernel)
    return y, *gradients(normal(*y.shape, seed=2).astype(dtype))


CONV_OPTIONS = {
    "lhs_dilation": (1, 1),
    "rhs_dilation": (1, 1),
    "dimension_numbers": ("NHWC", "HWIO", "NHWC"),
    "feature_group_count": 1,
}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("padding", [((1, 1), (1, 1)), ((0, 2), (2, 1))])
def test_the_gradient_of_a_convolution_of_few_positions(dtype, padding):
    found = conv_and_gradients(layers.conv, dtype, positions=6, padding=padding)
    expected = conv_and_gradients(jax.lax.conv_general_dilated, jnp.float32, positions=6, padding=padding)
    assert [each.dtype for each in found] == [dtype] * 3
    for each, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(
            np.asarray(each, np.float32), other, atol=2e-5 if dtype == jnp.float32 else 0.05 * float(abs(other).max())
        )


@pytest.mark.parametrize("changed", [{"positions": 8}, {"positions": 6, "strides": (2, 2)}])
def test_other_convolutions_are_those_of_jax(changed):
    found, expected = (
        jax.make_jaxpr(lambda function=function: conv_and_gradients(function, jnp.float32, **changed))()
        for function in (layers.conv, jax.lax.conv_general_dilated)
    )
    assert str(found) == str(expected)


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
