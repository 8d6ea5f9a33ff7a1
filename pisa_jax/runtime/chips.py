"""Peak and memory of accelerators, from the data sheets of Google Cloud and NVIDIA."""

from typing import Any, NamedTuple

import jax


class Chip(NamedTuple):
    """A JAX device: a chip, or one of its halves where JAX shows each as a device."""

    # Name in messages and tables.
    name: str
    # Dense products of bfloat16, in TFLOP/s.
    tflops: float
    # Memory in GiB.
    memory: float
    # Numbers of devices in which slices or hosts are offered.
    sizes: tuple[int, ...]


_V4_SIZES = (4, 8, 16, 32, 64, 128, 256, 512)
_V5E_SIZES = (1, 4, 8, 16, 32, 64, 128, 256)
_GPU_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
# By `device.device_kind`.
CHIPS = {
    "TPU v4": Chip("TPU v4", 275.0, 32, _V4_SIZES),
    "TPU v5 lite": Chip("TPU v5e", 197.0, 15.75, _V5E_SIZES),
    "TPU v5": Chip("TPU v5p", 459.0, 95, _V4_SIZES),
    "TPU v6 lite": Chip("TPU v6e", 918.0, 31.25, _V5E_SIZES),
    "NVIDIA A100-SXM4-40GB": Chip("A100 40 GB", 312.0, 40, _GPU_SIZES),
    "NVIDIA A100-SXM4-80GB": Chip("A100 80 GB", 312.0, 80, _GPU_SIZES),
    "NVIDIA A100-PCIE-40GB": Chip("A100 PCIe 40 GB", 312.0, 40, _GPU_SIZES),
    "NVIDIA A100 80GB PCIe": Chip("A100 PCIe 80 GB", 312.0, 80, _GPU_SIZES),
    "NVIDIA L4": Chip("L4", 121.0, 24, _GPU_SIZES),
    "NVIDIA L40S": Chip("L40S", 362.0, 48, _GPU_SIZES),
    "NVIDIA H100 80GB HBM3": Chip("H100", 989.0, 80, _GPU_SIZES),
    "NVIDIA H100 PCIe": Chip("H100 PCIe", 756.0, 80, _GPU_SIZES),
    "NVIDIA H100 NVL": Chip("H100 NVL", 835.0, 94, _GPU_SIZES),
    "NVIDIA H200": Chip("H200", 989.0, 141, _GPU_SIZES),
    "NVIDIA GH200 480GB": Chip("GH200", 989.0, 96, _GPU_SIZES),
    "NVIDIA B200": Chip("B200", 2250.0, 180, _GPU_SIZES),
}


def chip_of(device: jax.Device | Any) -> Chip | None:
    """Return the data sheet of a device; None for devices that are not in the table, such as CPUs."""
    return CHIPS.get(device.device_kind)
