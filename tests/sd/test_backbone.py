from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import golden
from jax.extend.core import ClosedJaxpr, Jaxpr
from tiny import close, nhwc, random_backbone, read_json, recorded_backbone, recorded_model

from pisa_jax.sd import backbone, random_model

# Compiled one by one, the operations of a network take several times as long.
eps, encode, decode, posterior, encode_text = (
    jax.jit(function, static_argnums=0)
    for function in (backbone.eps, backbone.encode, backbone.decode, backbone.posterior, backbone.encode_text)
)


def test_text_embeddings():
    model, arrays = recorded_model(), np.load(golden("comp/text.npz"))
    ids = model.tokenize(read_json(golden("comp/text_prompts.json")))
    assert np.array_equal(ids, arrays["input_ids"])
    close(encode_text(recorded_backbone(), model.params["text"], jnp.asarray(ids)), arrays["prompt_embeds"])


@pytest.mark.parametrize("timestep", [1, 500])
@pytest.mark.parametrize("index", [0, 1], ids=["16x16", "13x10"])
def test_unet(index, timestep):
    model, arrays = recorded_model(), np.load(golden("comp/unet.npz"))
    found = eps(
        recorded_backbone(),
        model.params["unet"],
        nhwc(arrays[f"x{index}"]),
        timestep,
        jnp.asarray(arrays[f"emb{index}"]),
    )
    close(found, nhwc(arrays[f"base{index}_t{timestep}"]))


def test_unet_with_a_timestep_per_sample():
    model, arrays = recorded_model(), np.load(golden("comp/unet.npz"))
    found = eps(
        recorded_backbone(),
        model.params["unet"],
        nhwc(arrays["x0"]),
        *(jnp.asarray(arrays[n]) for n in ("tvec", "emb0")),
    )
    close(found, nhwc(arrays["base0_tvec"]))


@pytest.mark.parametrize("index", [0, 1])
def test_vae(index):
    model, arrays = recorded_model(), np.load(golden("comp/vae.npz"))
    modules, params = recorded_backbone(), model.params["vae"]
    image, mean, std = (nhwc(arrays[f"{name}{index}"]) for name in ("img", "mean", "std"))
    close(encode(modules, params, image), mean * 0.18215)
    noise = jax.random.normal(jax.random.key(0), mean.shape)
    close(encode(modules, params, image, noise), (mean + std * noise) * 0.18215)
    close(decode(modules, params, nhwc(arrays[f"z{index}"]) * 0.18215), nhwc(arrays[f"dec{index}"]))


def test_a_latent_as_wide_as_it_has_channels_is_not_transposed():
    modules, params = random_backbone()
    latents = jax.random.normal(jax.random.key(0), (1, 6, 4, 4))
    assert decode(modules, params["vae"], latents).shape == (1, 48, 32, 3)


@pytest.mark.parametrize("size", [(1, 1), (3, 7), (9, 17), (8, 8)], ids=str)
def test_unet_takes_latents_of_any_size(size):
    modules, params = random_backbone()
    latents = jax.random.normal(jax.random.key(0), (2, *size, 4))
    prompt = jnp.zeros((1, 3, 32))
    out = eps(modules, params["unet"], latents, 1, prompt)
    assert out.shape == latents.shape
    assert np.isfinite(out).all()


def test_bfloat16_modules_return_float32_near_the_float32_ones():
    unet, vae, text = random_model.model_configs("tiny")
    half = backbone.build_modules(unet, vae, text, "bfloat16", "bfloat16")
    modules, params = random_backbone()
    cast = jax.tree.map(lambda leaf: leaf.astype("bfloat16"), params)
    latents = jax.random.normal(jax.random.key(0), (1, 8, 8, 4))
    prompt = jnp.zeros((1, 3, 32))
    exact = eps(modules, params["unet"], latents, 1, prompt)
    found = eps(half, cast["unet"], latents, 1, prompt)
    assert found.dtype == np.float32
    assert np.sqrt(np.mean((found - exact) ** 2)) < 0.03 * np.std(exact)
    exact = decode(modules, params["vae"], latents)
    found = decode(half, cast["vae"], latents)
    assert np.sqrt(np.mean((found - exact) ** 2)) < 0.03 * np.std(exact)


def instructions(jaxpr):
    """Yield all instructions of a program and of its inner programs."""
    for instruction in jaxpr.eqns:
        yield instruction
        for inner in jax.tree.leaves(list(instruction.params.values())):
            if isinstance(inner, Jaxpr | ClosedJaxpr):
                yield from instructions(inner)


def programs(dtype):
    """Return the encoder, the UNet and the decoder by name."""
    modules = backbone.build_modules(*random_model.model_configs("tiny"), dtype, dtype)
    shapes = backbone.param_shapes(modules)
    image, latents, prompt = jnp.zeros((1, 64, 64, 3)), jnp.zeros((1, 8, 8, 4)), jnp.zeros((1, 3, 32))
    traced = {
        "encoder": jax.make_jaxpr(partial(backbone.posterior, modules))(shapes["vae"], image),
        "UNet": jax.make_jaxpr(partial(backbone.eps, modules))(shapes["unet"], latents, 1, prompt),
        "decoder": jax.make_jaxpr(partial(backbone.decode, modules))(shapes["vae"], latents),
    }
    return {name: list(instructions(program)) for name, program in traced.items()}


def test_only_images_and_latents_are_transposed():
    """Transposes that diffusers' modules need at their inputs and outputs, never between blocks."""
    for name, program in programs("float32").items():
        for instruction in program:
            channels = {(0, 3, 1, 2): 3, (0, 2, 3, 1): 1}.get(instruction.params.get("permutation"))
            if channels:
                assert instruction.invars[0].aval.shape[channels] <= 4, (name, instruction)


def test_every_product_of_bfloat16_modules_is_of_bfloat16():
    for name, program in programs("bfloat16").items():
        products = [p for p in program if p.primitive.name in ("dot_general", "conv_general_dilated")]
        assert len(products) > 20
        for product in products:
            assert {operand.aval.dtype for operand in product.invars} == {jnp.dtype("bfloat16")}, (name, product)


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [
        (0, "act_fn", "gelu"),
        (0, "norm_eps", 1e-6),
        (0, "upcast_attention", True),
        (0, "norm_num_groups", 16),
        (0, "class_embed_type", "timestep"),
        (0, "num_attention_heads", [5, 10, 20, 20]),
        (0, "resnet_time_scale_shift", "scale_shift"),
        (0, "some_key_of_the_future", 3),
        (1, "act_fn", "gelu"),
        (1, "latents_mean", [0.1]),
        (1, "use_quant_conv", False),
    ],
)
def test_configs_that_would_be_ignored_are_refused(part, key, value):
    parts = list(random_model.model_configs("tiny"))
    parts[part] = parts[part] | {key: value}
    with pytest.raises(ValueError, match=f"does not support {key} = "):
        backbone.build_modules(*parts)


def test_unknown_blocks_are_refused():
    unet, vae, text = random_model.model_configs("tiny")
    with pytest.raises(ValueError, match=r"down_block_types has .'AttnDownBlock2D'.*supports.*CrossAttnDownBlock2D"):
        backbone.build_modules(unet | {"down_block_types": ["AttnDownBlock2D"] * 4}, vae, text)


def test_recorded_config_is_accepted_with_every_key_that_diffusers_writes():
    configs = [read_json(golden(f"sd_tiny/{part}/config.json")) for part in ("unet", "vae", "text_encoder")]
    built = backbone.build_modules(*configs)
    assert (built.vae_scale_factor, built.latent_channels, built.latent_scale) == (8, 4, 0.18215)
