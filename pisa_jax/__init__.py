"""Adjustable one-step real-world super-resolution: PiSA-SR in JAX and Flax."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pisa_jax.adapters.files import Adapters, load_adapters, save_adapters
    from pisa_jax.adapters.lora import init as init_adapter
    from pisa_jax.adapters.lora import interceptor, merge
    from pisa_jax.config import AdapterSpec, Config, Data, Stage, Validation
    from pisa_jax.data.degradation import degrade
    from pisa_jax.data.loader import make_loader
    from pisa_jax.data.sources import folder_source
    from pisa_jax.inference import Session, Settings, Upscaler
    from pisa_jax.model import BaseModel, LoadedModel, combine, predict
    from pisa_jax.runtime.distributed import make_mesh
    from pisa_jax.sd.pretrained import load as load_model
    from pisa_jax.train_step import Batch, Objective, init_state, jit_train_step, make_frozen
    from pisa_jax.training import train

__version__ = "0.1.0"

# The public names, and where they are defined. They are imported on first use: importing jax takes seconds, and
# `pisa-sr --help` and the data workers do without it.
_PUBLIC = {
    "AdapterSpec": "config",
    "Adapters": "adapters.files",
    "BaseModel": "model",
    "Batch": "train_step",
    "Config": "config",
    "Data": "config",
    "LoadedModel": "model",
    "Objective": "train_step",
    "Session": "inference",
    "Settings": "inference",
    "Stage": "config",
    "Upscaler": "inference",
    "Validation": "config",
    "combine": "model",
    "degrade": "data.degradation",
    "folder_source": "data.sources",
    "init_adapter": "adapters.lora:init",
    "init_state": "train_step",
    "interceptor": "adapters.lora",
    "jit_train_step": "train_step",
    "load_adapters": "adapters.files",
    "load_model": "sd.pretrained:load",
    "make_frozen": "train_step",
    "make_loader": "data.loader",
    "make_mesh": "runtime.distributed",
    "merge": "adapters.lora",
    "predict": "model",
    "save_adapters": "adapters.files",
    "train": "training",
}
__all__ = [*_PUBLIC, "__version__"]


def __getattr__(name: str):
    if name not in _PUBLIC:
        raise AttributeError(f"module 'pisa_jax' has no attribute {name!r}")
    module, _, attribute = _PUBLIC[name].partition(":")
    return getattr(importlib.import_module(f"pisa_jax.{module}"), attribute or name)


def __dir__() -> list[str]:
    return __all__
