"""Perceptual distances between images: LPIPS 0.1 (VGG16, AlexNet) and plain SqueezeNet 1.1 features.

All functions are pure. They take a weights tree whose only top-level key is the name of the feature network:

    {"vgg": {"layers": {"features.0": {"kernel": [3, 3, 3, 64], "bias": [64]}, ...},
             "heads": {"lin0": [64], "lin1": [128], ...}}}            ("squeeze" has no "heads")

Source: Zhang, Isola, Efros, Shechtman, Wang, "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric",
CVPR 2018, equation 1; values agree with version 0.1 of the authors' package, whose linear heads this package contains.
"""

import re
from collections.abc import Callable, Mapping
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import BadZipFile

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pisa_jax.runtime.tensor_files import read_tensors
from pisa_jax.runtime.torch_layout import flax_kernel

ASSETS = Path(__file__).parents[1] / "assets" / "lpips"


class Conv(NamedTuple):
    """One convolution followed by ReLU."""

    name: str
    c_in: int
    c_out: int
    size: int = 3
    stride: int = 1
    pad: int = 1


class Block(NamedTuple):
    """An optional max-pool (stride 2, this window), then convolutions; the output is one feature map."""

    pool: int | None
    convs: tuple[Conv, ...]


class FeatureNetwork(NamedTuple):
    """A feature network: name of its distance, `features(layers, x)`, kernel shapes (HWIO), and if it has heads."""

    label: str
    features: Callable
    kernels: Mapping[str, tuple[int, int, int, int]]
    heads: bool


# Layer numbers, widths and strides are those of torchvision's `features`.
VGG16 = (
    Block(None, (Conv("features.0", 3, 64), Conv("features.2", 64, 64))),
    Block(2, (Conv("features.5", 64, 128), Conv("features.7", 128, 128))),
    Block(2, (Conv("features.10", 128, 256), Conv("features.12", 256, 256), Conv("features.14", 256, 256))),
    Block(2, (Conv("features.17", 256, 512), Conv("features.19", 512, 512), Conv("features.21", 512, 512))),
    Block(2, (Conv("features.24", 512, 512), Conv("features.26", 512, 512), Conv("features.28", 512, 512))),
)
ALEXNET = (
    Block(None, (Conv("features.0", 3, 64, size=11, stride=4, pad=2),)),
    Block(3, (Conv("features.3", 64, 192, size=5, pad=2),)),
    Block(3, (Conv("features.6", 192, 384),)),
    Block(None, (Conv("features.8", 384, 256),)),
    Block(None, (Conv("features.10", 256, 256),)),
)
# (name, squeeze width, expand width of each of the two branches); SqueezeNet 1.1
FIRES = (
    ("fire2", 16, 64),
    ("fire3", 16, 64),
    ("fire4", 32, 128),
    ("fire5", 32, 128),
    ("fire6", 48, 192),
    ("fire7", 48, 192),
    ("fire8", 64, 256),
    ("fire9", 64, 256),
)


def _conv(layer: Mapping, x: Array, stride: int = 1, pad: int = 0) -> Array:
    y = jax.lax.conv_general_dilated(
        x, layer["kernel"], (stride, stride), [(pad, pad)] * 2, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return jax.nn.relu(y + layer["bias"][None, None, None, :])


def _max_pool(x: Array, window: int, ceil: bool = False) -> Array:
    """Max over windows with stride 2; `ceil` keeps a last, partial window (Caffe's rule)."""
    extra = [((n - window) % 2) * ceil for n in x.shape[1:3]]
    padding = [(0, 0), (0, extra[0]), (0, extra[1]), (0, 0)]
    return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, window, window, 1), (1, 2, 2, 1), padding)


def _scale_lpips(x: Array) -> Array:
    """Scaling layer of LPIPS 0.1: normalize images in [-1, 1] by ImageNet statistics."""
    return (x - jnp.array([[[[-0.030, -0.088, -0.188]]]])) / jnp.array([[[[0.458, 0.448, 0.450]]]])


def _sequential_features(blocks: tuple[Block, ...], layers: Mapping, x: Array) -> tuple[Array, ...]:
    x, maps = _scale_lpips(x), []
    for block in blocks:
        if block.pool:
            x = _max_pool(x, block.pool)
        for conv in block.convs:
            x = _conv(layers[conv.name], x, conv.stride, conv.pad)
        maps.append(x)
    return tuple(maps)


def _squeezenet_features(layers: Mapping, x: Array) -> tuple[Array, ...]:
    """Maps after conv1 and fire 3, 5, 6, 7, 8, 9; the weights expect BGR in 0..255 minus the ImageNet mean."""
    x = (x[..., ::-1] + 1) * 127.5 - jnp.array([[[[103.939, 116.779, 123.68]]]])
    x = _conv(layers["conv1"], x, stride=2)
    maps = [x]
    for name, _, _ in FIRES:
        if name in ("fire2", "fire4", "fire6"):
            x = _max_pool(x, 3, ceil=True)
        x = _conv(layers[f"{name}/squeeze1x1"], x)
        wide = (_conv(layers[f"{name}/expand1x1"], x), _conv(layers[f"{name}/expand3x3"], x, pad=1))
        x = jnp.concatenate(wide, axis=-1)
        if name not in ("fire2", "fire4"):
            maps.append(x)
    return tuple(maps)


def _sequential_kernels(blocks: tuple[Block, ...]) -> dict[str, tuple[int, int, int, int]]:
    return {c.name: (c.size, c.size, c.c_in, c.c_out) for block in blocks for c in block.convs}


def _squeezenet_kernels() -> dict[str, tuple[int, int, int, int]]:
    kernels = {"conv1": (3, 3, 3, 64)}
    widths = [64, *(2 * expand for _, _, expand in FIRES)]
    for (name, squeeze, expand), (c_in, _) in zip(FIRES, pairwise(widths), strict=True):
        kernels[f"{name}/squeeze1x1"] = (1, 1, c_in, squeeze)
        kernels[f"{name}/expand1x1"] = (1, 1, squeeze, expand)
        kernels[f"{name}/expand3x3"] = (3, 3, squeeze, expand)
    return kernels


def _sequential_network(label: str, blocks: tuple[Block, ...]) -> FeatureNetwork:
    return FeatureNetwork(label, partial(_sequential_features, blocks), _sequential_kernels(blocks), heads=True)


FEATURE_NETWORKS: Mapping[str, FeatureNetwork] = {
    "vgg": _sequential_network("LPIPS 0.1 (VGG16)", VGG16),
    "alex": _sequential_network("LPIPS 0.1 (AlexNet)", ALEXNET),
    "squeeze": FeatureNetwork(
        "SqueezeNet 1.1 feature distance, no heads", _squeezenet_features, _squeezenet_kernels(), heads=False
    ),
}


def _feature_network(name: str) -> FeatureNetwork:
    if name not in FEATURE_NETWORKS:
        raise ValueError(f"unknown perceptual network {name!r}: use one of {', '.join(FEATURE_NETWORKS)}")
    return FEATURE_NETWORKS[name]


def weight_shapes(network: str) -> dict[str, Any]:
    """Return the shapes of the weights that `load_weights` returns for a network.

    Raises:
        ValueError: unknown network.
    """
    found, of = _feature_network(network), partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    tree = {"layers": {key: {"kernel": of(shape), "bias": of(shape[-1:])} for key, shape in found.kernels.items()}}
    if found.heads:
        maps = jax.eval_shape(found.features, tree["layers"], of((1, 64, 64, 3)))
        tree["heads"] = {f"lin{index}": of(each.shape[-1:]) for index, each in enumerate(maps)}
    return {network: tree}


def _unpack(weights: Mapping) -> tuple[FeatureNetwork, Mapping]:
    if len(weights) != 1:
        raise ValueError(
            f"perceptual weights need one top-level key out of {list(FEATURE_NETWORKS)}, got {list(weights)}"
        )
    ((name, tree),) = weights.items()
    return _feature_network(name), tree


def distance_name(weights: Mapping) -> str:
    """Name of the distance computed with these weights, for logs: "LPIPS 0.1 (VGG16)"."""
    return _unpack(weights)[0].label


def features(weights: Mapping, x: Float[Array, "b h w 3"]) -> tuple[Float[Array, "b _ _ _"], ...]:
    """Feature maps (after ReLU) of images in [-1, 1]: 5 for VGG16 and AlexNet, 7 for SqueezeNet.

    Raises ValueError if the images are so small that a map would be empty.
    """
    network, tree = _unpack(weights)
    maps = network.features(tree["layers"], x.astype(jnp.float32))
    if any(m.size == 0 for m in maps):
        raise ValueError(f"images of {x.shape[1]}x{x.shape[2]} are too small for {network.label}: use 32x32 or more")
    return maps


def _unit(x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    """Normalize over channels: x / (|x| + 1e-10).

    Where all channels are zero, value and gradient are 0; in the original implementation that gradient is NaN.
    """
    square = jnp.sum(x**2, axis=-1, keepdims=True)
    norm = jnp.sqrt(jnp.where(square > 0, square, 1.0))
    return jnp.where(square > 0, x / (norm + 1e-10), 0.0)


def layer_terms(
    weights: Mapping, a: Float[Array, "b h w 3"], b: Float[Array, "b h w 3"]
) -> tuple[Float[Array, " b"], ...]:
    """Terms of the distance, one per layer: mean over positions of sum_c w_c (u_c(a) - u_c(b))^2.

    u: features normalized over channels; w: weights of the head, or 1.
    """
    _, tree = _unpack(weights)
    terms = []
    # Two passes instead of one on a doubled batch, because only one image needs a gradient.
    for k, (fa, fb) in enumerate(zip(features(weights, a), features(weights, b), strict=True)):
        square = (_unit(fa) - _unit(fb)) ** 2
        if "heads" in tree:
            square = square * tree["heads"][f"lin{k}"][None, None, None, :]
        terms.append(square.sum(axis=-1).mean(axis=(1, 2)))
    return tuple(terms)


def distance(weights: Mapping, a: Float[Array, "b h w 3"], b: Float[Array, "b h w 3"]) -> Float[Array, " b"]:
    """Perceptual distance between images in [-1, 1], computed in float32; 0 (to rounding) for equal images.

    The caller sets the matrix precision (`jax.default_matmul_precision`). Without heads (SqueezeNet) every channel has
    weight 1: values are about ten times those of LPIPS and must not be reported as LPIPS.
    Reference: Zhang et al. 2018, equation 1.
    """
    return sum(layer_terms(weights, a, b))


def _locate(source: str) -> Path:
    """Path of the weights: a local file, or model.safetensors of a Hugging Face hub id, downloaded if necessary."""
    path = Path(source).expanduser()
    if path.is_file():
        return path
    if path.suffix in (".safetensors", ".pth", ".pt", ".bin", ".npz") or not re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        raise FileNotFoundError(
            f"no perceptual weights at {source!r}: give a .safetensors, .pth or .npz file, or a hub id "
            "such as timm/vgg16.tv_in1k"
        )
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(source, "model.safetensors"))
    except (OSError, ValueError) as error:
        raise OSError(
            f"perceptual weights of the hub id {source!r} could not be downloaded ({error}): "
            "download its model.safetensors on another machine and give the file"
        ) from error


def _read(path: Path) -> dict[str, np.ndarray]:
    if path.suffix != ".npz":
        return read_tensors(path)
    try:
        # Given a path, np.load does not close a file that it cannot read.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            return dict(archive)
    except (ValueError, OSError, EOFError, BadZipFile) as error:
        raise OSError(f"{path} is not a readable .npz of arrays: {error}") from error


def _layer(tensors: Mapping, name: str) -> dict[str, np.ndarray] | None:
    """Kernel (HWIO) and bias of one layer, from `name.weight` (PyTorch, OIHW) or `name/kernel` (HWIO)."""
    if f"{name}.weight" in tensors and f"{name}.bias" in tensors:
        kernel, bias = np.asarray(tensors[f"{name}.weight"]), np.asarray(tensors[f"{name}.bias"])
        kernel = flax_kernel(kernel)
    elif f"{name}/kernel" in tensors and f"{name}/bias" in tensors:
        kernel, bias = np.asarray(tensors[f"{name}/kernel"]), np.asarray(tensors[f"{name}/bias"])
    else:
        return None
    return {"kernel": kernel.astype(np.float32), "bias": bias.astype(np.float32)}


def load_weights(source: str | Path | None, network: str) -> dict:
    """Load the weights tree (numpy, float32) of a network: "vgg", "alex" or "squeeze". The package has the LPIPS heads.

    source: a state dict with torchvision's names (`features.0.weight`, ...; .safetensors, .pth), an .npz of arrays
    `conv1/kernel`, ..., a hub id such as timm/vgg16.tv_in1k, or None for the file in the package (squeeze only).
    Other tensors of the file (the classifier) are ignored.
    Raises ValueError for missing tensors or wrong shapes, OSError if the file cannot be read or downloaded.
    """
    spec = _feature_network(network)
    if source is None and spec.heads:
        raise ValueError(
            f"{spec.label} needs the weights of its network, which this package does not contain: give a torchvision "
            "state dict" + (" or the hub id timm/vgg16.tv_in1k" if network == "vgg" else "")
        )
    path = ASSETS / "squeezenet1_1.safetensors" if source is None else _locate(str(source))
    tensors = _read(path)
    layers, problems = {}, []
    for name, kernel in spec.kernels.items():
        layer = _layer(tensors, name)
        if layer is None:
            problems.append(f"{name} is missing (weight and bias)")
        elif (layer["kernel"].shape, layer["bias"].shape) != (kernel, kernel[3:]):
            found = f"{layer['kernel'].shape} and {layer['bias'].shape}"
            problems.append(f"{name} has kernel and bias {found} (HWIO), expected {kernel} and {kernel[3:]}")
        else:
            layers[name] = layer
    if problems:
        expected = f"expected {len(spec.kernels)} layers: {', '.join(spec.kernels)}"
        raise ValueError(
            f"{path} does not hold {network} features: {'; '.join(problems[:4])}"
            f"{f'; and {len(problems) - 4} more' if len(problems) > 4 else ''}. {expected}. "
            f"The file has: {', '.join(sorted(tensors)[:6])}{', ...' if len(tensors) > 6 else ''}"
        )
    tree = {"layers": layers}
    if spec.heads:
        heads = read_tensors(ASSETS / "heads.safetensors")
        tree["heads"] = {f"lin{k}": heads[f"{network}.lin{k}"] for k in range(5)}
    return {network: tree}
