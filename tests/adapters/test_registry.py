"""Decompositions by name, those of other modules, and their options."""

import sys

import jax
import numpy as np
import pytest
from conftest import ROOT

from pisa_jax.adapters import fit, injection, registry
from pisa_jax.config import AdapterSpec

OWN = "output_gain:output_gain"


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    """`examples/output_gain.py` in the working directory, and not imported."""
    monkeypatch.delitem(sys.modules, "output_gain", raising=False)
    (tmp_path / "output_gain.py").write_text((ROOT / "examples" / "output_gain.py").read_text())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if not path.endswith("examples")])
    yield
    sys.modules.pop("output_gain", None)  # monkeypatch restores that of other tests


def test_unknown_names_are_reported_with_the_known_ones():
    with pytest.raises(ValueError, match=r"'lorra', known: lora, rslora, .*; did you mean 'lora'\?; one of your own"):
        registry.get_decomposition(AdapterSpec("lorra"))


def test_unknown_options_are_reported_with_the_known_ones():
    with pytest.raises(ValueError, match=r"'lokr' has no option 'facotr', it has factor; did you mean 'factor'\?"):
        registry.get_decomposition(AdapterSpec("lokr", options=(("facotr", 8),)))
    with pytest.raises(ValueError, match="'vera' has no option 'seed', it has none"):
        registry.get_decomposition(AdapterSpec("vera", options=(("seed", 8),)))


def test_the_module_of_a_decomposition_is_imported_on_request_only(own_module):
    with pytest.raises(ValueError, match=f"not imported, .*: give --decomposition {OWN} with the module in"):
        registry.get_decomposition(AdapterSpec(OWN))
    assert "output_gain" not in sys.modules
    registry.import_decomposition(OWN)
    functions = registry.get_decomposition(AdapterSpec(OWN, options=(("start", 0.5),)))
    kernel = np.ones((3, 4), np.float32)
    np.testing.assert_array_equal(functions.delta(functions.init(jax.random.key(0), kernel, 1), kernel), 0.5 * kernel)
    with pytest.raises(ValueError, match="has no option 'begin', it has start"):
        registry.get_decomposition(AdapterSpec(OWN, options=(("begin", 0.5),)))


def test_a_missing_module_is_reported_with_the_fix(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ValueError, match="'my_waves:waves': No module named 'my_waves'; put the file of the module into"
    ):
        registry.import_decomposition("my_waves:waves")


@pytest.mark.parametrize("name", ["os:system", "subprocess:run", "pathlib:Path", "pisa_jax.adapters.lora:nothing"])
def test_a_name_in_a_file_calls_no_other_function(name):
    with pytest.raises(ValueError, match=r"is no decomposition: .* needs a function"):
        registry.get_decomposition(AdapterSpec(name, options=(("args", "touch x"),)))


def test_layers_that_a_method_cannot_adapt_are_listed():
    params = {"conv_out": {"kernel": np.zeros((3, 3, 8, 7))}, "to_q": {"kernel": np.zeros((8, 6))}}
    with pytest.raises(
        ValueError, match=r"'oft' cannot adapt 1 of 2 layers; .*conv_out \(3, 3, 8, 7\): 7 outputs have"
    ):
        injection.check_spec(params, AdapterSpec("oft", rank=3))
    with pytest.raises(ValueError, match=r"'hra' cannot adapt 2 of 2 layers; .*rank 3 is odd"):
        injection.check_spec(params, AdapterSpec("hra", rank=3))
    with pytest.raises(ValueError, match=r"'pissa' cannot adapt 1 of 2 layers; .*to_q .*rank 7 is more than"):
        injection.init_adapter(jax.random.key(0), params, AdapterSpec("pissa", rank=7))
    with pytest.raises(ValueError, match="rank_by_target: the pattern 'attn' matches none of 2 paths"):
        injection.check_spec(params, AdapterSpec(rank_by_target=(("attn", 2),)))


def test_kinds_of_layers(monkeypatch):
    functions = registry.get_decomposition(AdapterSpec())._replace(kinds=("dense",))
    monkeypatch.setitem(registry.DECOMPOSITIONS, "dense_only", lambda alpha: functions)
    with pytest.raises(ValueError, match="conv layers are not supported, only dense"):
        fit.expected_factors(AdapterSpec("dense_only"), {"conv_in": (3, 3, 4, 8), "to_q": (4, 4)})
