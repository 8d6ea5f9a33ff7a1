"""Padded images give the results of images without padding, for every residue of their sides."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from tiny import random_base

from pisa_jax.runtime.compilation import compiling_for
from pisa_jax.sd import flash_attention, layers

# Of the largest value; float32 has a precision of 1.2e-7, and the largest error that was measured is 1.5e-6.
TOLERANCE = 1e-5
SIDE = 16
# Every residue modulo 8 of the height, and of the width; modulo 8, the four levels of the UNet differ.
RESIDUES = list(zip((9, 10, 11, 12, 13, 14, 15, 16), (12, 9, 14, 16, 10, 13, 11, 15), strict=True))
ALL = [size for size in itertools.product(range(9, 17), repeat=2) if size not in RESIDUES]
PROMPT = np.random.default_rng(1).standard_normal((1, 5, 32), np.float32)


def functions(size):
    """Return name -> (jitted function (array[, sizes]), input positions per latent, input channels)."""
    base, params = random_base(size)
    run = {
        "encode": lambda images, **given: base.encode(params["vae"], images, None, **given),
        "predict": lambda latents, **given: base.predict_noise(
            params["unet"], latents, 1, jnp.asarray(PROMPT), **given
        ),
        "decode": lambda latents, **given: base.decode(params["vae"], latents, **given),
    }
    latents = (1, base.latent_channels)
    shapes = {"encode": (base.vae_scale_factor, 3), "predict": latents, "decode": latents}
    return {name: (jax.jit(function), *shapes[name]) for name, function in run.items()}


FUNCTIONS: dict = {}  # jitted once for all tests


def deviation(size, name, sides):
    """Return the largest error relative to the largest value, with noise as padding."""
    function, scale, channels = FUNCTIONS.setdefault(size, functions(size))[name]
    rng, (height, width) = np.random.default_rng(0), (side * scale for side in sides)
    array = rng.uniform(-1, 1, (1, height, width, channels)).astype(np.float32)
    padded = np.full((1, SIDE * scale, SIDE * scale, channels), 50, np.float32)
    padded[:, :height, :width] = array
    expected = np.asarray(function(array))
    found = np.asarray(function(padded, sizes=jnp.array([sides], jnp.int32)))
    found = found[:, : expected.shape[1], : expected.shape[2]]
    return np.abs(found - expected).max() / np.abs(expected).max()


@pytest.mark.parametrize("sides", RESIDUES, ids=str)
@pytest.mark.parametrize("name", ["encode", "predict", "decode"])
def test_every_residue(name, sides):
    assert deviation("tiny" if name == "predict" else "nano", name, sides) < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("sides", ALL, ids=str)
@pytest.mark.parametrize("name", ["encode", "predict", "decode"])
def test_every_pair_of_residues(name, sides):
    assert deviation("tiny", name, sides) < TOLERANCE


@pytest.mark.parametrize("sides", [(1, 2), (1, 16), (3, 2)], ids=str)
def test_tiny_images_in_a_large_bucket(sides):
    for name in ("encode", "predict", "decode"):
        assert deviation("nano", name, sides) < TOLERANCE


def test_images_of_a_batch_have_sizes_of_their_own():
    function, _, channels = FUNCTIONS.setdefault("nano", functions("nano"))["predict"]
    sizes = [(9, 12), (16, 16), (5, 3)]
    batch = np.random.default_rng(0).standard_normal((3, SIDE, SIDE, channels), np.float32)
    found = function(batch, sizes=jnp.array(sizes, jnp.int32))
    for image, latents, (height, width) in zip(np.asarray(found), batch, sizes, strict=True):
        [expected] = np.asarray(function(latents[None, :height, :width]))
        np.testing.assert_allclose(image[:height, :width], expected, atol=1e-5 * np.abs(expected).max())


def attention_by_sample(query, key, value, lengths):
    each = [
        jax.nn.dot_product_attention(query[index, None], key[index, None, :length], value[index, None, :length])
        for index, length in enumerate(lengths)
    ]
    return jnp.concatenate(each)


@pytest.mark.parametrize("keys", [60, 700])
def test_attention_over_the_first_keys_of_each_sample(keys):
    query, key, value = (jax.random.normal(jax.random.key(i), (2, keys, 2, 8)) for i in range(3))
    lengths = [keys // 3, keys]
    found = layers.attention(query, key, value, jnp.array(lengths))
    np.testing.assert_allclose(found, attention_by_sample(query, key, value, lengths), atol=2e-6)


def test_attention_of_a_tpu_with_lengths():
    query, key, value = (jax.random.normal(jax.random.key(i), (2, 384, 1, 64)) for i in range(3))
    lengths = [130, 384]
    with compiling_for("tpu"), pltpu.force_tpu_interpret_mode():
        found = layers.attention(query, key, value, jnp.array(lengths))
    np.testing.assert_allclose(found, attention_by_sample(query, key, value, lengths), rtol=1e-6, atol=1e-5)


def test_a_kernel_of_a_tpu_has_the_lengths_of_its_part_of_the_batch():
    mesh = jax.sharding.AbstractMesh((2, 2), ("data", "fsdp"))
    heads = jax.ShapeDtypeStruct((4, 512, 2, 64), jnp.bfloat16)
    with compiling_for("tpu"), jax.sharding.use_abstract_mesh(mesh):
        text = str(jax.make_jaxpr(flash_attention.flash_attention)(heads, heads, heads, jnp.ones(4, jnp.int32)))
    assert text.count("pallas_call[") == 1
    assert "i32[1,512]" in text


@pytest.mark.parametrize("positions", [4096, 256])
def test_lengths_on_a_gpu(monkeypatch, positions):
    """Lowering for CUDA needs its libraries, but no GPU."""
    pytest.importorskip("jax_plugins.xla_cuda13", reason="needs pip install -e '.[cuda]'", exc_type=ImportError)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(layers, "cudnn_attention_compiles", lambda dtype, channels: True)
    heads, lengths = jax.ShapeDtypeStruct((1, positions, 5, 64), jnp.bfloat16), jax.ShapeDtypeStruct((1,), jnp.int32)
    allowed = [jax.export.DisabledSafetyCheck.custom_call("__cudnn$fmhaSoftmax")]
    exported = jax.export.export(jax.jit(layers.attention), platforms=["cuda"], disabled_checks=allowed)
    text = exported(heads, heads, heads, lengths).mlir_module()
    assert ("@__cudnn$fmhaSoftmax(" in text) == (positions == 4096)
