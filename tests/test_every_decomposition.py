"""The debug config with each decomposition of the kit: training of both stages, then an upscaled image."""

import itertools
import json

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image
from safetensors.numpy import load_file

from pisa_jax import training
from pisa_jax.adapters.files import load_adapters
from pisa_jax.adapters.registry import DECOMPOSITIONS
from pisa_jax.cli import infer, train
from pisa_jax.data.sources import fake_source
from pisa_jax.runtime import distributed

DEBUG = str(ROOT / "configs" / "debug.py")


def both_stages(field, value):
    return [part for index in (0, 1) for part in (f"--stages.{index}.{field}", str(value))]


@pytest.mark.slow
@pytest.mark.parametrize("name", DECOMPOSITIONS)
def test_it_trains_and_its_adapters_upscale(name, tmp_path, capsys):
    """At a learning rate at which four steps are visible."""
    run, photo, out = tmp_path / "run", tmp_path / "photo.png", tmp_path / "out"
    Image.fromarray(fake_source(1, 24)[0].image).save(photo)
    chosen = [*both_stages("spec.decomposition", name), *both_stages("learning-rate", 0.01)]
    assert train.main([DEBUG, "--out", str(run), *chosen]) == 0, capsys.readouterr().err
    adapters = load_adapters(run / "adapters.safetensors")
    assert {key: spec.decomposition for key, spec in adapters.specs.items()} == {"pix": name, "sem": name}

    line = ["-i", photo, "-o", out, "--model", run / "model", "--adapters", run / "adapters.safetensors"]
    line += ["--scales", "0,0", "1,0", "1,1", "--min-size", "64", "--compile-cache", "off"]
    line += ["--json", tmp_path / "report.json"]
    assert infer.main([str(part) for part in line]) == 0, capsys.readouterr().err
    assert "another base model" not in capsys.readouterr().err
    assert json.loads((tmp_path / "report.json").read_text())
    images = [np.asarray(Image.open(path), np.int32) for path in sorted(out.iterdir())]
    assert [image.shape for image in images] == [(96, 96, 3)] * 3
    assert all(np.abs(one - other).max() > 0 for one, other in itertools.pairwise(images))


@pytest.mark.slow
def test_sharded_full_matrices_after_a_restart(tmp_path, monkeypatch):
    """The debug run over two devices, stopped in both stages: its bits are those of a run without a stop."""
    monkeypatch.setattr(distributed, "MIN_FACTOR_SIZE_TO_SHARD", 2**10)
    fields = [*both_stages("spec.decomposition", "full"), "--mesh-data", "1", "--mesh-fsdp", "2", "--ema", "0.5"]

    def config(out):
        return train.read([DEBUG, "--out", str(tmp_path / out), *fields])[0]

    shares, compile_step = [], training.jit_train_step

    def observed(*given):
        factors = (tree["conv_in"]["w"] for tree in (given[-1].adapter, given[-1].ema))
        shares.extend(leaf.addressable_shards[0].data.size / leaf.size for leaf in factors)
        return compile_step(*given)

    monkeypatch.setattr(training, "jit_train_step", observed)
    whole = training.train(config("whole"))
    assert shares == [0.5] * 4
    stops = [3, 6]
    monkeypatch.setattr(training, "asked_to_stop", lambda run, step: step in stops)
    for index in range(len(stops)):
        with pytest.raises(training.Stop):
            training.train(config("stopped"), resume=index > 0)
    again = training.train(config("stopped"), resume=True)
    found, expected = load_file(again), load_file(whole)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)
    assert max(np.abs(value).max() for value in expected.values()) > 1e-4
