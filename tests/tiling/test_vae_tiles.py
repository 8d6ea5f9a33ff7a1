"""The VAE in tiles against the VAE on whole images."""

import dataclasses
import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT
from test_inference import random_image, random_upscaler
from tiny import close

from pisa_jax.imaging import color
from pisa_jax.inference import Weights
from pisa_jax.model import Predictions
from pisa_jax.runtime import distributed
from pisa_jax.runtime.distributed import on_device
from pisa_jax.sd import backbone as bb
from pisa_jax.sd import random_model, vae_tile_hooks, vae_tiling
from pisa_jax.sd.base_model import make_base_model
from pisa_jax.tiling import placements, vae_tiles

# Bounds for images in [-1, 1]: 2 gray levels at most, 0.1 gray levels on average.
MAX_ERROR, MEAN_ERROR = 2 / 127.5, 0.1 / 127.5


def half_flat(height, width, seed=0):
    """Return an image with different statistics in its halves: uniform on the left, detailed on the right."""
    source = random_image(height, width, seed)
    source[:, : width // 2] = (200, 205, 210)
    return source


@functools.cache
def two_levels():
    """Return a model with 2 pixels per latent: it compiles fast and shares no dimension with Stable Diffusion."""
    unet, vae, text = random_model.model_configs("tiny")
    modules = bb.build_modules(
        unet | {"block_out_channels": [32, 32], "attention_head_dim": [2, 2],
                "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
                "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"]},
        vae | {"block_out_channels": [32, 64], "norm_num_groups": 16,
               "down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2},
        text,
    )  # fmt: skip
    shapes, rng = bb.param_shapes(modules), np.random.default_rng(0)
    return modules, on_device({part: random_model.random_params(shapes[part], rng) for part in shapes}, np.float32)


def small_upscaler(**settings):
    modules, params = two_levels()
    return random_upscaler(parts=(make_base_model(modules), params), **settings)


@functools.cache
def tile_functions():
    """Return the parts of the tiled encoder and decoder of the small model; tests share the compiled functions."""
    modules, params = two_levels()
    weights, compiled = Weights(None, None, params["vae"], None), {}

    def run(stage, static, *arrays):
        key = (stage, static, tuple(np.shape(leaf) for leaf in jax.tree.leaves(arrays)))
        if key not in compiled:
            compiled[key] = jax.jit(functools.partial(stage, *static))
        return compiled[key](weights, *arrays)

    mesh = distributed.local_mesh(1)
    return [make(modules, params["vae"], mesh, run) for make in (vae_tiling.tiled_encoder, vae_tiling.tiled_decoder)]


@functools.cache
def untiled():
    """Return an image of 32 x 48 latents, its moments, its latents, and the decoded image, all without tiles."""
    modules, params = two_levels()
    source = np.float32(half_flat(64, 96)) / 127.5 - 1
    mean, std = jax.jit(bb.posterior, static_argnums=0)(modules, params["vae"], source[None])
    latents = mean * modules.latent_scale
    decoded = jax.jit(bb.decode, static_argnums=0)(modules, params["vae"], latents)
    return source, np.concatenate([mean, std], -1)[0], np.asarray(latents)[0], np.asarray(decoded)[0]


def process(parts, source, whole_trunk=False, fast=False):
    """Run the parts in tiles of 16 latents; return the output, and the largest residual relative to its tolerance."""
    residuals = []
    for functions in parts:
        if whole_trunk and functions.input_scale == functions.output_scale:
            functions = functions._replace(whole_tiles=3)
        source, residual = vae_tiles.process_in_tiles(functions, source, 16, fast)
        residuals.append(residual / functions.tolerance)
    return source, max(residuals)


@pytest.mark.parametrize("whole_trunk", [True, False])
def test_tiles_decode_like_the_whole_image(whole_trunk):
    _, _, latents, expected = untiled()
    found, residual = process(tile_functions()[1], latents, whole_trunk)
    assert residual < 1
    difference = np.abs(np.clip(found, -1, 1) - np.clip(expected, -1, 1))
    assert difference.max() < MAX_ERROR
    assert difference.mean() < MEAN_ERROR
    # No seam: errors beside the borders of tiles are not larger than elsewhere.
    beside = np.zeros(difference.shape[:2], bool)
    beside[31:33], beside[:, 31:33], beside[:, 63:65] = True, True, True
    assert difference[beside].mean() < 2 * difference[~beside].mean() + 1e-5


@pytest.mark.parametrize("whole_trunk", [True, False])
def test_tiles_encode_like_the_whole_image(whole_trunk):
    source, expected, _, _ = untiled()
    found, residual = process(tile_functions()[0], source, whole_trunk)
    assert residual < 1
    assert np.abs(found - expected).max() < 0.03 * np.std(expected)


def test_a_single_pass_is_not_enough(monkeypatch):
    # This also shows that the bounds above can fail.
    monkeypatch.setattr(vae_tiles, "MAX_PASSES", 1)
    _, _, latents, expected = untiled()
    found, residual = process(tile_functions()[1], latents)
    assert residual > 1
    assert np.abs(np.clip(found, -1, 1) - np.clip(expected, -1, 1)).max() > MAX_ERROR


def test_the_fast_mode_computes_every_tile_once():
    _, _, latents, expected = untiled()
    calls = []

    def counted(functions):
        def count(name):
            function = getattr(functions, name)
            return lambda *arrays: calls.append(name) or function(*arrays)

        return functions._replace(process_tiles=count("process_tiles"), measure_sample=count("measure_sample"))

    found, residual = process(map(counted, tile_functions()[1]), latents, fast=True)
    assert calls == (["measure_sample"] + ["process_tiles"] * 6) * 2
    assert residual == 0
    # The statistics of the sample are not exact: random weights show it more than trained ones do.
    assert MEAN_ERROR < np.abs(found - expected).mean() < np.std(expected)


def test_the_residual_estimates_the_error(monkeypatch):
    _, _, latents, expected = untiled()
    for passes in (1, 2):
        monkeypatch.setattr(vae_tiles, "MAX_PASSES", passes)
        trunk, levels = tile_functions()[1]
        features, _ = vae_tiles.process_in_tiles(trunk._replace(whole_tiles=3), latents, 16)
        found, residual = vae_tiles.process_in_tiles(levels, features, 16)
        error = np.abs(found - expected).mean() / np.std(expected)
        assert error / 4 < residual < 4 * error


def test_fewer_keys_than_latents(monkeypatch):
    monkeypatch.setattr(vae_tiles, "MAX_KEYS", 400)
    _, _, latents, expected = untiled()
    found, residual = process(tile_functions()[1], latents)
    assert residual < 1
    assert 0 < np.abs(found - expected).mean() < 0.5 * np.std(expected)
    # A trunk uses the same keys in tiles and without; the number is constant in a compiled function.
    trunk = tile_functions.__wrapped__()[1][0]
    whole, tiled = np.asarray(trunk.process_whole(latents[None]))[0], process([trunk], latents)[0]
    assert np.abs(whole - tiled).mean() < 0.01 * np.std(whole)


@pytest.mark.parametrize(("height", "width"), [(5, 40), (40, 5), (16, 16), (17, 16), (3, 3), (33, 50)])
def test_every_position_belongs_to_one_tile(height, width):
    size = (min(8, height), min(8, width))
    source = np.arange(height * width, dtype=np.float32).reshape(height, width, 1)
    owners, copy = np.zeros((height, width), int), np.full_like(source, -1)
    for placement in placements.tile_grid((height, width), size, 3):
        (top, left), (bottom, right) = placement.start, placement.stop
        owners[top:bottom, left:right] += 1
        window = placements.extract_windows(source, [placement], size, 3)[0]
        assert window.shape[:2] == tuple(min(8 + 6, side) for side in (height, width))
        placements.write_tile(copy, placement, window, placement.window)
    assert (owners == 1).all()
    assert np.array_equal(copy, source)


def test_applying_a_shift_inverts_its_computation():
    rng = np.random.default_rng(0)
    one, other = (np.float32(np.abs(rng.normal(size=(3, 2, 4))) + 0.1) for _ in range(2))
    shift = vae_tiles.statistics_shift(one, other)
    for index in range(3):
        close(vae_tile_hooks.apply_shift(one[index], shift[index]), other[index], 1e-5)


@pytest.mark.parametrize("fix", ["adain", "wavelet", "none"])
def test_color_fixes_of_tiles_equal_those_of_the_whole_image(fix):
    rng = np.random.default_rng(0)
    content, style = (np.float32(rng.uniform(-1, 1, (150, 90, 3)) * spread) for spread in (1, 0.6))
    function = color.COLOR_FIXES[fix]
    whole = function(jnp.asarray(content[None] + 1) / 2, jnp.asarray(style[None] + 1) / 2)[0]
    expected = np.clip(whole, 0, 1) * 2 - 1
    if fix == "adain":
        color.adain_in_place(content, style, rows=64)
        close(content, expected, 1e-5)
    else:
        found = placements.map_tiles(
            lambda c, s: function(jnp.asarray(c + 1) / 2, jnp.asarray(s + 1) / 2) * 2 - 1,
            (content, style), 64, color.WAVELET_REACH,
        )  # fmt: skip
        close(np.clip(found, -1, 1), expected, 1e-5)


def test_upscaling_with_tiles_is_close_to_upscaling_without(monkeypatch):
    monkeypatch.setattr(vae_tiling, "trunk_tiles", lambda backbone: 4)
    tiled, whole = (small_upscaler(vae_tile=tile) for tile in (64, 0))
    source = np.float32(half_flat(25, 37)) / 255
    for fix in ("adain", "wavelet"):
        for upscaler in (tiled, whole):
            upscaler.pipeline.settings = dataclasses.replace(upscaler.pipeline.settings, color_fix=fix)
        found, expected = (u(source, 4, (0.7, 0.4), seed=3) for u in (tiled, whole))
        assert found.shape == (100, 148, 3)
        assert 0 < np.abs(found - expected).max() < MAX_ERROR / 2
        assert np.abs(found - expected).mean() < MEAN_ERROR / 2


def test_tile_shapes_are_compiled_once_and_new_scales_compile_nothing(monkeypatch):
    monkeypatch.setattr(vae_tiles, "MAX_PASSES", 2)
    monkeypatch.setattr(vae_tiling, "trunk_tiles", lambda backbone: 4)
    compiled = []
    upscaler = small_upscaler(on_compile=lambda what, seconds: compiled.append(what), vae_tile=64, tile=32, overlap=4)
    upscaler(random_image(28, 33))
    # The levels of encoder and decoder measure samples, and process tiles, patches, and a smaller tile for the check.
    levels = [*["measure_sample"] * 2, *["process_tiles"] * 6]
    assert sorted(what.split()[0] for what in compiled) == sorted([*levels, "predict", *["process_whole"] * 2])
    upscaler(random_image(35, 30))
    assert [what.split()[0] for what in compiled[11:]] == ["process_whole"] * 2
    runner = upscaler.pipeline.runner
    calls, run = [], runner.run
    runner.run = lambda stage, *args: calls.append(stage.__name__) or run(stage, *args)
    session = upscaler.open(random_image(28, 33), adjustable=False)
    assert np.array_equal(session.render(), session.render())
    # Encoder, UNet, then the decoder once for each pair of scales.
    order = [name for index, name in enumerate(calls) if not index or calls[index - 1] != name]
    two_passes = ["measure_sample", "process_tiles"] * 2
    decoder = ["process_whole", *two_passes]
    assert order == [*two_passes, "process_whole", "predict", *decoder, *decoder]


def test_tiles_get_the_latents_of_a_constant_map_as_those_of_its_number(monkeypatch):
    """Before the tiles of the decoder, scales are applied outside of the compiled functions."""
    pipeline, decoded = small_upscaler(vae_tile=64).pipeline, []

    def decode(part, latents, tile):
        decoded.append(latents)
        return np.zeros((112, 136, 3), np.float32)

    monkeypatch.setattr(pipeline, "_tiled_vae", decode)
    side = pipeline.base.vae_scale_factor
    shape = (1, 112 // side, 136 // side, pipeline.base.latent_channels)
    arrays = np.random.default_rng(0).normal(size=(3, *shape)).astype(np.float32)
    predictions = Predictions(jnp.asarray(arrays[0]), (jnp.asarray(arrays[1]), jnp.asarray(arrays[2])))
    sem = np.full((*shape[:3], 1), 0.3, np.float32)
    edge = np.where(np.arange(shape[2])[:, None] < 5, 1.5, sem)
    for scales in ((0.8, 0.3), (0.8, sem), (0.8, edge)):
        pipeline.render(predictions, scales, np.zeros((1, 112, 136, 3), np.float32), (112, 132))
    number, constant, half = decoded
    assert np.array_equal(number, constant)
    assert np.array_equal(half[:, 5:], number[:, 5:])
    expected = arrays[0] - 0.8 * arrays[1] - 1.5 * (arrays[2] - arrays[1])
    close(half[:, :5], expected[0, :, :5], 1e-5)


def test_tiles_are_used_when_memory_is_exhausted(monkeypatch):
    monkeypatch.setattr(vae_tiling, "trunk_tiles", lambda backbone: 4)
    notices, sizes = [], []
    upscaler = small_upscaler(vae_tile=256, notice=notices.append)
    runner = upscaler.pipeline.runner
    run = runner.run

    def run_out_of_memory_once(stage, static, *arrays):
        if stage.__name__ in ("encode", "process_tiles"):
            sizes.append(arrays[0].shape[1:3])
            if len(sizes) == 1:
                raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 1 bytes.")
        return run(stage, static, *arrays)

    runner.run = run_out_of_memory_once
    found = upscaler(random_image(36, 32))
    assert notices == ["out of memory without VAE tiles: retrying with tiles of 72 pixels"]
    assert sizes[0] == (144, 128)
    assert found.shape == (144, 128, 3)


DEVICES = """
import numpy as np
from test_inference import random_image
from test_vae_tiles import small_upscaler
from pisa_jax.imaging.image_data import from_array
from pisa_jax.tiling import placements, vae_tiles
vae_tiles.MAX_PASSES = 2
one, two = (small_upscaler(devices=n, vae_tile=64, tile=32, overlap=4) for n in (1, 2))
# An image in tiles, of the VAE and of the UNet, and a batch without.
for batch in ([(20, 17, 0)], [(8, 8, 1), (8, 8, 2)]):
    sources = [from_array(random_image(*size)) for size in batch]
    for a, b in zip(*(u.open_all(sources, 4, None, adjustable=True).render_all(0.7, 0.4) for u in (one, two))):
        np.testing.assert_allclose(a.rgb, b.rgb, rtol=0, atol=1e-5)
print("equal on", two.pipeline.mesh.size)
"""


def test_two_devices_give_the_results_of_one(tmp_path):
    environment = os.environ | {
        "XLA_FLAGS": os.environ["XLA_FLAGS"].replace("count=8", "count=2"),
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "tiling")]),
    }
    done = subprocess.run(
        [sys.executable, "-c", DEVICES], env=environment, capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "equal on 2" in done.stdout


def test_more_devices_than_available_are_refused():
    with pytest.raises(ValueError, match="999 devices are requested, and there are"):
        small_upscaler(devices=999)
