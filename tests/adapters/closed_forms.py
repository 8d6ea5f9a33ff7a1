"""Adapted weights W' of every decomposition from its published formula, independent of the package.

A function takes the factors and W as float64 arrays in Flax layout, and alpha; it returns W' in Flax layout.
"""

import math

import numpy as np


def torch_weight(kernel):
    """(in, out) -> (out, in); (kh, kw, in, out) -> (out, in, kh, kw)."""
    return kernel.T if kernel.ndim == 2 else kernel.transpose(3, 2, 0, 1)


def flax_weight(weight):
    """Inverse of `torch_weight`."""
    return weight.T if weight.ndim == 2 else weight.transpose(2, 3, 1, 0)


def low_rank(a, b):
    """B A for A (r, in, kh, kw) or (r, in) and B (out, r, 1, 1) or (out, r), as peft multiplies them."""
    a, b = torch_weight(a), torch_weight(b)
    return (b.reshape(b.shape[:2]) @ a.reshape(len(a), -1)).reshape(len(b), *a.shape[1:])


def lora(f, w, alpha):
    return w + flax_weight(low_rank(f["a"], f["b"])) * alpha / f["a"].shape[-1]


def rslora(f, w, alpha):
    return w + flax_weight(low_rank(f["a"], f["b"])) * alpha / math.sqrt(f["a"].shape[-1])


def from_weights(f, w, alpha):
    difference = low_rank(f["a"], f["b"]) - low_rank(f["a0"], f["b0"])
    return w + flax_weight(difference) * alpha / f["a"].shape[-1]


def tucker(f, w, alpha):
    if "t" not in f:
        return lora(f, w, alpha)
    down, mid, up = (torch_weight(f[name]) for name in "atb")
    weight = np.einsum("oq,qphw,pi->oihw", up[:, :, 0, 0], mid, down[:, :, 0, 0])
    return w + flax_weight(weight) * alpha / len(down)


def dora(f, w, alpha):
    norm = np.linalg.norm(torch_weight(w).reshape(w.shape[-1], -1), axis=1)
    v = torch_weight(lora(f, w, alpha))
    direction = v / np.linalg.norm(v.reshape(len(v), -1), axis=1).reshape(-1, *[1] * (v.ndim - 1))
    return flax_weight((norm + f["m"]).reshape(-1, *[1] * (v.ndim - 1)) * direction)


def loha(f, w, alpha):
    first, second = (f[f"a{i}"] @ f[f"b{i}"] for i in "12")
    return w + first * second * alpha / f["a1"].shape[-1]


def lokr(f, w, alpha):
    w1 = f["w1"].T
    w2 = f["w2"] if "w2" in f else f["a2"] @ f["b2"] * alpha / len(f["b2"])
    w2 = torch_weight(w2)
    return w + flax_weight(np.kron(w1.reshape(*w1.shape, *[1] * (w2.ndim - 2)), w2))


def vera(f, w, alpha):
    del alpha
    b = f["b"].T * f["lambda_b"][:, None]
    a = torch_weight(f["a"])
    a = a * f["lambda_d"].reshape(-1, *[1] * (a.ndim - 1))
    return w + flax_weight((b @ a.reshape(len(a), -1)).reshape(len(b), *a.shape[1:]))


def oft(f, w, alpha):
    del alpha
    weight, x = torch_weight(w), f["x"]
    q, eye = x - x.swapaxes(1, 2), np.eye(x.shape[-1])
    r = np.stack([(eye + each) @ np.linalg.inv(eye - each) for each in q])
    blocks = weight.reshape(*x.shape[:2], -1)
    return flax_weight(np.einsum("knm,knj->kmj", r, blocks).reshape(weight.shape))


def hra(f, w, alpha):
    del alpha
    weight, u = torch_weight(w), f["u"]
    u = u if u.ndim == 2 else u.transpose(2, 0, 1, 3).reshape(-1, u.shape[-1])
    matrix = weight.reshape(len(weight), -1)
    for column in u.T:
        matrix = matrix @ (np.eye(len(column)) - 2 * np.outer(column, column) / (column @ column))
    return flax_weight(matrix.reshape(weight.shape))


def hira(f, w, alpha):
    return w + w * flax_weight(low_rank(f["a"], f["b"])) * alpha / f["a"].shape[-1]


def full(f, w, alpha):
    del alpha
    return w + f["w"]


def output_gain(f, w, alpha):
    del alpha
    return w * (1 + f["s"])


WEIGHTS = {
    "lora": lora,
    "rslora": rslora,
    "pissa": from_weights,
    "olora": from_weights,
    "tucker": tucker,
    "dora": dora,
    "loha": loha,
    "lokr": lokr,
    "vera": vera,
    "oft": oft,
    "hra": hra,
    "hira": hira,
    "full": full,
    "output_gain:output_gain": output_gain,
}
