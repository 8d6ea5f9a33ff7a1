"""benchmarks/decompositions.py: equal parameter counts, schedule, and a tiny study that is not repeated."""

import importlib
import json
import sys

import pytest
from conftest import ROOT
from PIL import Image

from pisa_jax.data.sources import fake_source
from pisa_jax.sd import random_model


@pytest.fixture
def study(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("decompositions")


KERNELS = {"conv": (3, 3, 64, 96), "to_q": (96, 96), "ff": (96, 384)}


def test_the_ranks_match_the_parameters_of_lora(study):
    budget = study.count(study.AdapterSpec("lora", 4), KERNELS)
    assert budget == 4 * (9 * 64 + 96) + 4 * (96 + 96) + 4 * (96 + 384)
    assert study.matching_spec("lora", KERNELS, 4).rank == 4
    assert study.matching_spec("loha", KERNELS, 4).rank == 2  # twice the factors
    for name in study.OPTIONS:
        spec = study.matching_spec(name, KERNELS, 4)
        assert spec.alpha == spec.rank
        assert abs(study.count(spec, KERNELS) / budget - 1) < 0.2, name


def test_the_learning_rate_rises_and_falls(study):
    rates = [float(study.learning_rate(index, 100, 2.0)) for index in range(100)]
    assert rates[0] == pytest.approx(2 / study.WARMUP)
    assert max(rates) == pytest.approx(2, rel=0.02)
    assert rates[-1] < 0.01


@pytest.mark.slow
def test_a_tiny_study_is_resumed_and_not_repeated(study, tmp_path, monkeypatch, capsys):
    (tmp_path / "photos").mkdir()
    for index in range(2):
        Image.fromarray(fake_source(2, 160)[index].image).save(tmp_path / "photos" / f"{index}.png")
    random_model.write_random_model(tmp_path / "model", "nano")
    line = ["--photos", tmp_path / "photos", "--held-out", tmp_path / "photos", "--out", tmp_path / "out", "--model",
            tmp_path / "model", "--decompositions", "lora", "loha", "--rank", "2", "--seeds", "1", "--steps", "3", "2",
            "--pairs", "4", "--images", "1"]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["decompositions.py", *map(str, line)])
    study.main()
    tables = capsys.readouterr().out
    assert "| `loha`, rank " in tables.partition("Stage `sem`, 2 steps")[2]
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*-*.json")}
    assert len(files) == 2 * 2 * (3 + 1)  # stages, decompositions, pilot runs and one seed
    record = json.loads(next(path for path in files if path.name.startswith("sem-loha-0-")).read_text())
    assert record["seconds"] > 0
    assert record["perceptual"] > 0
    study.main()
    assert capsys.readouterr().out.count("Stage `") == 2
    assert {path: path.stat().st_mtime_ns for path in files} == files
