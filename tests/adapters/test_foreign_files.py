"""Adapter files of PEFT, diffusers and LyCORIS: recorded with those programs (tests/assets/adapters/record.py)."""

import functools
import json

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import DATA
from tiny import close

from pisa_jax.adapters import injection
from pisa_jax.adapters.fit import check_adapters
from pisa_jax.adapters.foreign_files import FORMATS, load_foreign, save_foreign
from pisa_jax.adapters.foreign_keys import is_foreign
from pisa_jax.cli import convert, inspect
from pisa_jax.runtime.tensor_files import read_tensors, write_safetensors
from pisa_jax.runtime.torch_layout import flax_kernel, flax_module_path
from pisa_jax.runtime.trees import unflatten

RECORDED = DATA / "adapters"
# File -> decomposition that it is read as.
FILES = {
    "peft_lora": "lora",
    "peft_rslora": "lora",
    "peft_dora": "dora",
    "peft_loha": "loha",
    "peft_loha_tucker": "loha",
    "peft_lokr": "lokr",
    "peft_vera": "vera",
    "peft_hra": "hra",
    "peft_oft": "full",
    "peft_oft_neumann": "full",
    "diffusers/pytorch_lora_weights.safetensors": "lora",
    "lycoris_locon.safetensors": "lora",
    "lycoris_locon_tucker.safetensors": "tucker",
    "lycoris_dora.safetensors": "dora",
    "lycoris_loha.safetensors": "loha",
    "lycoris_loha_tucker.safetensors": "loha",
    "lycoris_lokr.safetensors": "lokr",
    "lycoris_lokr_tucker.safetensors": "lokr",
    "lycoris_oft.safetensors": "oft",
    "lycoris_full.safetensors": "full",
}
CONV, SHORT, QUERY, OUT = (
    "down_blocks_0/resnets_0/conv1",
    "down_blocks_0/resnets_0/conv_shortcut",
    "mid_block/attentions_0/transformer_blocks_0/attn1/to_q",
    "mid_block/attentions_0/transformer_blocks_0/attn1/to_out_0",
)


@functools.cache
def weights():
    """The recorded base weights: module path -> kernel and bias in Flax layout."""
    recorded, found = np.load(RECORDED / "weights.npz"), {}
    for key in recorded:
        module, name = key.rsplit(".", 1)
        entry = found.setdefault(flax_module_path(module), {})
        entry["kernel" if name == "weight" else name] = flax_kernel(recorded[key])
    return found


def kernels():
    return {path: layer["kernel"] for path, layer in weights().items()}


def output(kernels):
    """Run the recorded network with other kernels."""

    def conv(path, x):
        kernel = kernels[path]
        layer = nn.Conv(
            kernel.shape[-1], kernel.shape[:2], padding=[(side // 2, side // 2) for side in kernel.shape[:2]]
        )
        return layer.apply({"params": {"kernel": kernel, "bias": weights()[path]["bias"]}}, x)

    x = np.load(RECORDED / "outputs.npz")["image"].transpose(0, 2, 3, 1)
    x = jnp.tanh(conv(SHORT, jnp.tanh(conv(CONV, x))))
    x = jnp.tanh(x @ kernels[QUERY] + weights()[QUERY]["bias"])
    return (x @ kernels[OUT] + weights()[OUT]["bias"]).reshape(len(x), -1, kernels[OUT].shape[-1])


def merged_output(adapters):
    check_adapters(adapters.trees, adapters.specs, {path: kernel.shape for path, kernel in kernels().items()})
    params = unflatten({f"{path}/kernel": kernel for path, kernel in kernels().items()})
    found = injection.merge(params, adapters.trees, adapters.specs, dict.fromkeys(adapters.trees, 1.0))
    return output(injection.kernels_of(found))


def recorded_output(name):
    return np.load(RECORDED / "outputs.npz")[name.removesuffix(".safetensors")]


def test_the_network_without_adapters():
    close(output(kernels()), recorded_output("plain"), 1e-5)


@pytest.mark.parametrize("name", FILES)
def test_outputs_equal_those_of_the_program_that_wrote_the_file(name):
    assert is_foreign(RECORDED / name)
    adapters = load_foreign(RECORDED / name, kernels(), "pix")
    assert adapters.specs["pix"].decomposition == FILES[name]
    expected = recorded_output("peft_lora" if name.startswith("diffusers") else name)
    assert np.abs(expected - recorded_output("plain")).max() > 0.05
    close(merged_output(adapters), expected, 1e-5)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("name", [name for name in FILES if "tucker" not in name and "diffusers" not in name])
def test_written_files_give_the_same_weights(name, form, tmp_path):
    adapters = load_foreign(RECORDED / name, kernels(), "pix")
    target = tmp_path / ("folder" if form == "peft" else "x.safetensors")
    if FILES[name] not in FORMATS[form]:
        with pytest.raises(ValueError, match=f"'{FILES[name]}'; the format {form} has only lora, "):
            save_foreign(target, adapters, "pix", kernels(), form)
        return
    save_foreign(target, adapters, "pix", kernels(), form)
    close(merged_output(load_foreign(target, kernels(), "pix")), merged_output(adapters), 1e-5)
    state = read_tensors(target / "adapter_model.safetensors" if form == "peft" else target)
    for key, alpha in state.items():
        if key.endswith(".alpha") and FILES[name] != "oft":
            assert float(alpha) == read_rank(state, key)


def read_rank(state, key):
    module = key.removesuffix("alpha")
    sizes = {"lora_down.weight": 0, "hada_w1_b": 0, "lokr_w2_b": 0}
    return next((state[module + name].shape[axis] for name, axis in sizes.items() if module + name in state), 1)


def test_keys_and_shapes_are_those_of_the_programs(tmp_path):
    """A file that is read and written again has the keys and shapes of the program; only values of scales differ."""
    for name, form in (("peft_lora", "peft"), ("peft_dora", "peft"), ("peft_loha", "peft"), ("peft_lokr", "peft"),
                       ("peft_hra", "peft"), ("lycoris_locon.safetensors", "kohya"),
                       ("lycoris_dora.safetensors", "kohya"), ("lycoris_loha.safetensors", "kohya"),
                       ("lycoris_lokr.safetensors", "kohya"), ("lycoris_oft.safetensors", "kohya")):  # fmt: skip
        target = tmp_path / name.replace("/", "_")
        save_foreign(target, load_foreign(RECORDED / name, kernels(), "pix"), "pix", kernels(), form)
        inner = "adapter_model.safetensors" if form == "peft" else ""
        found, expected = (
            {key: value.shape for key, value in read_tensors(path / inner if inner else path).items()}
            for path in (target, RECORDED / name)
        )
        assert found == expected, name


def test_what_cannot_be_read_is_named(tmp_path):
    state = dict(read_tensors(RECORDED / "lycoris_locon.safetensors"))
    write_safetensors(tmp_path / "x.safetensors", {**state, "lora_te_text_model.alpha": np.float32(1)}, {})
    with pytest.raises(ValueError, match=r"1 tensors belong to no layer of the base model.*lora_te_text_model.alpha"):
        load_foreign(tmp_path / "x.safetensors", kernels(), "pix")
    mixed = {key: value for key, value in state.items() if "to_q" not in key}
    other = {key: value for key, value in read_tensors(RECORDED / "lycoris_loha.safetensors").items() if "to_q" in key}
    write_safetensors(tmp_path / "x.safetensors", mixed | other, {})
    with pytest.raises(ValueError, match=r"one decomposition for all layers, found .*loha: mid_block.*to_q"):
        load_foreign(tmp_path / "x.safetensors", kernels(), "pix")
    shapes = {path: Shape(kernel.shape) for path, kernel in kernels().items()}
    shapes = {path: Shape(kernel.shape) for path, kernel in kernels().items()}
    with pytest.raises(ValueError, match="depends on the weights of the base model; give it"):
        load_foreign(RECORDED / "peft_dora", shapes, "pix")
    biased = read_tensors(RECORDED / "lycoris_full.safetensors")
    biased = {key: value + ("diff_b" in key) for key, value in biased.items()}
    write_safetensors(tmp_path / "x.safetensors", biased, {})
    with pytest.raises(ValueError, match=r"4 tensors belong to no layer .*diff_b"):
        load_foreign(tmp_path / "x.safetensors", kernels(), "pix")


class Shape:
    def __init__(self, shape):
        self.shape = shape


def test_without_alpha_the_scale_is_1(tmp_path):
    state = read_tensors(RECORDED / "lycoris_locon.safetensors")
    write_safetensors(tmp_path / "x.safetensors", {k: v for k, v in state.items() if not k.endswith("alpha")}, {})
    spec = load_foreign(tmp_path / "x.safetensors", kernels(), "pix").specs["pix"]
    assert (spec.rank, spec.alpha) == (3, 3.0)


def test_the_commands_read_and_write_all_formats(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(convert, "base_kernels", lambda model: kernels())
    adapters, folder = tmp_path / "a.safetensors", tmp_path / "peft"
    assert convert.main([str(RECORDED / "lycoris_dora.safetensors"), str(adapters), "--adapter", "face"]) == 0
    assert "face: dora, rank 3" in capsys.readouterr().out
    assert convert.main([str(adapters), str(folder), "--to", "peft"]) == 0
    assert json.loads((folder / "adapter_config.json").read_text())["use_dora"] is True
    assert convert.main([str(adapters), str(tmp_path / "o.safetensors"), "--to", "original"]) == 1
    assert "the original PiSA-SR supports only lora" in capsys.readouterr().err
    assert inspect.main([str(adapters), str(adapters)]) == 0
    assert "no differences" in capsys.readouterr().out
    assert inspect.main([str(adapters), str(RECORDED / "peft_lora")]) == 1
    out = capsys.readouterr().out
    assert "face, norm of the factors: down_blocks_0 " in out
    assert "face: only in the first file" in out
