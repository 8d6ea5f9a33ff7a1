"""Adapter files: this project's format, and reading and writing that of the original PiSA-SR (`pisa-sr convert`).

This project's format is a safetensors file with keys such as "pix/down_blocks_0/resnets_0/conv1/a" and one metadata
entry, "pisa_jax": a JSON text with format, version, base model, the `AdapterSpec` of each adapter, and the order of the
adapters where it is not the alphabetical one. Nothing that a file names is imported or run.
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
from pisa_jax.adapters.pisa_sr_file import PISA_SR_ALPHA
from pisa_jax.config import AdapterSpec
from pisa_jax.runtime.tensor_files import is_safetensors, read_metadata, read_tensors, write_safetensors
from pisa_jax.runtime.torch_pickle import read_torch

FORMAT = "pisa_jax.adapters"
VERSION = 2
# The fields of `AdapterSpec` in version 1; version 2 adds the others.
FIRST_FIELDS = ("decomposition", "rank", "alpha", "targets")

_KEY = re.compile(r"(?P<name>[^/]+)/(?P<path>.+)/(?P<factor>[^/]+)")


def load_adapters(path: str | Path) -> Adapters:
    """Load an adapter file of this project or of the original PiSA-SR, recognized by its content.

    Factors are numpy arrays in Flax layout: float32, or the integers of the file. Those of this project's format are
    checked by `fit.check_adapters`, for which the layers of the base model must be known.

    Raises:
        OSError: the file cannot be read.
        ValueError: it has neither format, or wrong keys or metadata.
        UnsafePickleError: a pickle refers to anything but tensors and plain containers (a ValueError).
    """
    if is_safetensors(path):
        tensors = read_tensors(path)
        specs, base_model = _parse_metadata(path, read_metadata(path))
    else:
        tensors, specs = pisa_sr_file.unpack_pickle(path, read_torch(path))
        base_model = None
    trees: dict[str, AdapterTree] = {name: {} for name in specs or ()}
    original = set()  # adapters with keys of the original
    for key, tensor in tensors.items():
        if match := _KEY.fullmatch(key):
            (name, module, factor), value = match.groups(), tensor
        else:
            name, module, factor = pisa_sr_file.parse_key(path, key, tensors)
            value = pisa_sr_file.factor_from_tensor(path, key, tensor)
            original.add(name)
        trees.setdefault(name, {}).setdefault(module, {})[factor] = _as_factor(value)
    if specs is None:
        original |= set(trees)
        specs = {name: AdapterSpec(rank=_most_frequent_rank(tree), alpha=PISA_SR_ALPHA) for name, tree in trees.items()}
    if set(specs) != set(trees):
        raise ValueError(f"{path}: the metadata lists the adapters {', '.join(specs)}, the keys {', '.join(trees)}")
    for name in sorted(original):
        pisa_sr_file.check_pairs(f"{path}: adapter {name!r}", trees[name], specs[name].rank)
    return Adapters(trees, specs, base_model)


def save_adapters(path: str | Path, adapters: Adapters, dtype: str = "float32") -> None:
    """Write this project's format. With float32, loading restores the same bits; equal adapters give equal files."""
    tensors = {
        f"{name}/{module}/{factor}": _as_factor(value, dtype)
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
        specs = {name: _parse_spec(fields) for name, fields in content["adapters"].items()}
        return {name: specs[name] for name in content.get("order", specs)}, content["base_model"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path}: its metadata is not that of an adapter file ({type(error).__name__}: {error})"
        ) from error


def _parse_spec(fields: Mapping[str, Any]) -> AdapterSpec:
    if type(fields["rank"]) is not int or type(fields["alpha"]) not in (int, float):
        raise ValueError(f"rank {fields['rank']!r} and alpha {fields['alpha']!r} are not numbers")
    pairs = {name: tuple(map(tuple, fields.get(name, ()))) for name in ("options", "rank_by_target")}
    return AdapterSpec(**{**fields, **pairs, "alpha": float(fields["alpha"])})


def _format_metadata(specs: Mapping[str, AdapterSpec], base_model: str | None) -> dict[str, str]:
    # Fields of later versions are written where they are used, so that earlier releases read all other files.
    adapters = {
        name: {field: value for field, value in asdict(spec).items() if value or field in FIRST_FIELDS}
        for name, spec in specs.items()
    }
    later = any(len(fields) > len(FIRST_FIELDS) for fields in adapters.values())
    content = {"format": FORMAT, "version": VERSION if later else 1, "base_model": base_model, "adapters": adapters}
    if list(specs) != sorted(specs):
        content["order"] = list(specs)
    return {"pisa_jax": json.dumps(content, sort_keys=True)}


def _as_factor(value: Any, dtype: str = "float32") -> np.ndarray:
    """Return a contiguous array; `dtype` is for floating-point factors, others (indices) keep theirs."""
    array = np.asarray(value)
    return np.asarray(array, array.dtype if array.dtype.kind in "iub" else dtype, order="C")


def _most_frequent_rank(tree: AdapterTree) -> int:
    """Return the rank of most layers, for files without metadata."""
    ranks = [factors["a"].shape[-1] for factors in tree.values() if "a" in factors]
    return max(ranks, key=ranks.count, default=1)
