"""Writes the torch files of this folder and `expected.npz`; needs torch, in an environment of its own."""

from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).parent
DTYPES = ["float32", "float64", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool"]


def tensors() -> dict[str, torch.Tensor]:
    """Every dtype; views with strides and offsets; shared storages; no elements and no axes; a parameter."""
    torch.manual_seed(0)
    base = torch.randn(4, 6)
    out = {f"dtype_{name}": (torch.arange(-3, 4) * 1.5).to(getattr(torch, name)) for name in DTYPES}
    out |= {"whole": base, "transposed": base.t(), "row": base[2], "column": base[:, 3], "block": base[1:3, 2:6:2]}
    out |= {"channels_last": torch.randn(2, 3, 2, 2).to(memory_format=torch.channels_last)}
    out |= {"scalar": torch.tensor(2.5), "empty": torch.zeros(0, 3), "one_row_expanded": torch.arange(5).expand(1, -1)}
    out["parameter"] = torch.nn.Parameter(torch.randn(3, 2))
    return out


def main() -> None:
    values = tensors()
    nested = {
        "epoch": 3,
        "rate": 1e-4,
        "names": ["a", "b", ("c", None, True)],
        "size": torch.Size([2, 3]),
        "dtype": torch.bfloat16,
        "big": 2**70,
        "state_dict": OrderedDict(values),
        "again": values["whole"],
    }
    model = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 1), torch.nn.BatchNorm2d(3))
    for kind, zipped in (("zip", True), ("legacy", False)):
        torch.save(nested, HERE / f"nested_{kind}.pth", _use_new_zipfile_serialization=zipped)
        # An OrderedDict with an attribute `_metadata`, which its pickle sets with BUILD.
        torch.save(model.state_dict(), HERE / f"module_{kind}.pth", _use_new_zipfile_serialization=zipped)
    torch.save(values, HERE / "protocol4_zip.pth", pickle_protocol=4)
    values |= {f"module/{name}": tensor for name, tensor in model.state_dict().items()}
    # numpy's own files know no bfloat16; float32 holds it exactly.
    plain = {name: (t.float() if t.dtype == torch.bfloat16 else t).detach().numpy() for name, t in values.items()}
    np.savez_compressed(HERE / "expected.npz", **plain)


if __name__ == "__main__":
    main()
