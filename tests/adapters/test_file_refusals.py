"""Invalid adapter files are refused with messages that name the problem."""

import json
import os
import pickle

import numpy as np
import pytest
from conftest import golden
from small_adapters import CONV, DENSE, KERNELS, original_state, random_adapters

from pisa_jax.adapters import files, pisa_sr_file
from pisa_jax.adapters.files import load_adapters, save_adapters
from pisa_jax.adapters.fit import check_adapters, check_finite
from pisa_jax.config import AdapterSpec
from pisa_jax.runtime.tensor_files import read_metadata, read_tensors, write_safetensors
from pisa_jax.runtime.torch_pickle import UnsafePickleError, read_torch
from pisa_jax.runtime.trees import flatten


def refused(path, *parts):
    with pytest.raises(ValueError, match=r"x\.safetensors") as error:
        load_adapters(path)
    for part in parts:
        assert part in str(error.value)


def unfit(path, *parts):
    """Files of this project's format are checked with the layers of the base model."""
    adapters = load_adapters(path)
    with pytest.raises(ValueError, match="expected") as error:
        check_adapters(adapters.trees, adapters.specs, KERNELS)
    for part in parts:
        assert part in str(error.value)


def rewrite(path, tensors, adapters):
    metadata = files._format_metadata(adapters) if adapters else {}
    write_safetensors(path, tensors, metadata)
    return path


def ours(adapters):
    return flatten(adapters.trees)


def test_a_missing_factor(tmp_path):
    adapters = random_adapters()
    tensors = ours(adapters)
    del tensors[f"sem/{CONV}/b"]
    path = rewrite(tmp_path / "x.safetensors", tensors, adapters)
    unfit(path, "adapter 'sem'", "expected 6, found 5", f"missing {CONV}/b")
    state = original_state(adapters, tmp_path)
    del state["down_blocks.0.resnets.0.conv1.lora_A.default_encoder_pix.weight"]
    refused(rewrite(path, state, None), "adapter 'pix'", f"missing {CONV}/a")


def test_a_mistyped_factor(tmp_path):
    adapters = random_adapters()
    tensors = ours(adapters)
    tensors[f"pix/{DENSE}/A"] = tensors.pop(f"pix/{DENSE}/a")
    path = rewrite(tmp_path / "x.safetensors", tensors, adapters)
    unfit(path, f"missing {DENSE}/a", f"unexpected {DENSE}/A", f"did you mean '{DENSE}/a'")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite(value):
    adapters = random_adapters()
    check_finite(adapters.trees)
    adapters.trees["sem"][CONV]["b"].flat[-1] = value
    with pytest.raises(ValueError, match=f"1 factors of the adapters hold values that are not finite: sem: {CONV}/b;"):
        check_finite(adapters.trees)


def test_keys_of_other_formats(tmp_path):
    path = rewrite(tmp_path / "x.safetensors", {"encoder.layers.0.weight": np.ones(2)}, None)
    refused(path, "'encoder.layers.0.weight' is not an adapter key", "pix/conv_in/a", "conv_in.lora_A.default_encoder")


def test_a_module_in_the_wrong_part_of_the_unet(tmp_path):
    state = original_state(random_adapters(), tmp_path)
    right = "down_blocks.0.resnets.0.conv1.lora_A.default_encoder_pix.weight"
    wrong = right.replace("encoder", "others")
    state[wrong] = state.pop(right)
    refused(
        rewrite(tmp_path / "x.safetensors", state, None),
        f"{wrong!r} names the wrong part of the UNet",
        f"expected {right!r}",
    )


@pytest.mark.parametrize("with_metadata", [True, False])
def test_factors_of_different_ranks(with_metadata, tmp_path):
    adapters = random_adapters(rank=2)
    tensors = ours(adapters)
    tensors[f"pix/{CONV}/b"] = np.zeros((1, 1, 3, 7), np.float32)
    if with_metadata:
        path = rewrite(tmp_path / "x.safetensors", tensors, adapters)
        unfit(path, f"1 factors do not fit the base model: pix: {CONV}/b (1, 1, 3, 7), expected (1, 1, 2, 7)")
    else:
        path = rewrite(tmp_path / "x.safetensors", tensors, None)
        refused(path, "expected rank 2", f"{CONV} with ", "a (3, 3, 5, 2)", "b (1, 1, 3, 7)")


@pytest.mark.parametrize("shape", [(3, 3, 2, 7), (2,), ()])
def test_impossible_shapes(shape, tmp_path):
    adapters = random_adapters()
    path = rewrite(tmp_path / "x.safetensors", ours(adapters) | {f"pix/{CONV}/b": np.zeros(shape)}, adapters)
    unfit(path, f"pix: {CONV}/b {shape}, expected (1, 1, 2, 7)")
    state = original_state(adapters, tmp_path)
    key = "down_blocks.0.resnets.0.conv1.lora_B.default_encoder_pix.weight"
    rewrite(path, state | {key: np.zeros((2, 3, 4))}, None)
    refused(path, f"{key} (2, 3, 4), expected 2 axes (linear) or 4 (convolution)")


def test_factors_of_another_rank_than_the_metadata(tmp_path):
    adapters = random_adapters(rank=2)
    wrong = adapters._replace(specs={name: AdapterSpec(rank=4) for name in adapters.specs})
    path = rewrite(tmp_path / "x.safetensors", ours(adapters), wrong)
    unfit(path, "12 factors do not fit", f"{CONV}/a (3, 3, 5, 2), expected (3, 3, 5, 4)")


def test_adapters_that_the_metadata_does_not_list(tmp_path):
    adapters = random_adapters()
    tensors = {key.replace("sem/", "other/"): value for key, value in ours(adapters).items()}
    path = rewrite(tmp_path / "x.safetensors", tensors, adapters)
    refused(path, "the metadata lists the adapters pix, sem, the keys pix, sem, other")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 3}, "version 3, this release reads 2: upgrade"),
        ({"format": "other"}, "format is 'other', not 'pisa_jax.adapters'"),
        ({"version": "2"}, "TypeError"),
        ({"adapters": {"pix": {"rank": "4", "alpha": 8}}}, "rank '4' and alpha 8 are not numbers"),
        ({"adapters": {"pix": {"rank": 4, "alpha": "8"}}}, "rank 4 and alpha '8' are not numbers"),
        ({"adapters": {"pix": {"alpha": 8}}}, "KeyError: 'rank'"),
        ({"adapters": {"pix": {"rank": 4, "alpha": 8, "rang": 4}}}, "unexpected keyword argument 'rang'"),
        ({"adapters": {"pix": {"rank": 0, "alpha": 8}}}, "positive integer, not 0"),
        ({"adapters": 3}, "AttributeError"),
    ],
)
def test_invalid_metadata(change, message, tmp_path):
    save_adapters(tmp_path / "x.safetensors", random_adapters())
    tensors, metadata = read_tensors(tmp_path / "x.safetensors"), read_metadata(tmp_path / "x.safetensors")
    metadata = {"pisa_jax": json.dumps(json.loads(metadata["pisa_jax"]) | change)}
    write_safetensors(tmp_path / "x.safetensors", tensors, metadata)
    refused(tmp_path / "x.safetensors", "metadata", message)
    write_safetensors(tmp_path / "x.safetensors", tensors, {"pisa_jax": "{"})
    refused(tmp_path / "x.safetensors", "metadata")


def published(**changes):
    """Return the content of the recorded checkpoint with changes; None removes an entry."""
    content = read_torch(golden("pisa_sr.pkl"))
    return {key: changes.get(key, value) for key, value in content.items() if changes.get(key, 0) is not None}


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (
            {},
            [
                "entries of a pisa_sr.pkl: expected 9, found 0",
                "missing lora_rank_unet_pix, lora_rank_unet_sem, state_dict_unet",
            ],
        ),
        ([1, 2], ["entries of a pisa_sr.pkl: expected 9, found 0"]),
        ({"lora_rank_unet_pix": 4, 3: 4}, ["expected 5, found 2", "missing state_dict_unet"]),
    ],
)
def test_pickles_with_other_content(content, parts):
    with pytest.raises(ValueError, match=r"x\.pkl") as error:
        pisa_sr_file.unpack_pickle("x.pkl", content)
    for part in parts:
        assert part in str(error.value)


def test_inconsistent_checkpoints():
    unpack = pisa_sr_file.unpack_pickle
    modules = published()["unet_lora_encoder_modules_pix"]
    with pytest.raises(ValueError, match="missing unet_lora_encoder_modules_pix"):
        unpack("x", published(unet_lora_encoder_modules_pix=None))
    with pytest.raises(ValueError, match="lora_rank_unet_sem is a str, expected int"):
        unpack("x", published(lora_rank_unet_sem="6"))
    with pytest.raises(ValueError, match="state_dict_unet: expected 658, found 660: unexpected conv_in"):
        unpack("x", published(unet_lora_encoder_modules_pix=modules[1:]))
    mistyped = [*modules[1:], "conv_inn"]
    with pytest.raises(ValueError, match=r"missing conv_inn\.lora_A.*did you mean 'conv_inn?\.lora_A"):
        unpack("x", published(unet_lora_encoder_modules_pix=mistyped))
    state = published()["state_dict_unet"]
    with pytest.raises(ValueError, match="not tensors: conv_in"):
        unpack("x", published(state_dict_unet=state | {next(iter(state)): 3}))
    tensors, specs = unpack("x", published())
    assert len(tensors) == 660
    assert specs["sem"].rank == 6


def test_hostile_and_truncated_checkpoints(tmp_path):
    class Hostile:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    (tmp_path / "x.pkl").write_bytes(pickle.dumps({"state_dict_unet": Hostile()}, 2))
    with pytest.raises(UnsafePickleError, match=r"posix.mkdir"):
        load_adapters(tmp_path / "x.pkl")
    assert not (tmp_path / "ran").exists()
    (tmp_path / "y.pkl").write_bytes(golden("pisa_sr.pkl").read_bytes()[:100_000])
    with pytest.raises(ValueError, match=r"y\.pkl is truncated"):
        load_adapters(tmp_path / "y.pkl")


def test_adapters_are_checked_against_the_base_model():
    trees, specs, *_ = random_adapters()
    check_adapters(trees, specs, KERNELS)
    check_adapters(trees, specs, {**KERNELS, "conv_in": (3, 3, 4, 5)})
    with pytest.raises(
        ValueError, match=f"no layers pix: {CONV}, sem: {CONV}; did you mean '{CONV}0'.*it has 3 layers"
    ):
        check_adapters(trees, specs, {(path + "0" if path == CONV else path): shape for path, shape in KERNELS.items()})
    with pytest.raises(ValueError, match="4 factors do not fit the base model") as error:
        check_adapters(trees, specs, {**KERNELS, CONV: (3, 3, 6, 8)})
    assert f"pix: {CONV}/a (3, 3, 5, 2), expected (3, 3, 6, 2)" in str(error.value)
    assert f"pix: {CONV}/b (1, 1, 2, 7), expected (1, 1, 2, 8)" in str(error.value)
    with pytest.raises(ValueError, match=r"expected \(5, 2\)"):
        check_adapters(trees, specs, {**KERNELS, "mid_block/resnets_0/conv_shortcut": (5, 7)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"base_model": ["x"]}, "base_model ['x'] is no text"),
        ({"adapters": {"pix": {"rank": 4, "alpha": 8, "decomposition": 5}}}, "decomposition 5 is no name"),
        ({"adapters": {"pix": {"rank": 4, "alpha": 8, "targets": "a{" + "9" * 30 + "}"}}}, "OverflowError"),
        ({"adapters": {"pix": {"rank": 4, "alpha": 8, "x" * 10**5: 1}}}, "characters)"),
    ],
)
def test_metadata_of_a_damaged_file_gives_one_short_sentence(change, message, tmp_path):
    save_adapters(tmp_path / "x.safetensors", random_adapters())
    tensors, metadata = read_tensors(tmp_path / "x.safetensors"), read_metadata(tmp_path / "x.safetensors")
    text = json.dumps(json.loads(metadata["pisa_jax"]) | change)
    for content, part in ((text, message), (text[:-1] + ', "deep": ' + "[" * 10**5 + "]" * 10**5 + "}", "Recursion")):
        write_safetensors(tmp_path / "x.safetensors", tensors, {"pisa_jax": content})
        with pytest.raises(ValueError, match=r"x\.safetensors: its metadata") as error:
            load_adapters(tmp_path / "x.safetensors")
        assert part in str(error.value)
        assert len(str(error.value)) < 600


def test_names_with_control_characters_and_endless_names(tmp_path):
    adapters = random_adapters()
    for name, shown in (("pix\x1b[31m\n", r"pix\x1b[31m\n"), ("x" * 10**5, "... (100000 characters)")):
        path = rewrite(tmp_path / "x.safetensors", ours(adapters) | {name: np.ones(2)}, adapters)
        with pytest.raises(ValueError, match="is not an adapter key") as error:
            load_adapters(path)
        assert shown in str(error.value)
        assert str(error.value).isprintable()
        assert len(str(error.value)) < 1000


def test_loha_with_the_factors_of_lora(tmp_path):
    adapters = random_adapters()
    specs = {name: AdapterSpec(decomposition="loha", rank=2) for name in adapters.specs}
    path = rewrite(tmp_path / "x.safetensors", ours(adapters), adapters._replace(specs=specs))
    unfit(path, f"missing {CONV}/a1")


def test_module_lists_and_ranks_of_a_damaged_checkpoint():
    doubled = ()
    for _ in range(64):  # whose text would have 2^64 parentheses
        doubled = (doubled, doubled)
    with pytest.raises(ValueError, match="x: unet_lora_encoder_modules_pix, expected names of modules, found: tuple"):
        pisa_sr_file.unpack_pickle("x", published(unet_lora_encoder_modules_pix=[doubled]))
    with pytest.raises(ValueError, match="x: lora_rank_unet_sem is -1, expected a positive integer"):
        pisa_sr_file.unpack_pickle("x", published(lora_rank_unet_sem=-1))
