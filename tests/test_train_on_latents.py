"""Training on latents that were encoded in advance, and runs that start from the adapters of a file."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from latent_files import write_latents
from tiny import random_base

from pisa_jax import losses, train_step, training
from pisa_jax.adapters import files, injection
from pisa_jax.adapters.adapter_tree import Adapters
from pisa_jax.config import AdapterSpec, Config, Data, Stage
from pisa_jax.train_step import Batch, Frozen, Objective

SPEC = AdapterSpec(rank=2)
PIX = Stage("pix", steps=2, l2=0.0, latent=1.0, learning_rate=1e-2, spec=SPEC)
SEM = Stage("sem", steps=2, frozen=("pix",), latent=1.0, perceptual=0.1, learning_rate=1e-2, spec=SPEC)


def config(folder, *stages, name="run", **fields):
    """Config of a run on latents of the smallest random model: 8 channels, factor 4."""
    data = Data(source="latents", path=str(folder / "latents"), crop=32, workers=0)
    shared = {"model": "random", "batch_size": 2, "mesh_data": 1, "perceptual": "squeeze", "perceptual_weights": None}
    return Config(out=str(folder / name), stages=stages, data=data, **shared | fields)


@pytest.fixture(scope="module")
def pixel_run(tmp_path_factory):
    """A folder with latents, and the adapter file of a pixel stage."""
    folder = tmp_path_factory.mktemp("runs")
    write_latents(folder / "latents")
    return folder, training.train(config(folder, PIX, name="pix"))


def test_losses_of_latents_are_those_of_the_images_that_they_decode_to():
    base, params = random_base("nano")
    rng = np.random.default_rng(1)
    lq, gt = (jnp.asarray(rng.standard_normal((1, 8, 8, 8)), jnp.float32) for _ in range(2))
    null = jnp.zeros((1, 4, 32))
    frozen = Frozen(params["unet"], None, params["vae"], None, null, null, None, jnp.ones(1000))
    objective = Objective(SPEC, latent=1.0, latents=True)
    adapter = injection.init_adapter(jax.random.key(0), params["unet"], SPEC)  # adds 0
    batch = Batch(lq, gt, jnp.zeros((1, 4), jnp.int32), jnp.zeros(1, bool))
    draws = train_step.draw(jax.random.key(0), base, (20, 499), lq.shape, latents=True)
    assert draws.csd_noise.shape == lq.shape
    _, terms = train_step.loss(adapter, frozen, batch, draws, base, objective)

    z_h = lq - base.predict_noise(params["unet"], lq, 1, null)
    images, truth = (jnp.clip(base.decode(params["vae"], z), -1, 1) for z in (z_h, gt))
    np.testing.assert_allclose(terms["latent"], losses.l2(z_h, gt), rtol=1e-5)
    np.testing.assert_allclose(terms["l2"], losses.l2(images, truth), rtol=1e-5)


def test_a_later_run_builds_on_the_adapter_of_a_file(pixel_run):
    folder, pix_file = pixel_run
    pix = files.load_adapters(pix_file)
    whole = config(folder, SEM, start=str(pix_file), name="sem", save_every=1)
    both = files.load_adapters(training.train(whole))
    assert set(both.trees) == set(both.specs) == {"pix", "sem"}
    assert jax.tree.all(jax.tree.map(np.array_equal, both.trees["pix"], pix.trees["pix"]))

    # Resumed at its last step, the run exports the same adapters.
    (folder / "sem" / training.ADAPTERS_FILE).unlink()
    again = files.load_adapters(training.train(whole, resume=True))
    assert jax.tree.all(jax.tree.map(np.array_equal, again.trees, both.trees))


def test_a_stage_continues_the_adapter_of_its_name(pixel_run):
    folder, pix_file = pixel_run
    pix = files.load_adapters(pix_file).trees["pix"]
    short = dataclasses.replace(PIX, steps=1, learning_rate=1e-6)
    more = files.load_adapters(training.train(config(folder, short, start=str(pix_file), name="more")))
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), more.trees["pix"], pix)
    assert 0 < max(jax.tree.leaves(moved)) < 1e-4


def saved(folder, **specs):
    """Write an adapter file with one layer per adapter; returns its path."""
    trees = {
        name: {"conv_in": {"a": np.zeros((3, 3, 8, spec.rank), np.float32), "b": np.zeros((spec.rank, 32), np.float32)}}
        for name, spec in specs.items()
    }
    files.save_adapters(folder / "start.safetensors", Adapters(trees, specs))
    return str(folder / "start.safetensors")


def test_adapters_that_a_run_cannot_start_from_are_refused(tmp_path):
    write_latents(tmp_path / "latents")
    start = saved(tmp_path, pix=SPEC)
    other = dataclasses.replace(SEM, frozen=("style",))
    with pytest.raises(ValueError, match=r"stage sem builds on style; .*start.* contains pix"):
        training.train(config(tmp_path, other, start=start))
    wider = dataclasses.replace(PIX, spec=AdapterSpec(rank=3))
    with pytest.raises(ValueError, match=r"stage pix continues the adapter in .*rank=2.*rank=3"):
        training.train(config(tmp_path, wider, start=start))
    with pytest.raises(ValueError, match="no earlier stage trains; set start"):
        config(tmp_path, SEM)
    assert not (tmp_path / "run").exists()


def test_latents_of_another_vae_are_refused(tmp_path):
    write_latents(tmp_path / "latents", channels=4)
    with pytest.raises(ValueError, match=r"have 4 channels, and those of the VAE of random 8"):
        training.train(config(tmp_path, PIX))
    with pytest.raises(ValueError, match=r"have 4 channels, and those of the VAE of demo 16"):
        training.train(config(tmp_path, PIX, model="demo"))
    assert not (tmp_path / "run").exists()
