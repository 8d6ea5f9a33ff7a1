"""The checkpoint format of the original PiSA-SR program: its pickle, its key names and its layouts.

A key is such as "down_blocks.0.resnets.0.conv1.lora_A.default_encoder_pix.weight", in PyTorch layout.
"""

import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np

from pisa_jax.adapters.adapter_tree import Adapters, AdapterTree
from pisa_jax.adapters.checks import check_empty, check_keys, shorten
from pisa_jax.config import AdapterSpec
from pisa_jax.runtime.messages import excerpt
from pisa_jax.runtime.torch_layout import flax_kernel, flax_module_path, torch_kernel, torch_module_name

# The original never sets peft's lora_alpha; this is peft's default (observed in recordings of the original program).
PISA_SR_ALPHA = 8.0

_KEY = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])\.default_(encoder|decoder|others)_(?P<name>\w+)\.weight")
_PARTS = ("encoder", "decoder", "others")


def unpack_pickle(path: str | Path, content: Any) -> tuple[dict[str, np.ndarray], dict[str, AdapterSpec]]:
    """Return the tensors and the specifications in the content of a `pisa_sr.pkl`.

    Raises:
        ValueError: missing entries, or module lists that do not agree with the tensors.
    """
    content = {str(key): value for key, value in content.items()} if isinstance(content, dict) else {}
    prefix = "lora_rank_unet_"
    names = [key.removeprefix(prefix) for key in content if key.startswith(prefix)] or ["pix", "sem"]
    module_lists = {f"unet_lora_{part}_modules_{name}": name for name in names for part in _PARTS}
    types = dict.fromkeys(module_lists, list) | {prefix + name: int for name in names} | {"state_dict_unet": dict}
    check_keys(f"{path}: entries of a pisa_sr.pkl", types, content)
    for key, expected in types.items():
        if type(content[key]) is not expected:
            raise ValueError(f"{path}: {key} is a {type(content[key]).__name__}, expected {expected.__name__}")
        if expected is int and content[key] < 1:
            raise ValueError(f"{path}: {key} is {content[key]}, expected a positive integer")
        if expected is list:
            other = sorted({type(module).__name__ for module in content[key] if type(module) is not str})
            check_empty(f"{path}: {key}, expected names of modules, found", other)
    tensors = {str(key): value for key, value in content["state_dict_unet"].items()}
    modules = [(module, name) for key, name in module_lists.items() for module in content[key]]
    keys = [format_key(module, side, name) for module, name in modules for side in "AB"]
    check_keys(f"{path}: state_dict_unet", keys, tensors)
    check_empty(f"{path}: not tensors", [key for key, value in tensors.items() if not isinstance(value, np.ndarray)])
    return tensors, {name: AdapterSpec(rank=content[prefix + name], alpha=PISA_SR_ALPHA) for name in names}


def to_state_dict(adapters: Adapters) -> dict[str, np.ndarray]:
    """Convert adapters to the original's keys and layouts, for alpha = 8: b is multiplied by alpha / 8.

    Raises:
        ValueError: an adapter of another decomposition than "lora", or of several ranks.
    """
    tensors = {}
    for name, tree in adapters.trees.items():
        spec = adapters.specs[name]
        if spec.decomposition != "lora" or spec.options:
            kind = " ".join([repr(spec.decomposition), *(f"{key}={value}" for key, value in spec.options)])
            raise ValueError(f"adapter {name!r} has decomposition {kind}; the original PiSA-SR supports only lora")
        check_pairs(f"adapter {name!r}", tree, spec.rank)
        for path, factors in tree.items():
            module = torch_module_name(path)
            b = np.asarray(factors["b"], np.float32) * np.float32(spec.alpha / PISA_SR_ALPHA)
            tensors[format_key(module, "A", name)] = torch_kernel(np.asarray(factors["a"], np.float32))
            tensors[format_key(module, "B", name)] = torch_kernel(b)
    return tensors


def check_pairs(source: str, tree: AdapterTree, rank: int) -> None:
    """Check that every layer has the factors a (..., in, r) and b (..., r, out) with r = `rank`.

    Raises:
        ValueError: missing or unexpected factors, or other shapes; the message starts with `source`.
    """
    found = [f"{path}/{name}" for path, factors in tree.items() for name in factors]
    check_keys(f"{source}, factors", [f"{path}/{side}" for path in tree for side in "ab"], found)
    wrong = []
    for path, factors in tree.items():
        a, b = factors["a"].shape, factors["b"].shape
        if len(a) != len(b) or a[-1] != rank or b[:-1] != (*[1] * (len(a) - 2), rank):
            wrong.append(f"{path} with a {a}, b {b}")
    check_empty(f"{source}: expected rank {rank}, a (..., in, {rank}) and b (..., {rank}, out), found", wrong)


def parse_key(path: str | Path, key: str, keys: Collection[str]) -> tuple[str, str, str]:
    """Return (adapter, module path, factor) of a key.

    Raises:
        ValueError: it is no key of an adapter (`keys`, all keys of the file, are shown), or names the wrong UNet part.
    """
    match = _KEY.fullmatch(key)
    if not match:
        raise ValueError(
            f"{path}: '{excerpt(key)}' is not an adapter key; expected keys such as 'pix/conv_in/a' (pisa_jax) or "
            f"'conv_in.lora_A.default_encoder_pix.weight' (original); the file has {len(keys)} keys: {shorten(keys)}"
        )
    expected = format_key(match["module"], match["side"], match["name"])
    if key != expected:
        raise ValueError(f"{path}: '{excerpt(key)}' names the wrong part of the UNet, expected '{excerpt(expected)}'")
    return match["name"], flax_module_path(match["module"]), match["side"].lower()


def format_key(module: str, side: str, name: str) -> str:
    """Return the key of a factor ("A" or "B") of adapter `name` at a module with a PyTorch name."""
    return f"{module}.lora_{side}.default_{unet_part(module)}_{name}.weight"


def unet_part(module: str) -> str:
    """Return the part of the UNet, for which the original trains a peft adapter of its own, that has this module."""
    if module.startswith(("conv_in", "down_blocks")):
        return "encoder"
    return "decoder" if module.startswith(("conv_out", "up_blocks")) else "others"


def factor_from_tensor(path: str | Path, key: str, tensor: np.ndarray) -> np.ndarray:
    """Convert a tensor of the file to a factor in Flax layout.

    Raises:
        ValueError: neither 2 nor 4 axes.
    """
    if tensor.ndim not in (2, 4):
        raise ValueError(f"{path}: {excerpt(key)} {tensor.shape}, expected 2 axes (linear) or 4 (convolution)")
    return flax_kernel(tensor)
