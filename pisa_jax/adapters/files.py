"""Adapter files: this project's format, and reading and writing that of the original PiSA-SR (`pisa-sr convert`).

This project's format is a safetensors file with keys such as "pix/down_blocks_0/resnets_0/conv1/a" and one metadata
entry, "pisa_jax": a JSON text with format, version, base model and digest of its weights, the `AdapterSpec` of each
adapter, and their order where it is not the alphabetical one. Nothing that a file names is imported or run.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from pisa_jax.adapters import pisa_sr_file
from pisa_jax.adapters.adapter_tree import Adapters, AdapterTree, join_adapters
from pisa_jax.adapters.checks import shorten
from pisa_jax.adapters.pisa_sr_file import PISA_SR_ALPHA
from pisa_jax.config import AdapterSpec
from pisa_jax.runtime.messages import excerpt
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
        stated = _parse_metadata(path, read_metadata(path))
    else:
        tensors, specs = pisa_sr_file.unpack_pickle(path, read_torch(path))
        stated = Adapters({}, specs)
    trees, original = _parse_keys(path, tensors)
    if stated is None:
        stated, original = Adapters({}, {name: _guess_spec(tree) for name, tree in trees.items()}), set(trees)
    trees = {name: {} for name in stated.specs} | trees
    if set(stated.specs) != set(trees):
        raise ValueError(f"{path}: the metadata lists the adapters {shorten(stated.specs)}, the keys {shorten(trees)}")
    for name in sorted(original):
        pisa_sr_file.check_pairs(f"{path}: adapter '{excerpt(name)}'", trees[name], stated.specs[name].rank)
    return stated._replace(trees=trees)


def _parse_keys(path: str | Path, tensors: Mapping[str, np.ndarray]) -> tuple[dict[str, AdapterTree], set[str]]:
    """Return the factors by adapter, and the names of the adapters with keys of the original."""
    trees: dict[str, AdapterTree] = {}
    original = set()
    for key, tensor in tensors.items():
        if match := _KEY.fullmatch(key):
            (name, module, factor), value = match.groups(), tensor
        else:
            name, module, factor = pisa_sr_file.parse_key(path, key, tensors)
            value = pisa_sr_file.factor_from_tensor(path, key, tensor)
            original.add(name)
        trees.setdefault(name, {}).setdefault(module, {})[factor] = _as_factor(value)
    return trees, original


def load_all_adapters(paths: str | Path | Sequence[str | Path]) -> Adapters:
    """Load the adapters of one or several files, which follow each other in the order of the files.

    Raises:
        ValueError: as `load_adapters` does; also an adapter name in two files, or files for different base models.
    """
    paths = [paths] if isinstance(paths, str | Path) else list(paths)
    return join_adapters({str(path): load_adapters(path) for path in paths})


def save_adapters(path: str | Path, adapters: Adapters, dtype: str = "float32") -> None:
    """Write this project's format. With float32, loading restores the same bits; equal adapters give equal files."""
    tensors = {
        f"{name}/{module}/{factor}": _as_factor(value, dtype)
        for name, tree in adapters.trees.items()
        for module, factors in tree.items()
        for factor, value in factors.items()
    }
    write_safetensors(path, tensors, _format_metadata(adapters))


def export_pisa_sr(path: str | Path, adapters: Adapters) -> None:
    """Write the key names and layouts of the original PiSA-SR as safetensors.

    The original supports only alpha = 8: b is multiplied by alpha / 8, and the metadata states 8.

    Raises:
        ValueError: an adapter of another decomposition than "lora".
    """
    specs = {name: replace(spec, alpha=PISA_SR_ALPHA) for name, spec in adapters.specs.items()}
    stated = adapters._replace(specs=specs)
    write_safetensors(path, pisa_sr_file.to_state_dict(adapters), _format_metadata(stated))


def _parse_metadata(path: str | Path, metadata: Mapping[str, str]) -> Adapters | None:
    """Return adapters without trees; None if the file has no metadata of this project."""
    if "pisa_jax" not in metadata:
        return None
    try:
        content = json.loads(metadata["pisa_jax"])
        if content["format"] != FORMAT:
            raise ValueError(f"its format is {content['format']!r}, not {FORMAT!r}")
        if content["version"] > VERSION:
            raise ValueError(f"it has version {content['version']}, this release reads {VERSION}: upgrade pisa_jax")
        base_model, digest = content["base_model"], content.get("base_digest")
        for field, value in (("base_model", base_model), ("base_digest", digest)):
            if not isinstance(value, str | None):
                raise ValueError(f"{field} {excerpt(value)} is no text")
        specs = {name: _parse_spec(fields) for name, fields in content["adapters"].items()}
        ordered = {name: specs[name] for name in content.get("order", specs)}
        trained_on = {name: tuple(map(str, below)) for name, below in content.get("trained_on", {}).items()}
        return Adapters({}, ordered, base_model, trained_on, digest)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        reason = f"{type(error).__name__}: {excerpt(error, 300)}"
        raise ValueError(f"{path}: its metadata is not that of an adapter file ({reason})") from error


def _parse_spec(fields: Mapping[str, Any]) -> AdapterSpec:
    if type(fields["rank"]) is not int or type(fields["alpha"]) not in (int, float):
        raise ValueError(f"rank {fields['rank']!r} and alpha {fields['alpha']!r} are not numbers")
    if type(fields.get("decomposition", "")) is not str:
        raise ValueError(f"decomposition {fields['decomposition']!r} is no name")
    pairs = {name: tuple(map(tuple, fields.get(name, ()))) for name in ("options", "rank_by_target")}
    return AdapterSpec(**{**fields, **pairs, "alpha": float(fields["alpha"])})


def _format_metadata(adapters: Adapters) -> dict[str, str]:
    # Fields of later versions are written where they are used, so that earlier releases read all other files.
    specs = {
        name: {field: value for field, value in asdict(spec).items() if value or field in FIRST_FIELDS}
        for name, spec in adapters.specs.items()
    }
    version = VERSION if any(len(fields) > len(FIRST_FIELDS) for fields in specs.values()) else 1
    content = {"format": FORMAT, "version": version, "base_model": adapters.base_model, "adapters": specs}
    if list(specs) != sorted(specs):
        content["order"] = list(specs)
    if adapters.trained_on:
        content["trained_on"] = dict(adapters.trained_on)
    if adapters.base_digest:
        content["base_digest"] = adapters.base_digest
    return {"pisa_jax": json.dumps(content, sort_keys=True)}


def _as_factor(value: Any, dtype: str = "float32") -> np.ndarray:
    """Return a contiguous array; `dtype` is for floating-point factors, others (indices) keep theirs."""
    array = np.asarray(value)
    with np.errstate(over="ignore"):  # values of float64 files
        return np.asarray(array, array.dtype if array.dtype.kind in "iub" else dtype, order="C")


def _guess_spec(tree: AdapterTree) -> AdapterSpec:
    """Return the specification for a file without metadata: the rank of most layers, and the original's alpha."""
    ranks = [factors["a"].shape[-1] for factors in tree.values() if "a" in factors]
    return AdapterSpec(rank=max(ranks, key=ranks.count, default=1), alpha=PISA_SR_ALPHA)
