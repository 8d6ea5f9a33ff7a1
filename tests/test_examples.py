"""The examples run as they are: the training loop on a folder of images, and every cell of the notebook."""

import json
import os
import runpy
import subprocess
import sys

import matplotlib as mpl
import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

from pisa_jax.adapters.files import load_adapters
from pisa_jax.data.sources import fake_source
from pisa_jax.sd import random_model


@pytest.fixture
def folder(tmp_path):
    """Three ground-truth images and a tiny random model."""
    source = fake_source(3, 96)
    (tmp_path / "images").mkdir()
    for index in range(3):
        Image.fromarray(source[index].image).save(tmp_path / "images" / f"{index}.png")
    random_model.write_random_model(tmp_path / "model", "nano")
    return tmp_path


def test_own_loop(folder, monkeypatch, capsys):
    out = folder / "out"
    line = ["own_loop.py", folder / "images", "--model", folder / "model", "--out", out]
    monkeypatch.setattr(sys, "argv", [str(part) for part in line])
    runpy.run_path(str(ROOT / "examples" / "own_loop.py"), run_name="__main__")
    assert capsys.readouterr().out.count(": l2 ") == 10
    factors = load_adapters(out / "adapters.safetensors").trees["pix"]["conv_in"]
    assert np.abs(factors["b"]).max() > 0  # it was 0 before training
    with Image.open(out / "upscaled.png") as image:
        assert image.size == (128, 128)


def test_the_notebook_runs_and_shows_its_results():
    notebook = json.loads((ROOT / "examples" / "quickstart.ipynb").read_text())
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] for cell in cells)
    mpl.use("agg")
    names = {}
    for cell in cells:
        exec(compile("".join(cell["source"]), "quickstart.ipynb", "exec"), names)
    assert names["image"].size == (64, 64)
    assert [variant.size for variant in names["variants"]] == [(256, 256)] * 4
    assert np.abs(names["semantic"]).max() > 0


EXAMPLES = {
    "output_gain": ("decomposition", "spec.decomposition"),
    "lora_experts": ("decomposition", "spec.decomposition"),
    "orthogonal_gradients": ("optimizer", "optimizer"),
}


@pytest.mark.slow
@pytest.mark.parametrize("module", EXAMPLES)
def test_an_example_of_ones_own_from_its_file_to_an_upscaled_image(module, tmp_path):
    """The commands of the example, in a folder that holds nothing else."""
    kind, field = EXAMPLES[module]
    (tmp_path / f"{module}.py").write_text((ROOT / "examples" / f"{module}.py").read_text())
    Image.fromarray(fake_source(1, 24)[0].image).save(tmp_path / "photo.png")
    name = f"{module}:{module}"
    train = ["train", "debug", "--out", "run", f"--stages.1.{field}", name]
    infer = ["infer", "-i", "photo.png", "--model", "run/model", "--adapters", "run/adapters.safetensors",
             "--min-size", "64", "--compile-cache", "off", "--scales", "1,0.5"]  # fmt: skip

    def run(*arguments):
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        return subprocess.run([sys.executable, "-m", "pisa_jax", *arguments], cwd=tmp_path, env=environment,
                              capture_output=True, text=True, check=False)  # fmt: skip

    done = run(*train)
    assert done.returncode == 0, done.stderr
    adapters = load_adapters(tmp_path / "run" / "adapters.safetensors")
    assert all(np.abs(layer["s" if "s" in layer else "b"]).max() > 0 for layer in adapters.trees["sem"].values())
    if kind == "decomposition":
        assert adapters.specs["sem"].decomposition == name
        refused = run(*infer)
        assert refused.returncode == 1
        assert f"give --decomposition {name}" in refused.stderr
        infer += ["--decomposition", name]
    done = run(*infer)
    assert done.returncode == 0, done.stderr
    with Image.open(tmp_path / "out" / "photo.png") as image:
        assert image.size == (96, 96)
