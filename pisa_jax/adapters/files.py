"""Adapter files: this project's format, and reading and writing that of the original PiSA-SR (`pisa-sr convert`).

This project's format is a safetensors file with keys such as "pix/down_blocks_0/resnets_0/conv1/a" and one metadata
entry, "pisa_jax": a JSON text with format, version, base model and the `AdapterSpec` of each adapter.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from pisa_jax.adapters import pisa_sr_file
from pisa_jax.adapters.adapter_tree import Adapters, AdapterTree
from pisa_jax.adapters.checks import check_factors, shorten
from pisa_jax.adapters.pisa_sr_file import PISA_SR_ALPHA
from pisa_jax.config import AdapterSpec
from pisa_jax.runtime.messages import excerpt
from pisa_jax.runtime.tensor_files import is_safetensors, read_metadata, read_tensors, write_safetensors
from pisa_jax.runtime.torch_pickle import read_torch

FORMAT = "pisa_jax.adapters"
VERSION = 1

_KEY = re.compile(r"(?P<name>[^/]+)/(?P<path>.+)/(?P<factor>[^/]+)")


def load_adapters(path: str | Path) -> Adapters:
    """Load an adapter file of this project or of the original PiSA-SR, recognized by its content.

    Factors are float32 numpy arrays in Flax layout.

    Raises:
        OSError: the file cannot be read.
        ValueError: it has neither format, or wrong keys, factors or ranks.
        UnsafePickleError: a pickle refers to anything but tensors and plain containers (a ValueError).
    """
    if is_safetensors(path):
        tensors = read_tensors(path)
        specs, base_model = _parse_metadata(path, read_metadata(path))
    else:
        tensors, specs = pisa_sr_file.unpack_pickle(path, read_torch(path))
        base_model = None
    trees: dict[str, AdapterTree] = {name: {} for name in specs or ()}
    for key, tensor in tensors.items():
        if match := _KEY.fullmatch(key):
            (name, module, factor), value = match.groups(), tensor
        else:
            name, module, factor = pisa_sr_file.parse_key(path, key, tensors)
            value = pisa_sr_file.factor_from_tensor(path, key, tensor)
        with np.errstate(over="ignore"):  # values of float64 files
            trees.setdefault(name, {}).setdefault(module, {})[factor] = np.asarray(value, np.float32, order="C")
    if specs is None:
        specs = {name: AdapterSpec(rank=_most_frequent_rank(tree), alpha=PISA_SR_ALPHA) for name, tree in trees.items()}
    if set(specs) != set(trees):
        raise ValueError(f"{path}: the metadata lists the adapters {shorten(specs)}, the keys {shorten(trees)}")
    for name, tree in trees.items():
        check_factors(f"{path}: adapter '{excerpt(name)}'", tree, specs[name])
    return Adapters(trees, specs, base_model)


def save_adapters(path: str | Path, adapters: Adapters, dtype: str = "float32") -> None:
    """Write this project's format. With float32, loading restores the same bits; equal adapters give equal files."""
    tensors = {
        f"{name}/{module}/{factor}": np.asarray(value, dtype)
        for name, tree in adapters.trees.items()
        for module, factors in tree.items()
        for factor, value in factors.items()
    }
    write_safetensors(path, tensors, _format_metadata(adapters.specs, adapters.base_model))


def export_pisa_sr(path: str | Path, adapters: Adapters) -> None:
    """Write the key names and layouts of the original PiSA-SR as safetensors.

    The original supports only alpha = 8: b is multiplied by alpha / 8, and the metadata states 8.

    Raises:
        ValueError: an adapter of another decomposition than "lora".
    """
    specs = {name: replace(spec, alpha=PISA_SR_ALPHA) for name, spec in adapters.specs.items()}
    write_safetensors(path, pisa_sr_file.to_state_dict(adapters), _format_metadata(specs, adapters.base_model))


def _parse_metadata(path: str | Path, metadata: Mapping[str, str]) -> tuple[dict[str, AdapterSpec] | None, str | None]:
    """Return the specifications and the base model; (None, None) if the file has no metadata of this project."""
    if "pisa_jax" not in metadata:
        return None, None
    try:
        content = json.loads(metadata["pisa_jax"])
        if content["format"] != FORMAT:
            raise ValueError(f"its format is {content['format']!r}, not {FORMAT!r}")
        if content["version"] > VERSION:
            raise ValueError(f"it has version {content['version']}, this release reads {VERSION}: upgrade pisa_jax")
        base_model = content["base_model"]
        if not isinstance(base_model, str | None):
            raise ValueError(f"base_model {excerpt(base_model)} is no name")
        return {name: _parse_spec(fields) for name, fields in content["adapters"].items()}, base_model
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        reason = f"{type(error).__name__}: {excerpt(error, 300)}"
        raise ValueError(f"{path}: its metadata is not that of an adapter file ({reason})") from error


def _parse_spec(fields: Mapping[str, Any]) -> AdapterSpec:
    if type(fields["rank"]) is not int or type(fields["alpha"]) not in (int, float):
        raise ValueError(f"rank {fields['rank']!r} and alpha {fields['alpha']!r} are not numbers")
    if type(fields.get("decomposition", "")) is not str:
        raise ValueError(f"decomposition {fields['decomposition']!r} is no name")
    return AdapterSpec(**{**fields, "alpha": float(fields["alpha"])})


def _format_metadata(specs: Mapping[str, AdapterSpec], base_model: str | None) -> dict[str, str]:
    adapters = {name: asdict(spec) for name, spec in specs.items()}
    content = {"format": FORMAT, "version": VERSION, "base_model": base_model, "adapters": adapters}
    return {"pisa_jax": json.dumps(content, sort_keys=True)}


def _most_frequent_rank(tree: AdapterTree) -> int:
    """Return the rank of most layers, for files without metadata."""
    ranks = [factors["a"].shape[-1] for factors in tree.values() if "a" in factors]
    return max(ranks, key=ranks.count, default=1)
