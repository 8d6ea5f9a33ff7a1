"""Adapter files: ours, and those of the original program, both ways. `pisa-sr convert --help`.

Ours is a safetensors file with keys such as "pix/down_blocks_0/resnets_0/conv1/a" and one metadata entry, "pisa_jax", a
JSON text: format, version, base model, and per adapter its `AdapterSpec`. The original's keys, in its `pisa_sr.pkl` or
in safetensors, are such as "down_blocks.0.resnets.0.conv1.lora_A.default_encoder_pix.weight".
"""

import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pisa_jax.config import AdapterSpec
from pisa_jax.runtime.tensor_files import is_safetensors, read_metadata, read_tensors, read_torch, write_safetensors
from pisa_jax.runtime.trees import suggest

FORMAT = "pisa_jax.adapters"
VERSION = 1
# The original never sets peft's lora_alpha, whose default this is (observed: fixtures of the original program).
ORIGINAL_ALPHA = 8.0

_ORIGINAL_KEY = re.compile(
    r"(?P<module>.+)\.lora_(?P<side>[AB])\.default_(encoder|decoder|others)_(?P<name>\w+)\.weight"
)
_OUR_KEY = re.compile(r"(?P<name>[^/]+)/(?P<path>.+)/(?P<factor>[^/]+)")

Tree = dict[str, dict[str, Any]]


class Adapters(NamedTuple):
    """Named adapters as functional trees (see `lora.py`), how each becomes dW, and the model they were made for."""

    trees: dict[str, Tree]
    specs: dict[str, AdapterSpec]
    base_model: str | None = None


def load_adapters(path: str | Path) -> Adapters:
    """The adapters of a file of ours or of the original program, told apart by content; factors are float32 numpy.

    Raises:
        OSError: the file cannot be read. ValueError: it is neither kind, or keys, pairs or ranks are wrong; the message
        says what was expected. UnsafePickleError (a ValueError): a pickle that wants to run something.
    """
    if is_safetensors(path):
        tensors = read_tensors(path)
        specs, base_model = _described(path, read_metadata(path))
    else:
        tensors, specs = _unpack_original(path, read_torch(path))
        base_model = None
    trees: dict[str, Tree] = {name: {} for name in specs or ()}
    for key, tensor in tensors.items():
        name, module, factor = _parse(path, key, tensors)
        value = tensor if _OUR_KEY.fullmatch(key) else _flax_kernel(path, key, tensor)
        trees.setdefault(name, {}).setdefault(module, {})[factor] = np.asarray(value, np.float32, order="C")
    if specs is None:
        specs = {name: AdapterSpec(rank=_rank(tree), alpha=ORIGINAL_ALPHA) for name, tree in trees.items()}
    if set(specs) != set(trees):
        raise ValueError(f"{path} describes the adapters {', '.join(specs)} but holds {', '.join(trees)}")
    for name, tree in trees.items():
        _check_factors(f"{path}: adapter {name!r}", tree, specs[name])
    return Adapters(trees, specs, base_model)


def save_adapters(path: str | Path, adapters: Adapters, dtype: str = "float32") -> None:
    """Write our format. In float32 loading it gives the same bits; the same adapters give the same bytes."""
    tensors = {
        f"{name}/{module}/{factor}": np.asarray(value, dtype)
        for name, tree in adapters.trees.items()
        for module, factors in tree.items()
        for factor, value in factors.items()
    }
    write_safetensors(path, tensors, _metadata(adapters.specs, adapters.base_model))


def export_original(path: str | Path, adapters: Adapters) -> None:
    """Write the original's key names and layouts, in safetensors.

    The original knows alpha = 8 only: b is multiplied by alpha / 8, and the file says 8.

    Raises:
        ValueError: an adapter of another decomposition than "lora".
    """
    tensors = {}
    for name, tree in adapters.trees.items():
        spec = adapters.specs[name]
        if spec.decomposition != "lora":
            raise ValueError(f"adapter {name!r} is a {spec.decomposition}; the original program knows only lora")
        for module, factors in tree.items():
            b = np.asarray(factors["b"], np.float32) * np.float32(spec.alpha / ORIGINAL_ALPHA)
            tensors[_original_key(torch_name(module), "A", name)] = torch_kernel(np.asarray(factors["a"], np.float32))
            tensors[_original_key(torch_name(module), "B", name)] = torch_kernel(b)
    specs = {name: replace(spec, alpha=ORIGINAL_ALPHA) for name, spec in adapters.specs.items()}
    write_safetensors(path, tensors, _metadata(specs, adapters.base_model))


def check_adapters(trees: Mapping[str, Tree], kernel_shapes: Mapping[str, Sequence[int]]) -> None:
    """Whether every factor fits the kernel of its layer: a, a1, ... (*window, in, r) and b, b1, ... (..., r, out).

    Raises:
        ValueError: a layer that the base model does not have, or one of another shape; the message lists them.
    """
    unknown = [(name, path) for name, tree in trees.items() for path in tree if path not in kernel_shapes]
    if unknown:
        name, path = unknown[0]
        raise ValueError(
            f"the base model has no layers {_some(f'{name}: {path}' for name, path in unknown)}"
            f"{suggest(path, kernel_shapes)} (it has {len(kernel_shapes)} layers; are the adapters for another model?)"
        )
    wrong = []
    for name, tree in trees.items():
        for path, factors in tree.items():
            kernel = tuple(kernel_shapes[path])
            for factor, value in factors.items():
                shape, inputs = tuple(value.shape), factor.startswith("a")
                if (shape[:-1] != kernel[:-1]) if inputs else (shape[-1:] != kernel[-1:]):
                    fitting = (*kernel[:-1], "r") if inputs else ("...", "r", kernel[-1])
                    wrong.append(f"{name}: {path}/{factor} {shape}, expected ({', '.join(map(str, fitting))})")
    if wrong:
        raise ValueError(f"{len(wrong)} factors do not fit the base model: {_some(wrong, '; ')}")


def flax_path(torch_name: str) -> str:
    """Path of a UNet module from its PyTorch name.

    >>> flax_path("up_blocks.1.attentions.0.transformer_blocks.0.ff.net.0.proj")
    'up_blocks_1/attentions_0/transformer_blocks_0/ff/net_0/proj'
    """
    return re.sub(r"\.(\d+)", r"_\1", torch_name).replace(".", "/")


def torch_name(flax_path: str) -> str:
    """Inverse of `flax_path`. `linear_1` and `linear_2` (of the time embedding) are names, not numbered modules."""
    return re.sub(r"(?<!linear)_(\d+)(?=/|$)", r".\1", flax_path).replace("/", ".")


def flax_kernel(weight: np.ndarray) -> np.ndarray:
    """Linear (out, in) -> (in, out); convolution (out, in, h, w) -> (h, w, in, out)."""
    return weight.T if weight.ndim == 2 else weight.transpose(2, 3, 1, 0)


def torch_kernel(kernel: np.ndarray) -> np.ndarray:
    """Inverse of `flax_kernel`."""
    return kernel.T if kernel.ndim == 2 else kernel.transpose(3, 2, 0, 1)


def _flax_kernel(path: str | Path, key: str, tensor: np.ndarray) -> np.ndarray:
    if tensor.ndim not in (2, 4):
        raise ValueError(f"{path}: {key} {tensor.shape}, expected 2 axes (linear) or 4 (convolution)")
    return flax_kernel(tensor)


def _group(torch_name: str) -> str:
    """The original trains one peft adapter for each of these parts of the UNet (its module lists)."""
    if torch_name.startswith(("conv_in", "down_blocks")):
        return "encoder"
    return "decoder" if torch_name.startswith(("conv_out", "up_blocks")) else "others"


def _original_key(torch_name: str, side: str, name: str) -> str:
    return f"{torch_name}.lora_{side}.default_{_group(torch_name)}_{name}.weight"


def _parse(path: str | Path, key: str, keys: Collection[str]) -> tuple[str, str, str]:
    """(adapter, module path, factor) of a key of ours or of the original."""
    if ours := _OUR_KEY.fullmatch(key):
        return ours["name"], ours["path"], ours["factor"]
    original = _ORIGINAL_KEY.fullmatch(key)
    if not original:
        raise ValueError(
            f"{path}: {key!r} is no key of an adapter; expected such as 'pix/conv_in/a' (ours) or "
            f"'conv_in.lora_A.default_encoder_pix.weight' (original); the file has {len(keys)} keys: {_some(keys)}"
        )
    expected = _original_key(original["module"], original["side"], original["name"])
    if key != expected:
        raise ValueError(f"{path}: {key!r} is in the wrong part of the UNet, expected {expected!r}")
    return original["name"], flax_path(original["module"]), original["side"].lower()


def _unpack_original(path: str | Path, content: Any) -> tuple[dict[str, np.ndarray], dict[str, AdapterSpec]]:
    """Tensors and specs of a `pisa_sr.pkl`, whose module lists must agree with its tensors."""
    content = {str(key): value for key, value in content.items()} if isinstance(content, dict) else {}
    prefix = "lora_rank_unet_"
    names = [key.removeprefix(prefix) for key in content if key.startswith(prefix)] or ["pix", "sem"]
    lists = {f"unet_lora_{group}_modules_{name}": name for name in names for group in ("encoder", "decoder", "others")}
    kinds = dict.fromkeys(lists, list) | {prefix + name: int for name in names} | {"state_dict_unet": dict}
    _check_keys(f"{path}: entries of a pisa_sr.pkl", kinds, content)
    for key, kind in kinds.items():
        if type(content[key]) is not kind:
            raise ValueError(f"{path}: {key} is a {type(content[key]).__name__}, expected a {kind.__name__}")
    tensors = {str(key): value for key, value in content["state_dict_unet"].items()}
    modules = [(str(module), name) for key, name in lists.items() for module in content[key]]
    keys = [_original_key(module, side, name) for module, name in modules for side in "AB"]
    _check_keys(f"{path}: state_dict_unet", keys, tensors)
    _refuse(f"{path}: not tensors", [key for key, value in tensors.items() if not isinstance(value, np.ndarray)])
    return tensors, {name: AdapterSpec(rank=content[prefix + name], alpha=ORIGINAL_ALPHA) for name in names}


def _described(path: str | Path, metadata: Mapping[str, str]) -> tuple[dict[str, AdapterSpec] | None, str | None]:
    """Specs and base model that a safetensors file of ours states; (None, None) for one that states nothing."""
    if "pisa_jax" not in metadata:
        return None, None
    try:
        described = json.loads(metadata["pisa_jax"])
        if described["format"] != FORMAT:
            raise ValueError(f"its format is {described['format']!r}, not {FORMAT!r}")
        if described["version"] > VERSION:
            raise ValueError(f"it has version {described['version']}, this release reads {VERSION}: upgrade pisa_jax")
        return {name: _spec(fields) for name, fields in described["adapters"].items()}, described["base_model"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path}: its metadata is not that of an adapter file ({type(error).__name__}: {error})"
        ) from error


def _spec(fields: Mapping[str, Any]) -> AdapterSpec:
    if type(fields["rank"]) is not int or type(fields["alpha"]) not in (int, float):
        raise ValueError(f"rank {fields['rank']!r} and alpha {fields['alpha']!r} are not numbers")
    return AdapterSpec(**fields | {"alpha": float(fields["alpha"])})


def _metadata(specs: Mapping[str, AdapterSpec], base_model: str | None) -> dict[str, str]:
    adapters = {name: asdict(spec) for name, spec in specs.items()}
    described = {"format": FORMAT, "version": VERSION, "base_model": base_model, "adapters": adapters}
    return {"pisa_jax": json.dumps(described, sort_keys=True)}


def _rank(tree: Tree) -> int:
    """The rank that most layers have, for files that do not state it."""
    ranks = [factors["a"].shape[-1] for factors in tree.values() if "a" in factors]
    return max(ranks, key=ranks.count, default=1)


def _stated_rank(factor: str, shape: tuple[int, ...]) -> int | None:
    """The rank in the shape of a factor; None for a shape that no factor has."""
    inputs = factor.startswith("a")
    if len(shape) < 2 or not (inputs or set(shape[:-2]) <= {1}):
        return None
    return shape[-1] if inputs else shape[-2]


def _check_factors(what: str, tree: Tree, spec: AdapterSpec) -> None:
    """Every layer has its factors, every a (..., in, r) its b (..., r, out), and all have the rank of the adapter."""
    expected, wrong = [], []
    for path, factors in tree.items():
        suffixes = [""] if spec.decomposition == "lora" else sorted({name[1:] for name in factors if name[0] in "ab"})
        expected += [f"{path}/{side}{suffix}" for suffix in suffixes for side in "ab"]
        if {_stated_rank(name, value.shape) for name, value in factors.items()} != {spec.rank}:
            wrong.append(f"{path} with {', '.join(f'{name} {value.shape}' for name, value in factors.items())}")
    _check_keys(f"{what}, factors", expected, [f"{path}/{name}" for path, factors in tree.items() for name in factors])
    _refuse(f"{what}: expected rank {spec.rank}, a (..., in, {spec.rank}) and b (..., {spec.rank}, out), found", wrong)


def _check_keys(what: str, expected: Collection[str], found: Collection[str]) -> None:
    missing = sorted(set(expected) - set(found))
    unexpected = sorted(set(found) - set(expected))
    problems = [f"missing {_some(missing)}"] if missing else []
    if unexpected:
        problems.append(f"unexpected {_some(unexpected)}{suggest(unexpected[0], missing or expected)}")
    _refuse(f"{what}: expected {len(expected)}, found {len(found)}", problems)


def _refuse(what: str, problems: Sequence[str]) -> None:
    if problems:
        raise ValueError(f"{what}: {_some(problems, '; ')}")


def _some(names: Iterable[Any], separator: str = ", ", most: int = 4) -> str:
    names = [str(name) for name in names]
    return separator.join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def summary(adapters: Adapters) -> str:
    """One line per adapter, and the base model."""
    lines = []
    for name, tree in adapters.trees.items():
        spec, factors = adapters.specs[name], [value for layer in tree.values() for value in layer.values()]
        size = sum(value.size for value in factors)
        kind = f"{spec.decomposition}, rank {spec.rank}, alpha {spec.alpha:g}"
        lines.append(f"  {name}: {kind}, {len(tree)} layers, {size:,} parameters")
    return "\n".join([*lines, f"  base model: {adapters.base_model or 'not recorded'}"])
