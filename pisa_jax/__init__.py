"""Adjustable one-step real-world super-resolution: PiSA-SR in JAX and Flax."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pisa_jax.inference import Settings, Upscaler

__version__ = "0.1.0"
__all__ = ["Settings", "Upscaler", "__version__"]


def __getattr__(name: str):
    # Importing jax takes seconds; `infer.py --help` and the data workers do without.
    if name in ("Settings", "Upscaler"):
        from pisa_jax import inference

        return getattr(inference, name)
    raise AttributeError(f"module 'pisa_jax' has no attribute {name!r}")
