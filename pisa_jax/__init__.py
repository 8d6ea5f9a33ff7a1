"""Adjustable one-step real-world super-resolution: PiSA-SR in JAX and Flax.

The public names are listed in `__init__.pyi`. They are imported on first use: importing jax takes seconds, and
`pisa-sr --help` and the data workers do without it.
"""

import lazy_loader

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
