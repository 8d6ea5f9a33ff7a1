"""Conversion of the factors of one layer to and from the tensors of other programs, in PyTorch layout.

Tensors have the names of LyCORIS without ".weight" ("lora_down", "hada_w1_a", ...); `foreign_files` adds the keys of
each program. The scale alpha / r is a part of the file formats: reading returns factors for the alpha of a
specification, and writing folds it into the factors, for programs that ignore alpha.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from pisa_jax.adapters.adapter_tree import Factors
from pisa_jax.adapters.decomposition import from_matrix, to_matrix
from pisa_jax.runtime.torch_layout import flax_kernel, torch_kernel

Tensors = dict[str, np.ndarray]


class TorchLayer(NamedTuple):
    """The tensors of one layer, and the number that its program multiplies dW with."""

    tensors: Tensors
    scale: float


class Converter(NamedTuple):
    """Reader of a decomposition from the tensors of a layer."""

    # Tensors that a layer of this decomposition has, and those that it may have.
    required: frozenset[str]
    optional: frozenset[str]
    # read(tensors, kernel) -> (factors, rank), without the scale.
    read: Callable[[Tensors, Any], tuple[Factors, int]]
    # Name of the factor that the scale of the file is folded into; None: this decomposition has no scale.
    scaled: str | None


def read_layer(layer: TorchLayer, kernel: Any) -> tuple[str, Factors, int]:
    """Return the decomposition, the factors and the rank of a layer; dW is that of the file for alpha / r = 1.

    `kernel` is the base weight in Flax layout, or its shape where its values are not needed.

    Raises:
        ValueError: tensors of no known decomposition.
    """
    for name, converter in READERS.items():
        found = set(layer.tensors)
        if converter.required <= found <= converter.required | converter.optional:
            factors, rank = converter.read(layer.tensors, kernel)
            if converter.scaled in factors:
                factors[converter.scaled] = factors[converter.scaled] * np.float32(layer.scale)
            return name.partition(":")[0], factors, rank
    raise ValueError(f"tensors {', '.join(sorted(layer.tensors))} belong to no decomposition that can be read")


def fitted(tensor: np.ndarray, kernel: Any) -> np.ndarray:
    """Return a factor in Flax layout with the number of axes of the kernel: 1 x 1 convolutions may be stored as linear.

    Raises:
        ValueError: other axes.
    """
    axes = len(kernel.shape)
    if tensor.ndim == 2 and axes == 4:
        tensor = tensor[:, :, None, None]
    if tensor.ndim == 4 and axes == 2 and tensor.shape[2:] == (1, 1):
        tensor = tensor[:, :, 0, 0]
    if tensor.ndim != axes:
        raise ValueError(f"a tensor has shape {tensor.shape}, and the layer a kernel of shape {tuple(kernel.shape)}")
    return flax_kernel(tensor)


def _windowed(matrix: np.ndarray, kernel: Any) -> np.ndarray:
    """Return a matrix (n, r), whose rows are flattened inputs with the kernel's window, as a factor (kh, kw, c, r)."""
    return from_matrix(matrix, (*kernel.shape[:-2], -1, matrix.shape[-1]))  # LoKr has fewer inputs than the kernel


def _read_lora(tensors: Tensors, kernel: Any) -> tuple[Factors, int]:
    a, b = fitted(tensors["lora_down"], kernel), fitted(tensors["lora_up"], kernel)
    return {"a": a, "b": b}, a.shape[-1]


def _read_tucker(tensors: Tensors, kernel: Any) -> tuple[Factors, int]:
    factors, rank = _read_lora(tensors, kernel)
    return {**factors, "t": flax_kernel(tensors["lora_mid"])}, rank


def _read_dora(tensors: Tensors, kernel: Any) -> tuple[Factors, int]:
    factors, rank = _read_lora(tensors, kernel)
    magnitude = tensors["dora_scale"]
    if magnitude.size != kernel.shape[-1] or magnitude.shape[0] == 1:
        raise ValueError(f"dora_scale {magnitude.shape} is no magnitude of the {kernel.shape[-1]} outputs")
    return {**factors, "m": magnitude.reshape(-1) - output_norms(kernel)}, rank


def output_norms(kernel: Any) -> np.ndarray:
    """Return the norm of the weights of each output; raises as `_values`."""
    weights = _values(kernel)
    return np.sqrt(np.sum(weights**2, axis=tuple(range(weights.ndim - 1)), dtype=np.float64)).astype(np.float32)


def _values(kernel: Any) -> np.ndarray:
    """Return the values of a kernel.

    Raises:
        ValueError: `kernel` is a shape only.
    """
    if not hasattr(kernel, "__array__"):
        raise ValueError("this adapter depends on the weights of the base model; give it (--model)")
    return np.asarray(kernel, np.float32)


def _read_loha(tensors: Tensors, kernel: Any) -> tuple[Factors, int]:
    factors: Factors = {}
    for index in "12":
        w_a, w_b = tensors[f"hada_w{index}_a"], tensors[f"hada_w{index}_b"]
        if f"hada_t{index}" in tensors:  # Tucker: folded into the input side, whose rank is the same
            core = tensors[f"hada_t{index}"]
            factors[f"a{index}"] = np.einsum("ijkl,jn->klni", core, w_b)
            factors[f"b{index}"] = w_a
        else:
            factors[f"a{index}"], factors[f"b{index}"] = _windowed(w_b.T, kernel), w_a.T
    return factors, factors["b1"].shape[0]


def _read_lokr(tensors: Tensors, kernel: Any) -> tuple[Factors, int]:
    first = tensors["lokr_w1"] if "lokr_w1" in tensors else tensors["lokr_w1_a"] @ tensors["lokr_w1_b"]
    if "lokr_w2" in tensors:
        second, rank = fitted(tensors["lokr_w2"], kernel), math.ceil(max(tensors["lokr_w2"].shape[:2]) / 2)
        return {"w1": first.T, "w2": second}, rank
    w_a, w_b = tensors["lokr_w2_a"], tensors["lokr_w2_b"]
    if "lokr_t2" in tensors:  # Tucker: w_a is (r, out) there
        return {"w1": first.T, "a2": np.einsum("ijkl,jn->klni", tensors["lokr_t2"], w_b), "b2": w_a}, len(w_a)
    return {"w1": first.T, "a2": _windowed(w_b.T, kernel), "b2": w_a.T}, len(w_b)


def _read_vera(tensors: Tensors, kernel: Any) -> tuple[Factors, int]:
    a, b = tensors["vera_A"][:, : kernel.shape[0]], tensors["vera_B"][: kernel.shape[-1]]
    return {
        "a": a.T,
        "b": b.T,
        "lambda_d": tensors["vera_lambda_d"],
        "lambda_b": tensors["vera_lambda_b"],
    }, len(a)


def _read_oft(tensors: Tensors, kernel: Any) -> tuple[Factors, int]:
    blocks = tensors["oft_blocks"]
    if blocks.ndim != 3 or blocks.shape[0] * blocks.shape[1] != kernel.shape[-1]:
        raise ValueError(f"oft_blocks {blocks.shape} are no blocks of {kernel.shape[-1]} outputs (BOFT is not read)")
    return {"x": blocks}, blocks.shape[-1]


def _read_hra(tensors: Tensors, kernel: Any) -> tuple[Factors, int]:
    return {"u": _windowed(tensors["hra_u"], kernel)}, tensors["hra_u"].shape[-1]


def _read_full(tensors: Tensors, kernel: Any) -> tuple[Factors, int]:
    return {"w": fitted(tensors["diff"], kernel)}, 1


def _read_rotation(tensors: Tensors, kernel: Any) -> tuple[Factors, int]:
    """Read rotations of the inputs (PEFT's OFT), which no decomposition here has, as the weight difference itself."""
    if len(kernel.shape) != 2:
        raise ValueError("PEFT rotates unfolded images for OFT of convolutions, which is no change of the weights")
    weights, rotation = _values(kernel), tensors["rotation"]
    count = kernel.shape[0] // rotation.shape[-1]
    blocks = weights.reshape(count, -1, kernel.shape[-1])  # one rotation may be shared by all blocks
    return {"w": (rotation @ blocks - blocks).reshape(kernel.shape)}, 1


def cayley(vectors: np.ndarray, terms: int | None) -> np.ndarray:
    """Return the rotations R of shape (blocks, b, b) that PEFT computes from the upper triangles of Q.

    R = (I - Q) (I + Q)^-1, or for Neumann's series of `terms` terms R = I + 2 Q + 2 Q^2 + ... + Q^(terms - 1); with
    three terms PEFT computes four.
    """
    size = round((1 + math.sqrt(1 + 8 * vectors.shape[1])) / 2)
    q = np.zeros((len(vectors), size, size))
    rows, columns = np.triu_indices(size, 1)
    q[:, rows, columns] = vectors
    q -= q.swapaxes(1, 2)
    eye = np.eye(size)
    if terms is None:
        return (eye - q) @ np.linalg.inv(eye + q)
    powers = [np.linalg.matrix_power(q, power) for power in range(1, 4 if terms == 3 else terms)]
    last = powers.pop() if terms > 2 else 0
    return eye + 2 * sum(powers, np.zeros_like(q)) + last


def _converter(required: str, read: Callable, scaled: str | None, optional: str = "") -> Converter:
    return Converter(frozenset(required.split()), frozenset(optional.split()), read, scaled)


HADAMARD = "hada_w1_a hada_w1_b hada_w2_a hada_w2_b"
# Decomposition -> converter; what follows ":" tells apart several sets of tensors of one decomposition.
READERS = {
    "lora": _converter("lora_down lora_up", _read_lora, "b"),
    "tucker": _converter("lora_down lora_mid lora_up", _read_tucker, "b"),
    "dora": _converter("lora_down lora_up dora_scale", _read_dora, "b"),
    "loha": _converter(HADAMARD, _read_loha, "b1", "hada_t1 hada_t2"),
    "lokr": _converter("lokr_w2_a lokr_w2_b", _read_lokr, "b2", "lokr_w1 lokr_w1_a lokr_w1_b lokr_t2"),
    "lokr:full": _converter("lokr_w2", _read_lokr, "w2", "lokr_w1 lokr_w1_a lokr_w1_b"),
    "vera": _converter("vera_A vera_B vera_lambda_b vera_lambda_d", _read_vera, None),
    "oft": _converter("oft_blocks", _read_oft, None),
    "hra": _converter("hra_u", _read_hra, None),
    "full": _converter("diff", _read_full, None),
    "full:rotation": _converter("rotation", _read_rotation, None),
}


def _lora_tensors(a: np.ndarray, b: np.ndarray, scale: float) -> Tensors:
    """Return lora_down and lora_up for dW = scale B A, which readers multiply by alpha / r = 1."""
    b = b.reshape(*[1] * (a.ndim - 2), *b.shape[-2:])
    return {"lora_down": torch_kernel(a), "lora_up": torch_kernel(b * np.float32(scale))}


def _write_lora(factors: Factors, alpha: float, kernel: Any) -> Tensors:
    return _lora_tensors(factors["a"], factors["b"], alpha / factors["a"].shape[-1])


def _write_rslora(factors: Factors, alpha: float, kernel: Any) -> Tensors:
    return _lora_tensors(factors["a"], factors["b"], alpha / math.sqrt(factors["a"].shape[-1]))


def _write_difference(factors: Factors, alpha: float, kernel: Any) -> Tensors:
    """Write B A - B0 A0 (PiSSA, OLoRA) as LoRA of twice the rank."""
    a = np.concatenate([factors["a"], factors["a0"]], axis=-1)
    b = np.concatenate([factors["b"], -factors["b0"]], axis=-2)
    return _lora_tensors(a, b, 2 * alpha / a.shape[-1])


def _write_tucker(factors: Factors, alpha: float, kernel: Any) -> Tensors:
    """Write a Tucker factorization as LoRA of the same rank, which more programs read."""
    a = factors["a"] @ factors["t"] if "t" in factors else factors["a"]
    return _lora_tensors(a, factors["b"], alpha / a.shape[-1])


def _write_dora(factors: Factors, alpha: float, kernel: Any) -> Tensors:
    return {**_write_lora(factors, alpha, kernel), "dora_scale": factors["m"] + output_norms(kernel)}


def _write_loha(factors: Factors, alpha: float, kernel: Any) -> Tensors:
    scale = np.float32(alpha / factors["b1"].shape[0])
    tensors = {"hada_w1_a": factors["b1"].T * scale, "hada_w1_b": to_matrix(factors["a1"]).T}
    return {**tensors, "hada_w2_a": factors["b2"].T, "hada_w2_b": to_matrix(factors["a2"]).T}


def _write_lokr(factors: Factors, alpha: float, kernel: Any) -> Tensors:
    if "w2" in factors:
        return {"lokr_w1": factors["w1"].T, "lokr_w2": torch_kernel(factors["w2"])}
    scale = np.float32(alpha / len(factors["b2"]))
    tensors = {"lokr_w2_a": factors["b2"].T * scale, "lokr_w2_b": to_matrix(factors["a2"]).T}
    return {"lokr_w1": factors["w1"].T, **tensors}


def _write_vera(factors: Factors, alpha: float, kernel: Any) -> Tensors:
    """Write VeRA as LoRA: A and B belong to each layer here, and are shared in files of VeRA."""
    return _lora_tensors(factors["a"], factors["lambda_d"][:, None] * factors["b"] * factors["lambda_b"], 1.0)


# Decomposition -> write(factors, alpha, kernel) -> tensors that are multiplied by 1.
WRITERS: Mapping[str, Callable[[Factors, float, Any], Tensors]] = {
    "lora": _write_lora,
    "rslora": _write_rslora,
    "pissa": _write_difference,
    "olora": _write_difference,
    "tucker": _write_tucker,
    "vera": _write_vera,
    "dora": _write_dora,
    "loha": _write_loha,
    "lokr": _write_lokr,
    "oft": lambda factors, alpha, kernel: {"oft_blocks": factors["x"]},
    "hra": lambda factors, alpha, kernel: {"hra_u": to_matrix(factors["u"])},
    "full": lambda factors, alpha, kernel: {"diff": torch_kernel(factors["w"])},
}
