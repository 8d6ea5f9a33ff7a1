import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import DATA, SHARED, golden
from PIL import Image
from recorded import recorded_runs, recorded_upscaler, run_deviations
from tiny import close, nhwc, random_image, random_upscaler, recorded_adapters, recorded_model

from pisa_jax import Settings, Upscaler, inference, model
from pisa_jax.imaging import network_input
from pisa_jax.imaging.image_data import from_array, to_array
from pisa_jax.imaging.image_reading import read_image


def parameters(runs, slow=()):
    """One parameter per run; slow ones are of `slow` sizes, or recorded outside the repository."""
    marks = lambda name: [pytest.mark.slow] * (name not in COMMITTED or name.startswith(slow))  # noqa: E731
    return [pytest.param(run, id=name, marks=marks(name)) for name, run in runs.items()]


COMMITTED = recorded_runs(DATA)
RUNS = recorded_runs(SHARED) | COMMITTED
# Each compiles everything for a size of its own; the images that they wrote are compared by default all the same.
OTHER_SIZES = ("D_gray", "C_x3", "A_x2", "G_x4", "E_lattile20")
# The original works on sizes rounded down to a multiple of 8, which these are not; this package keeps the exact size.
ROUNDED_SIZES = ("B_", "C_x3", "G_x4")
PAIRS = ((1.0, 1.0), (1.0, 0.0), (0.0, 1.0), (0.4, 1.3))


def render_all(session, pairs):
    return [session.render(*pair) for pair in pairs]


@pytest.mark.parametrize("run", parameters(RUNS, slow=OTHER_SIZES))
def test_whole_run_equals_the_original(run):
    deviations = run_deviations(run)
    assert {name: each for name, each in deviations.items() if not each.error <= each.tolerance} == {}
    assert {"encoded", "model_pred", "x_denoised"} <= deviations.keys()


@pytest.mark.parametrize(
    "run",
    parameters(
        {name: run for name, run in RUNS.items() if name.endswith("mode") and not name.startswith(ROUNDED_SIZES)}
    ),
)
def test_written_image_equals_the_original(run, monkeypatch):
    args = run["args"]
    # The original writes color images for gray inputs.
    monkeypatch.setattr(network_input, "COLORLESS", 0)
    source = dataclasses.replace(read_image(golden(f"lr/{run['image']}.png")), gray=False)
    prepared, plan = network_input.prepare_input(source, args["upscale"], args["process_size"], 8)
    theirs = nhwc(np.load(golden(f"infer/{run['inputs']}.npz"))["c_t_uint8"])[0]
    ours = np.round((prepared[: plan.working[0], : plan.working[1]] + 1) / 2 * 255)
    assert np.mean(np.abs(ours - theirs) <= 2) >= 0.995
    assert np.array_equal(ours, theirs)
    for align in run["aligns"]:
        upscaler = recorded_upscaler(
            color_fix="none" if align == "nofix" else align,
            min_size=args["process_size"],
            tile=args["latent_tiled_size"],
            overlap=args["latent_tiled_overlap"],
        )
        session = upscaler.open_all([source], args["upscale"], None, adjustable=not args["default"])
        [result] = session.render_all(args["lambda_pix"], args["lambda_sem"])
        with Image.open(golden(f"infer/{run['name']}__mode__{align}.png")) as written:
            expected = np.asarray(written.convert("RGB"), int)
        difference = np.abs(to_array(result, np.uint8).astype(int).reshape(*result.rgb.shape[:2], -1) - expected)
        assert np.mean(difference <= 3) >= 0.995, (align, np.bincount(difference.ravel()))


def test_default_pair_equals_adjustable_and_takes_one_unet_pass():
    upscaler = random_upscaler()
    batch = np.float32(random_image(32, 40)[None]) / 127.5 - 1
    latents = upscaler.pipeline.encode(batch, None)
    one, two = (upscaler.pipeline.predict(latents, adjustable) for adjustable in (False, True))
    close(one.eps_full, two.eps_full, 1e-5)
    assert np.abs(np.asarray(two.eps_full) - two.eps_pix).max() > 0.01
    assert one.eps_pix.shape == one.eps_full.shape

    compiled = upscaler.pipeline.runner.compiled.entries.items()
    flops = {key[1][2]: c.cost_analysis()["flops"] for key, c in compiled if key[0].__name__ == "predict"}
    assert 0.4 < flops[((1.0,),)] / flops[((0.0,), (1.0,))] < 0.6


def test_new_scales_and_new_images_of_a_size_compile_nothing():
    compiled = []
    upscaler = random_upscaler(on_compile=lambda what, seconds: compiled.append(what))
    render_all(upscaler.open(random_image(8, 9)), PAIRS)
    stages = len(compiled)
    assert stages == 3  # encoder, UNet, decoder
    render_all(upscaler.open(random_image(8, 9, seed=1)), [(0.123, -0.5), (0.9, 0.8)])
    upscaler(random_image(8, 9, seed=2), scales=(0.3, 0.3))
    assert len(compiled) == stages
    upscaler(random_image(9, 9))
    assert len(compiled) > stages


def test_another_pair_costs_one_decode():
    upscaler = random_upscaler()
    calls = []
    runner = upscaler.pipeline.runner
    run = runner.run
    runner.run = lambda stage, *args: calls.append(stage.__name__) or run(stage, *args)
    results = render_all(upscaler.open(random_image(8, 8)), PAIRS)
    assert calls == ["encode", "predict", *["render_padded"] * len(PAIRS)]
    assert len({result.tobytes() for result in results}) == len(PAIRS)


def test_scales_zero_are_the_round_trip_through_the_vae():
    upscaler = random_upscaler(color_fix="none")
    source = np.float32(random_image(8, 8)) / 255
    prepared, _ = network_input.prepare_input(from_array(source), 4, 32, 8)
    base, weights = upscaler.pipeline.base, upscaler.pipeline.runner.weights
    latents = base.encode(weights.vae, jnp.asarray(prepared[None]), None)
    expected = np.clip(base.decode(weights.vae, latents)[0], -1, 1)
    found = upscaler(source, scales=(0.0, 0.0))
    close(found * 2 - 1, expected, 1e-4)


def test_batches_equal_single_images():
    upscaler = random_upscaler(tile=4, overlap=1)
    sources = [from_array(random_image(8, 10, seed)) for seed in range(3)]
    together = upscaler.open_all(sources, 4, 5, adjustable=True).render_all(0.8, 0.6)
    for source, result in zip(sources, together, strict=True):
        [alone] = upscaler.open_all([source], 4, 5, adjustable=True).render_all(0.8, 0.6)
        close(result.rgb, alone.rgb, 1e-5)


def test_a_seed_is_honoured_and_none_is_deterministic():
    upscaler = random_upscaler()
    source = random_image(8, 8)
    plain, again, three, four = (upscaler(source, seed=seed) for seed in (None, None, 3, 4))
    assert np.array_equal(plain, again)
    assert np.array_equal(three, upscaler(source, seed=3))
    assert not np.array_equal(three, plain)
    assert not np.array_equal(three, four)


def test_tiles_change_little_and_one_tile_nothing():
    whole, split = random_upscaler(tile=0), random_upscaler(tile=6, overlap=2)
    covering = random_upscaler(tile=8, overlap=2)
    source = random_image(8, 8)
    assert np.array_equal(whole(source), covering(source))
    assert not np.array_equal(whole(source), split(source))


@pytest.mark.parametrize("size", [(3, 40), (40, 3), (1, 1)], ids=str)
def test_sides_below_the_tile_and_the_overlap(size):
    # The original crashes on a side below the tile and loops forever on one below the overlap.
    out = random_upscaler(tile=8, overlap=5, min_size=1)(random_image(*size), scale=4)
    assert out.shape == (4 * size[0], 4 * size[1], 3)


@pytest.mark.parametrize("scale", [1, 1.5, 2.37, 4])
def test_exact_output_size_and_kind(scale):
    upscaler = random_upscaler()
    source = random_image(11, 13)
    expected = (round(11 * scale), round(13 * scale), 3)
    out = upscaler(source, scale)
    assert (out.shape, out.dtype) == (expected, np.uint8)
    as_image = upscaler(Image.fromarray(source), scale)
    assert np.array_equal(np.asarray(as_image), out)


def test_images_are_paths_and_jax_arrays_and_lists_too(tmp_path):
    upscaler, source = random_upscaler(), random_image(8, 9)
    Image.fromarray(source).save(tmp_path / "a.png")
    expected = upscaler(source)
    for path in (tmp_path / "a.png", str(tmp_path / "a.png")):
        assert np.array_equal(np.asarray(upscaler(path)), expected)
    on_device = upscaler(jnp.asarray(source))
    assert isinstance(on_device, jax.Array)
    assert on_device.dtype == jnp.uint8
    assert np.array_equal(on_device, expected)
    several = upscaler([source, Image.fromarray(source)])
    assert isinstance(several[1], Image.Image)
    assert all(np.array_equal(np.asarray(result), expected) for result in several)
    assert upscaler(jnp.asarray(source, jnp.bfloat16) / 255).dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"scales": (float("nan"), 1.0)}, ValueError, "scales is .nan, 1.0.; both must be finite"),
        ({"scales": (1.0, 1e39)}, ValueError, "scales is .*; both must be finite"),
        ({"scales": (1.0, 1.0, 0.2)}, ValueError, "scales is .*; expected two numbers .pix, sem."),
        ({"seed": 2**64}, ValueError, "seed is 18446744073709551616; allowed are None and integers of 0 to"),
        ({"seed": -1}, ValueError, "seed is -1"),
        ({"image": [random_image(8, 8), 7]}, TypeError, "cannot upscale an object of type int; give a path"),
        ({"image": "missing.png"}, FileNotFoundError, "missing.png"),
    ],
)
def test_wrong_inputs_are_refused_before_the_work(options, error, message):
    upscaler = random_upscaler()
    with pytest.raises(error, match=message):
        upscaler(**({"image": random_image(8, 8)} | options))
    assert not upscaler.pipeline.runner.compiled.entries


def test_scales_of_a_session_are_finite():
    upscaler = random_upscaler()
    session = upscaler.open(random_image(8, 8))
    with pytest.raises(ValueError, match="both must be finite"):
        session.render(1.0, float("inf"))


def test_all_bits_of_a_seed_count():
    base = random_upscaler().pipeline.base
    low, high, key = (model.posterior_noise(base, (1, 32, 32, 3), seed) for seed in (5, 2**32 + 5, 2**64 - 1))
    spatial = 32 // base.vae_scale_factor
    assert np.array_equal(low, jax.random.normal(jax.random.key(5), (1, spatial, spatial, base.latent_channels)))
    assert not np.array_equal(low, high)
    assert np.isfinite(key).all()


def test_a_prompt_that_is_cut_is_reported():
    loaded = recorded_model()
    loaded, adapters = loaded._replace(params=jax.device_get(loaded.params)), recorded_adapters()
    notices: list[str] = []
    inference.make_weights(loaded, adapters, "a photo", notices.append)
    assert notices == []
    inference.make_weights(loaded, adapters, "word " * 100, notices.append)
    [notice] = notices
    assert "tokens and is cut: the text encoder takes 77" in notice


def test_wrong_settings_are_refused():
    with pytest.raises(
        ValueError, match="unknown color fix 'adian'; use one of adain, wavelet, none; did you mean 'adain'"
    ):
        Settings(color_fix="adian")
    with pytest.raises(ValueError, match=r"overlap is 96; with tile 96 it must be in 0\.\.95"):
        Settings(tile=96, overlap=96)
    with pytest.raises(ValueError, match=r"no adapters: give the pisa_sr.pkl"):
        Upscaler.load("folder")
