"""The demo model: the first run of `infer.py`, image quality, and the size of the weights."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import DATA, ROOT
from PIL import Image
from safetensors import safe_open

from pisa_jax import losses
from pisa_jax.cli.train import read
from pisa_jax.imaging.matlab_resize import matlab_bicubic
from pisa_jax.metrics import psnr_ssim, registry
from pisa_jax.sd import pretrained
from pisa_jax.sd.pretrained import DEMO

SAMPLES = sorted((DEMO / "samples").iterdir())
PAIRS = ("p1_s0", "p1_s0.5", "p1_s1")


@pytest.fixture(scope="module")
def first_run(tmp_path_factory):
    """The folder in which `python infer.py` was run, and its output."""
    folder, command = tmp_path_factory.mktemp("first"), [sys.executable, ROOT / "infer.py"]
    # conftest.py's flags make programs that compile quickly and run slowly.
    named = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    done = subprocess.run(command, cwd=folder, env=named, capture_output=True, text=True, check=True)
    return folder, done.stdout


def test_infer_without_arguments_upscales_the_samples(first_run):
    folder, output = first_run
    assert f"{len(SAMPLES)} ok of {len(SAMPLES)}" in output
    assert "results in out" in output
    expected = {f"{path.stem}_{name}.png" for path in SAMPLES for name in (*PAIRS, "grid")}
    assert {path.name for path in (folder / "out").iterdir()} == expected
    for path in SAMPLES:
        with Image.open(path) as small, Image.open(folder / "out" / f"{path.stem}_p1_s1.png") as large:
            assert large.size == (4 * small.width, 4 * small.height)


def test_more_fidelity_than_bicubic_and_less_with_details(first_run):
    """Means over the samples, which were not used for training (docs/results.md has larger sets)."""
    perceptual = registry.make_metrics(["perceptual"])["perceptual"]
    found = {name: [] for name in ("bicubic", *PAIRS)}
    for path in SAMPLES:
        truth = np.asarray(Image.open(DATA / "demo" / f"{path.stem}.jpg"))
        results = {name: Image.open(first_run[0] / "out" / f"{path.stem}_{name}.png") for name in PAIRS}
        results["bicubic"] = matlab_bicubic(np.asarray(Image.open(path)), 4)
        for name, image in results.items():
            image = np.asarray(image)
            found[name].append((psnr_ssim.psnr(image, truth), perceptual(image, truth)))
    psnr, distance = ({name: np.mean(values, axis=0)[i] for name, values in found.items()} for i in (0, 1))
    assert psnr["p1_s0"] > psnr["bicubic"] + 0.2
    assert psnr["p1_s0"] > psnr["p1_s0.5"] > psnr["p1_s1"]
    assert max(distance[name] for name in PAIRS) < distance["bicubic"] - 0.4


def test_the_prior_uses_its_prompts():
    """Noise is predicted better with a positive prompt on clean images and with the negative one on degraded images."""
    prior = pretrained.load_pretrained("demo")
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), prior.params)
    prompts = [
        "photograph, sharp focus, high quality, highly detailed",
        read(["configs/demo_v1.py"])[0].negative_prompt,
    ]
    words = prior.base.encode_text(params["text"], jnp.asarray(prior.tokenize(prompts)))
    alphas, middle = losses.ddpm_schedule().alphas_cumprod, np.s_[128:384, 128:384]
    sets = {
        "clean": [np.asarray(Image.open(DATA / "demo" / f"{path.stem}.jpg"))[middle] for path in SAMPLES],
        "degraded": [matlab_bicubic(np.asarray(Image.open(path)), 4)[middle] for path in SAMPLES],
    }
    encode, eps = jax.jit(prior.base.encode), jax.jit(prior.base.predict_noise)

    def error(latents, prompt):
        noise, timesteps = jax.random.normal(jax.random.key(0), latents.shape), jnp.full(len(latents), 300)
        noisy = losses.add_noise(latents, noise, timesteps, alphas)
        return jnp.mean((eps(params["unet"], noisy, timesteps, jnp.stack([prompt] * len(latents))) - noise) ** 2)

    negative_for_positive = {}
    for name, images in sets.items():
        latents = encode(params["vae"], jnp.asarray(np.stack(images) / 127.5 - 1, jnp.float32), None)
        positive, negative = (error(latents, prompt) for prompt in words)
        negative_for_positive[name] = negative / positive
    assert negative_for_positive["clean"] > 1.1
    assert negative_for_positive["degraded"] < 0.92


def test_weights_are_small_and_half_precision():
    assert sum(path.stat().st_size for path in DEMO.rglob("*") if path.is_file()) <= 20e6
    files = sorted(DEMO.rglob("*.safetensors"))
    assert len(files) == 4
    for path in files:
        with safe_open(path, "numpy") as tensors:
            assert {tensors.get_slice(name).get_dtype() for name in tensors.keys()} == {"F16"}  # noqa: SIM118
