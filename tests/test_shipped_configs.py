"""Configs with other decompositions and more adapters, at a tiny scale, from training to an upscaled image."""

import sys

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

from pisa_jax.adapters.files import load_adapters
from pisa_jax.cli import infer, train
from pisa_jax.data.sources import fake_source

TINY = [
    *("--model", "random", "--data.crop", "64", "--data.workers", "0", "--batch-size", "2", "--mesh-data", "1"),
    *("--perceptual", "squeeze", "--perceptual-weights", "None", "--dtype", "float32", "--log-every", "1"),
]


def train_tiny(config, stages, folder, monkeypatch):
    """Run `python train.py` with two steps of every stage; returns the run directory."""
    steps = [word for index in range(stages) for word in (f"--stages.{index}.steps", "2")]
    # Rates at which two steps change the predictions visibly.
    rates = [word for index in range(stages) for word in (f"--stages.{index}.learning-rate", "0.01")]
    line = [str(ROOT / "configs" / config), "--out", str(folder / "run"), *TINY, *steps, *rates]
    monkeypatch.setattr(sys, "argv", ["train.py", *line])
    assert train.main() == 0
    return folder / "run"


def upscale(folder, run, scales):
    """Run `python infer.py` on an image at several scales; returns the results."""
    Image.fromarray(fake_source(1, 24)[0].image).save(folder / "photo.png")
    line = ["-i", folder / "photo.png", "-o", folder / "out", "--model", run / "model", "--min-size", "64"]
    line += ["--adapters", run / "adapters.safetensors", "--compile-cache", "off", "--scales", *scales]
    assert infer.main([str(word) for word in line]) == 0
    images = []
    for path in sorted((folder / "out").glob("photo*.png")):
        with Image.open(path) as image:
            images.append(np.asarray(image.convert("RGB")))
    return images


@pytest.mark.slow
def test_dora(tmp_path, monkeypatch):
    run = train_tiny("dora.py", 2, tmp_path, monkeypatch)
    adapters = load_adapters(run / "adapters.safetensors")
    assert [spec.decomposition for spec in adapters.specs.values()] == ["dora", "dora"]
    assert all(np.abs(layer["m"]).max() > 0 for tree in adapters.trees.values() for layer in tree.values())
    images = upscale(tmp_path, run, ["1,1", "1,0", "0.5,1.5"])
    assert [image.shape for image in images] == [(96, 96, 3)] * 3
    assert len({image.tobytes() for image in images}) == 3


@pytest.mark.slow
def test_three_adapters(tmp_path, monkeypatch):
    run = train_tiny("three_adapters.py", 3, tmp_path, monkeypatch)
    adapters = load_adapters(run / "adapters.safetensors")
    assert list(adapters.specs) == ["pix", "sem", "face"]
    assert dict(adapters.trained_on) == {"sem": ("pix",), "face": ("pix", "sem")}
    images = upscale(tmp_path, run, ["1,1,1", "1,1,0", "1,0,0", "0.5,0.7,1.5"])
    assert [image.shape for image in images] == [(96, 96, 3)] * 4
    assert len({image.tobytes() for image in images}) == 4
