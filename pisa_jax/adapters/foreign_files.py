"""Adapter files of other programs: PEFT, diffusers, and kohya / A1111 / ComfyUI / LyCORIS, for one adapter each.

    format      keys                                                    scale of dW
    peft        base_model.model.MODULE.lora_A.weight, ...              adapter_config.json
    diffusers   unet.MODULE.lora_A.weight, ... (*)                      metadata; without it 1
    kohya       lora_unet_MODULE.lora_down.weight, ..., .alpha          alpha / r; without alpha 1

MODULE is the name in diffusers' PyTorch UNet; kohya joins its parts with "_". Files are written with the scale folded
into the factors and alpha = r, so that programs that ignore alpha read them correctly.

(*) Also read: lora.down.weight and lora.up.weight, which pipelines of diffusers write for projections of attention,
and keys without "unet.", which `UNet2DConditionModel.save_lora_adapter` writes. They are not written: diffusers 0.42.1
drops the projections of attention of a file that mixes both kinds of names, its own included.
"""

import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pisa_jax.adapters.adapter_tree import Adapters, AdapterTree
from pisa_jax.adapters.checks import check_empty, shorten
from pisa_jax.adapters.foreign_keys import PEFT_FILES
from pisa_jax.adapters.interchange import WRITERS, Tensors, TorchLayer, cayley, read_layer
from pisa_jax.adapters.lokr import factorize
from pisa_jax.config import AdapterSpec
from pisa_jax.runtime.atomic_write import atomic_write
from pisa_jax.runtime.messages import excerpt
from pisa_jax.runtime.tensor_files import read_metadata, read_tensors, write_safetensors
from pisa_jax.runtime.torch_layout import torch_module_name

Kernels = Mapping[str, Any]
"""Module path -> kernel of the base model, or its shape where values are not needed."""

# Tensor names of the programs -> those of `interchange`.
NAMES = {
    "lora_A.weight": "lora_down",
    "lora_B.weight": "lora_up",
    "lora_magnitude_vector": "dora_scale",
    "lora_magnitude_vector.weight": "dora_scale",
    "lora.down.weight": "lora_down",
    "lora.up.weight": "lora_up",
    "lora_down.weight": "lora_down",
    "lora_up.weight": "lora_up",
    "lora_mid.weight": "lora_mid",
    **{f"hada_{name}": f"hada_{name}" for name in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
    **{f"lokr_{name}": f"lokr_{name}" for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")},
    **{name: name for name in ("dora_scale", "oft_blocks", "diff", "diff_b", "hra_u", "alpha")},
    **{name: name for name in ("vera_lambda_b", "vera_lambda_d")},
    "oft_R.weight": "oft_R",
    "diff.weight": "diff",
}
# The decompositions that each format can hold, and the names of their tensors in it.
LORA = ("lora", "rslora", "pissa", "olora", "tucker", "vera")
PEFT_TYPES = dict.fromkeys((*LORA, "dora"), "LORA") | {"loha": "LOHA", "lokr": "LOKR", "hra": "HRA"}
FORMATS = {
    "peft": tuple(PEFT_TYPES),
    "diffusers": (*LORA, "dora"),
    "kohya": (*LORA, "dora", "loha", "lokr", "oft", "full"),
}
PEFT_NAMES = {"lora_down": "lora_A.weight", "lora_up": "lora_B.weight", "dora_scale": "lora_magnitude_vector"}


def load_foreign(path: str | Path, kernels: Kernels, name: str) -> Adapters:
    """Load one adapter of another program, as the adapter `name`, for layers with the given kernels.

    Raises:
        OSError: a file cannot be read.
        ValueError: unknown keys or layers, tensors that no decomposition has, or layers of different decompositions.
    """
    path = Path(path)
    folder = path if path.is_dir() else path.parent
    file = path / PEFT_FILES[0] if path.is_dir() else path
    tensors = {key: np.asarray(value, np.float32) for key, value in read_tensors(file).items()}
    if any(key.startswith("base_model.") for key in tensors):
        layers = _peft_layers(file, tensors, _read_config(folder / PEFT_FILES[1]), kernels)
    else:
        metadata = _parse_config(file, read_metadata(file).get("lora_adapter_metadata", "{}"))
        config = {key.removeprefix("unet."): value for key, value in metadata.items()}
        layers = _layers(file, tensors, lambda module, rank: _diffusers_scale(config, module, rank), kernels)
    return _adapter(file, layers, kernels, name)


def save_foreign(path: str | Path, adapters: Adapters, name: str, kernels: Kernels, form: str) -> None:
    """Write the adapter `name` in the format `form` ("peft": a folder, "diffusers", "kohya").

    Raises:
        ValueError: the format has no counterpart of its decomposition.
    """
    spec, tree, target = adapters.specs[name], adapters.trees[name], Path(path)
    if spec.decomposition not in FORMATS[form]:
        raise ValueError(
            f"adapter {name!r} has decomposition {spec.decomposition!r}; the format {form} has only "
            f"{', '.join(FORMATS[form])}"
        )
    write = WRITERS[spec.decomposition]
    layers = {path: write(factors, spec.alpha, kernels[path]) for path, factors in tree.items()}
    state: Tensors = {}
    for layer, tensors in layers.items():
        module = torch_module_name(layer)
        for key, tensor in tensors.items():
            state[_format_key(form, module, key)] = _output_axis(tensor, kernels[layer], key, form)
        if form == "kohya" and "diff" not in tensors:
            # In files of OFT, alpha is the constraint of the rotations; 0 is none.
            alpha = 0 if "oft_blocks" in tensors else _rank(tensors)
            state[_format_key(form, module, "alpha")] = np.asarray(alpha, np.float32)
    if form == "kohya":
        write_safetensors(target, state, {"ss_v2": "True"})  # A1111 takes files without this for Stable Diffusion 1
        return
    config = _peft_config(spec, layers)
    if form == "peft":
        target.mkdir(parents=True, exist_ok=True)
        with atomic_write(target / PEFT_FILES[1]) as file:
            file.write_text(json.dumps(config, indent=1) + "\n")
        write_safetensors(target / PEFT_FILES[0], state, {"format": "pt"})
    else:
        described = json.dumps({f"unet.{key}": value for key, value in config.items()})
        write_safetensors(target, state, {"lora_adapter_metadata": described})


def _format_key(form: str, module: str, name: str) -> str:
    if form == "kohya":
        return f"{_kohya_name(module)}.{name}.weight" if name.startswith("lora_") else f"{_kohya_name(module)}.{name}"
    prefix = "base_model.model." if form == "peft" else "unet."
    return f"{prefix}{module}.{PEFT_NAMES.get(name, name)}"


def _read_config(file: Path) -> dict[str, Any]:
    """Read adapter_config.json; raises as `_parse_config`."""
    return _parse_config(file, file.read_bytes())


def _parse_config(file: Path, text: str | bytes) -> dict[str, Any]:
    """Parse a config of PEFT in JSON.

    Raises:
        ValueError: it is no JSON object; the message names `file`.
    """
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} holds a config that is no JSON: {excerpt(error, 300)}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{file} holds a config that is {excerpt(config)}, not an object with fields")
    return config


def _peft_config(spec: AdapterSpec, layers: Mapping[str, Tensors]) -> dict[str, Any]:
    """Return adapter_config.json: alpha is the rank of each layer."""
    kind = PEFT_TYPES[spec.decomposition]
    ranks = {
        torch_module_name(path): spec.rank_of(path) if kind == "LOKR" else _rank(tensors)
        for path, tensors in layers.items()
    }
    rank = max(ranks.values(), key=list(ranks.values()).count)
    config = {"peft_type": kind, "r": rank, "target_modules": list(ranks)}
    if kind == "HRA":
        return config
    others = {re.escape(module): value for module, value in ranks.items() if value != rank}
    config |= {"rank_pattern": others, "alpha_pattern": others}
    if kind == "LORA":
        return config | {"lora_alpha": rank, "use_dora": spec.decomposition == "dora", "use_rslora": False}
    if kind == "LOKR":
        config |= {"decompose_factor": dict(spec.options).get("factor", -1)}
    return config | {"alpha": rank}


def _peft_layers(file: Path, tensors: Tensors, config: Mapping[str, Any], kernels: Kernels) -> dict[str, TorchLayer]:
    """Read the layers of a PEFT adapter; projections of VeRA are shared by all of them."""
    shared = {key: tensors.pop(f"base_model.{key}") for key in ("vera_A", "vera_B") if f"base_model.{key}" in tensors}
    if config.get("peft_type") == "VERA" and not shared:
        raise ValueError(f"{file}: the projections of VeRA are missing; save it with save_projection=True")
    if config.get("apply_GS"):
        raise ValueError(f"{file}: HRA with apply_GS is another parametrization, which is not read")
    layers = _layers(file, tensors, lambda module, rank: _peft_scale(config, module, rank), kernels)
    terms = config.get("num_cayley_neumann_terms", 5) if config.get("use_cayley_neumann") else None
    for layer in layers.values():
        layer.tensors.update(shared)
        if "oft_R" in layer.tensors:
            layer.tensors["rotation"] = cayley(layer.tensors.pop("oft_R"), terms)
    return layers


def _layers(
    file: Path, tensors: Tensors, scale: Callable[[str, int], float], kernels: Kernels
) -> dict[str, TorchLayer]:
    """Group tensors by layer; `scale(module, rank)` is for layers without an alpha of their own."""
    modules = {torch_module_name(path): path for path in kernels}
    by_kohya_name = {_kohya_name(module): module for module in modules}
    grouped: dict[str, Tensors] = {}
    unknown = []
    for key, tensor in tensors.items():
        found = re.fullmatch(r"(?:base_model\.model\.|unet\.|oft_unet_|lora_unet_)?(.+)", key)
        suffix = next((suffix for suffix in NAMES if found and found[1].endswith(f".{suffix}")), None)
        module = found[1].removesuffix(f".{suffix}") if found and suffix else ""
        module = by_kohya_name.get(f"lora_unet_{module}", module)
        if module in modules and suffix == "diff_b" and not tensor.any():
            continue  # no change of the bias
        if module in modules and suffix and suffix != "diff_b":
            # PEFT's magnitudes of convolutions have the shape (1, out, 1, 1).
            is_magnitude = suffix.startswith("lora_magnitude_vector")
            grouped.setdefault(module, {})[NAMES[suffix]] = tensor.reshape(-1) if is_magnitude else tensor
        else:
            unknown.append(key)
    check_empty(f"{file}: {len(unknown)} tensors belong to no layer of the base model, or are of a kind that is not "
                "read", unknown)  # fmt: skip
    return {modules[module]: _with_scale(module, layer, scale) for module, layer in grouped.items()}


def _with_scale(module: str, tensors: Tensors, scale: Callable[[str, int], float]) -> TorchLayer:
    alpha = tensors.pop("alpha", None)
    if "oft_blocks" in tensors and alpha is not None and alpha > 0:
        # alpha is the constraint: the norm of all rotations of a layer is at most alpha times its outputs.
        blocks = tensors["oft_blocks"]
        limit = float(alpha) * blocks.shape[0] * blocks.shape[1]
        norm = float(np.linalg.norm(blocks - blocks.swapaxes(1, 2)))
        return TorchLayer({**tensors, "oft_blocks": blocks * np.float32(min(1, limit / max(norm, 1e-8)))}, 1.0)
    if alpha is None:
        return TorchLayer(tensors, scale(module, _rank(tensors)))
    both_full = {"lokr_w1", "lokr_w2"} <= set(tensors)  # LyCORIS ignores alpha there
    return TorchLayer(tensors, 1.0 if both_full else float(alpha) / _rank(tensors))


def _adapter(file: Path, layers: Mapping[str, TorchLayer], kernels: Kernels, name: str) -> Adapters:
    """Join layers to an adapter of one decomposition; layers of other ranks are listed in its specification."""
    tree: AdapterTree = {}
    kinds: dict[str, list[str]] = {}
    ranks: dict[str, int] = {}
    for path, layer in layers.items():
        try:
            kind, tree[path], ranks[path] = read_layer(layer, kernels[path])
        except ValueError as error:
            raise ValueError(f"{file}: {torch_module_name(path)}: {error}") from error
        kinds.setdefault(kind, []).append(path)
    if set(kinds) == {"lora", "tucker"}:  # layers without a window are LoRA in both
        kinds = {"tucker": list(layers)}
    if len(kinds) != 1:
        found = "; ".join(f"{kind}: {shorten(paths)}" for kind, paths in kinds.items()) or "no layers"
        raise ValueError(f"{file}: an adapter has one decomposition for all layers, found {found}")
    [kind], values = kinds, list(ranks.values())
    rank = max(values, key=values.count)
    others = tuple((f"^{re.escape(path)}$", value) for path, value in ranks.items() if value != rank)
    spec = AdapterSpec(kind, rank, float(rank), _targets(layers), _options(kind, tree, kernels), others)
    for path, factors in tree.items():  # factors are for dW scaled by 1, that is alpha = r in each layer
        _fold(factors, ranks[path] / rank)
        tree[path] = {key: np.ascontiguousarray(value, np.float32) for key, value in factors.items()}
    return Adapters({name: tree}, {name: spec})


def _fold(factors: dict[str, Any], share: float) -> None:
    """Multiply dW with r / alpha for a layer whose rank r differs from the alpha of the specification."""
    for key in ("b", "b1", "b2"):
        if key in factors and "lambda_b" not in factors and not (key == "b2" and "b1" in factors):
            factors[key] = factors[key] * np.float32(share)


def _targets(layers: Mapping[str, Any]) -> str:
    return "^(" + "|".join(re.escape(path) for path in sorted(layers)) + ")$"


def _options(kind: str, tree: AdapterTree, kernels: Kernels) -> tuple[tuple[str, Any], ...]:
    """Return the option `factor` of LoKr that splits the channels as the file does; () for the default -1.

    Raises:
        ValueError: there is none.
    """
    if kind != "lokr":
        return ()
    sizes = {path: factors["w1"].shape for path, factors in tree.items()}
    for factor in (-1, *sorted({side for shape in sizes.values() for side in shape})):
        split = {path: tuple(factorize(kernels[path].shape[-2 + end], factor)[0] for end in (0, 1)) for path in sizes}
        if split == sizes:
            return () if factor == -1 else (("factor", factor),)
    raise ValueError(f"no option factor splits the channels into {sizes} as LyCORIS does")


def _rank(tensors: Tensors) -> int:
    """Return the rank r of the tensors of a layer; 1 where it has none."""
    for key, axis in (("lora_down", 0), ("hada_w1_b", 0), ("lokr_w2_b", 0), ("lokr_w1_b", 0), ("hra_u", 1)):
        if key in tensors:
            return tensors[key].shape[axis]
    return 1


def _peft_scale(config: Mapping[str, Any], module: str, rank: int) -> float:
    kind = config.get("peft_type", "LORA")
    if kind in ("VERA", "HRA", "OFT"):
        return 1.0
    default = config.get("lora_alpha" if kind == "LORA" else "alpha", 8)
    alpha = _pattern_value(config.get("alpha_pattern"), module, default)
    rank = _pattern_value(config.get("rank_pattern"), module, config.get("r", rank))
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _diffusers_scale(config: Mapping[str, Any], module: str, rank: int) -> float:
    return _peft_scale(config, module, rank) if config else 1.0


def _pattern_value(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """Return the value of the first pattern that matches the end of a module's name, as PEFT does."""
    matching = (value for key, value in (patterns or {}).items() if re.match(rf"(.*\.)?({key})$", module))
    return next(matching, default)


def _kohya_name(module: str) -> str:
    return "lora_unet_" + module.replace(".", "_")


def _output_axis(tensor: np.ndarray, kernel: Any, key: str, form: str) -> np.ndarray:
    """Return DoRA's magnitudes in the shape of the program, and all other tensors as they are."""
    if key != "dora_scale":
        return tensor
    axes = len(kernel.shape)
    if form == "kohya":
        return tensor.reshape(-1, *[1] * (axes - 1))
    return tensor if axes == 2 else tensor.reshape(1, -1, 1, 1)
