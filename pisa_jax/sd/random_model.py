"""Stable Diffusion checkpoints with random weights, for tests, benchmarks, and trying a training setup."""

import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pisa_jax.adapters import files, injection
from pisa_jax.adapters.adapter_tree import Adapters
from pisa_jax.config import AdapterSpec
from pisa_jax.model import BaseModel
from pisa_jax.runtime.trees import flatten, unflatten
from pisa_jax.sd import backbone, pretrained
from pisa_jax.sd.base_model import make_base_model

UNET = {
    "_class_name": "UNet2DConditionModel",
    "act_fn": "silu",
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": [320, 640, 1280, 1280],
    "layers_per_block": 2,
    "cross_attention_dim": 1024,
    "attention_head_dim": [5, 10, 20, 20],
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    "norm_eps": 1e-5,
    "norm_num_groups": 32,
    "sample_size": 64,
    "use_linear_projection": True,
}
VAE = {
    "_class_name": "AutoencoderKL",
    "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "sample_size": 768,
    "scaling_factor": 0.18215,
}
TEXT = {
    "hidden_act": "gelu",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "max_position_embeddings": 77,
    "num_attention_heads": 16,
    "num_hidden_layers": 23,
    "vocab_size": 49408,
    "eos_token_id": 2,
}
SCHEDULER = {
    "_class_name": "DDPMScheduler",
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "prediction_type": "epsilon",
}
_SMALL_TEXT = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2}
_SMALL_TEXT |= {"vocab_size": 514}
# Size -> changes to the configs of the UNet, the VAE and the text encoder.
SIZES = {
    "sd21": ({}, {}, {}),
    # Half the channels, a quarter of the operations and memory.
    "half": (
        {"block_out_channels": [160, 320, 640, 640], "attention_head_dim": [5, 5, 10, 10], "cross_attention_dim": 512},
        {"block_out_channels": [64, 128, 256, 256]},
        {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8, "num_hidden_layers": 12},
    ),
    # The same blocks, 2 M parameters.
    "tiny": (
        {"block_out_channels": [32, 32, 64, 64], "layers_per_block": 1, "cross_attention_dim": 32}
        | {"attention_head_dim": [2, 2, 4, 4], "sample_size": 8},
        {"block_out_channels": [32, 32, 32, 64], "layers_per_block": 1},
        _SMALL_TEXT,
    ),
    # Fewer blocks, so it compiles in seconds; 4 pixels per latent and 8 channels.
    "nano": (
        {"block_out_channels": [32, 64], "layers_per_block": 1, "cross_attention_dim": 32, "in_channels": 8}
        | {"attention_head_dim": [2, 4], "sample_size": 8, "out_channels": 8}
        | {"down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"]}
        | {"up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"]},
        {"block_out_channels": [32, 32, 64], "layers_per_block": 1, "latent_channels": 8}
        | {"down_block_types": ["DownEncoderBlock2D"] * 3, "up_block_types": ["UpDecoderBlock2D"] * 3},
        _SMALL_TEXT,
    ),
}


def model_configs(size: str) -> tuple[dict, dict, dict]:
    """Return the config.json of the UNet, the VAE and the text encoder for a size in `SIZES`.

    Raises:
        ValueError: unknown size.
    """
    if size not in SIZES:
        raise ValueError(f"unknown size {size!r}, known: {', '.join(SIZES)}")
    unet, vae, text = SIZES[size]
    return UNET | unet, VAE | vae, TEXT | text


def base_model_of_size(size: str) -> BaseModel:
    """Return the functions of a model of the given size, without weights."""
    return make_base_model(backbone.build_modules(*model_configs(size)))


def random_params(shapes: dict, rng: np.random.Generator, dtype: Any = np.float32) -> dict:
    """Draw weights that preserve the magnitude of activations: N(0, 1 / fan_in), scales 1, biases 0."""

    def leaf(path: str, shape: tuple) -> np.ndarray:
        name = path.rsplit("/", 1)[-1]
        if name in ("scale", "bias"):
            return np.full(shape, float(name == "scale"), dtype)
        fan_in = math.prod(shape[:-1]) if name == "kernel" else 1
        return (rng.standard_normal(shape, np.float32) / math.sqrt(fan_in)).astype(dtype)

    return unflatten({path: leaf(path, value.shape) for path, value in flatten(shapes).items()})


def write_tokenizer(folder: Path) -> None:
    """Write a tokenizer with CLIP's byte-level vocabulary and no merges: one token per byte."""
    # CLIP represents printable bytes as themselves, and the others as characters from 256; printable ones come first.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [*map(chr, printable), *map(chr, range(256, 512 - len(printable)))]
    tokens = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    special["pad_token"] = "!"  # as SD 2.1 pads
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, **special})
    )


def write_random_model(folder: Path, size: str = "tiny", seed: int = 0, dtype: str = "float32") -> None:
    """Write a diffusers folder, and in it `adapters.safetensors` with non-zero factors in both adapters."""
    rng = np.random.default_rng(seed)
    model = dict(zip(("unet", "vae", "text"), model_configs(size), strict=True))
    modules = backbone.build_modules(**model)
    shapes = backbone.param_shapes(modules)
    params = {part: random_params(shapes[part], rng, np.dtype(dtype)) for part in pretrained.PARTS}
    pretrained.write_pretrained(folder, model, params, SCHEDULER, dtype)
    write_tokenizer(folder / "tokenizer")
    spec = AdapterSpec()
    trees = {}
    for index, name in enumerate(("pix", "sem")):
        tree = injection.init_adapter(jax.random.key(seed + index), shapes["unet"], spec)
        trees[name] = jax.tree.map(lambda leaf: np.asarray(leaf + 0.02 * jnp.ones_like(leaf)), tree)
    files.save_adapters(folder / "adapters.safetensors", Adapters(trees, dict.fromkeys(trees, spec), size))
