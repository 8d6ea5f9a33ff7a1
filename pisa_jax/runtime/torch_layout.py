"""Conversion between PyTorch and Flax: layout of kernels, and names of modules."""

import re

import numpy as np


def flax_kernel(weight: np.ndarray) -> np.ndarray:
    """Return a view in Flax layout; arrays of other than 2 or 4 axes (biases, norms) are returned as they are.

    Linear (out, in) -> (in, out); convolution (out, in, h, w) -> (h, w, in, out).
    """
    axes = {2: (1, 0), 4: (2, 3, 1, 0)}.get(weight.ndim)
    return weight.transpose(axes) if axes else weight


def torch_kernel(kernel: np.ndarray) -> np.ndarray:
    """Return a view in PyTorch layout; inverse of `flax_kernel`."""
    axes = {2: (1, 0), 4: (3, 2, 0, 1)}.get(kernel.ndim)
    return kernel.transpose(axes) if axes else kernel


def flax_module_path(torch_name: str) -> str:
    """Return the Flax path of a module of the UNet, the VAE or the text encoder from its PyTorch name.

    diffusers joins numbers to names ("resnets_0"); transformers keeps its numbered layers apart ("layers/0").

    >>> flax_module_path("up_blocks.1.attentions.0.transformer_blocks.0.ff.net.0.proj")
    'up_blocks_1/attentions_0/transformer_blocks_0/ff/net_0/proj'
    """
    return re.sub(r"(?<!layers)\.(\d+)", r"_\1", torch_name).replace(".", "/")


def torch_module_name(flax_path: str) -> str:
    """Inverse of `flax_module_path`.

    `linear_1` and `linear_2` (of the UNet's time embedding) have the same names in PyTorch.
    """
    return re.sub(r"(?<!linear)_(\d+)(?=/|$)", r".\1", flax_path).replace("/", ".")
