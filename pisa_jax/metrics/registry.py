"""Registry of the metrics, and the functions that compute them for one image.

PSNR, SSIM and NIQE are computed in NumPy, LPIPS and the SqueezeNet distance in JAX, the others by pyiqa (an optional
extra with a non-commercial license).
"""

import importlib.util
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from PIL import Image

from pisa_jax.imaging.arrays import RGB8
from pisa_jax.imaging.ranges import uint8_to_signed
from pisa_jax.metrics import niqe, psnr_ssim
from pisa_jax.runtime.messages import error_text
from pisa_jax.runtime.trees import suggest

# (result, ground truth or None), of equal size -> value
MetricFunction = Callable[[RGB8, RGB8 | None], float]


class Metric(NamedTuple):
    """Label and number of digits of a metric in tables, its direction, its inputs and the library that computes it."""

    label: str
    higher_is_better: bool
    needs_gt: bool
    digits: int
    backend: Literal["numpy", "features", "pyiqa", "pyiqa folders"]


METRICS: Mapping[str, Metric] = {
    "psnr": Metric("PSNR", True, True, 2, "numpy"),
    "ssim": Metric("SSIM", True, True, 4, "numpy"),
    "lpips-alex": Metric("LPIPS (AlexNet)", False, True, 4, "features"),
    "lpips-vgg": Metric("LPIPS (VGG16)", False, True, 4, "features"),
    "perceptual": Metric("SqueezeNet distance", False, True, 4, "features"),
    "dists": Metric("DISTS", False, True, 4, "pyiqa"),
    "niqe": Metric("NIQE", False, False, 3, "numpy"),
    "clipiqa": Metric("CLIPIQA", True, False, 4, "pyiqa"),
    "musiq": Metric("MUSIQ", True, False, 2, "pyiqa"),
    "maniqa-pipal": Metric("MANIQA", True, False, 4, "pyiqa"),
    "fid": Metric("FID", False, True, 2, "pyiqa folders"),
}
DISTANCE_NETWORKS = {"lpips-alex": "alex", "lpips-vgg": "vgg", "perceptual": "squeeze"}
FIDELITY = ("psnr", "ssim")
# pyiqa and published tables mean the AlexNet variant by LPIPS.
ALIASES = {"lpips": "lpips-alex"}


def check_names(names: Sequence[str]) -> None:
    """Raise ValueError for an unknown metric."""
    for name in names:
        if name not in METRICS:
            raise ValueError(f"unknown metric {name!r}: use {', '.join(METRICS)}{suggest(name, METRICS)}")


def require_pyiqa(names: Sequence[str]) -> None:
    """Raise ValueError if a metric needs pyiqa and pyiqa is not installed."""
    external = [name for name in names if METRICS[name].backend.startswith("pyiqa")]
    if external and importlib.util.find_spec("pyiqa") is None:
        raise ValueError(
            f"{', '.join(external)} {'is' if len(external) == 1 else 'are'} computed by pyiqa, which is not installed: "
            "pip install -e '.[metrics]', or remove them from --metrics"
        )


def make_metrics(
    names: Sequence[str], color: psnr_ssim.Color = "y", crop_border: int = 0, weights: Mapping[str, Any] | None = None
) -> dict[str, MetricFunction]:
    """Make the functions of the metrics of single images (all but fid), in the given order.

    Args:
        names: keys of METRICS.
        color, crop_border: options of PSNR and SSIM; other metrics do not use them, as in publications.
        weights: {metric: file or hub id of its feature network}; `perceptual` has weights in the package.

    Raises ValueError or OSError if a metric is unknown, its library not installed or its weights not readable.
    """
    check_names(names)
    require_pyiqa(names)
    numpy_metrics: dict[str, MetricFunction] = {
        "psnr": lambda sr, gt: psnr_ssim.psnr(sr, gt, color, crop_border),
        "ssim": lambda sr, gt: psnr_ssim.ssim(sr, gt, color, crop_border),
        "niqe": lambda sr, gt: niqe.niqe(sr),
    }
    makers = {
        "numpy": numpy_metrics.__getitem__,
        "features": lambda name: _feature_distance((weights or {}).get(name), DISTANCE_NETWORKS[name]),
        "pyiqa": _pyiqa,
    }
    return {name: makers[METRICS[name].backend](name) for name in names if METRICS[name].backend in makers}


def _feature_distance(source: str | Path | None, network: str) -> MetricFunction:
    import jax
    import jax.numpy as jnp

    from pisa_jax.metrics import lpips

    weights = jax.device_put(lpips.load_weights(source, network))
    distance = jax.jit(lpips.distance)

    def metric(sr: np.ndarray, gt: np.ndarray) -> float:
        a, b = (jnp.asarray(uint8_to_signed(x))[None] for x in (sr, gt))
        with jax.default_matmul_precision("highest"):
            return float(distance(weights, a, b)[0])

    return _one_at_a_time(metric)


def _pyiqa(name: str) -> MetricFunction:
    import pyiqa

    pyiqa_metric = pyiqa.create_metric(name)

    def metric(sr: np.ndarray, gt: np.ndarray | None) -> float:
        # pyiqa accepts PIL images, so this package needs no torch tensors.
        images = (sr, gt) if METRICS[name].needs_gt else (sr,)
        return float(pyiqa_metric(*map(Image.fromarray, images)))

    return _one_at_a_time(metric)


def _one_at_a_time(metric: MetricFunction) -> MetricFunction:
    """Serialize calls: networks use all cores themselves, and two threads would compile or download twice."""
    lock = threading.Lock()

    def locked(sr, gt):
        with lock:
            return metric(sr, gt)

    return locked


def fid(sr: Path, gt: Path) -> float:
    """Fréchet inception distance between two folders of images, computed by pyiqa."""
    import pyiqa

    return float(pyiqa.create_metric("fid")(str(sr), str(gt)))


def definition(name: str, color: psnr_ssim.Color, crop_border: int) -> str:
    """Exact definition of a metric, for reports: "PSNR of RGB, 4 pixels of border cropped"."""
    if name in FIDELITY:
        channels = "Y of YCbCr" if color == "y" else "RGB"
        return f"{METRICS[name].label} of {channels}, {crop_border} pixels of border cropped"
    return {
        "lpips-alex": "LPIPS 0.1 (AlexNet)",
        "lpips-vgg": "LPIPS 0.1 (VGG16)",
        "perceptual": "SqueezeNet 1.1 feature distance, no heads: not LPIPS",
        "niqe": "NIQE, statistics of its authors' release",
    }.get(name, f"{name} of pyiqa")


def compute_metrics(
    functions: Mapping[str, MetricFunction], sr: RGB8, gt: RGB8 | None
) -> tuple[dict[str, float], list[str]]:
    """Compute all metrics of one image: ({metric: value}, ["metric: reason" of every metric that failed]).

    Raises ValueError if the two images differ in size.
    """
    if gt is not None and sr.shape != gt.shape:
        sizes = (f"{x.shape[1]}x{x.shape[0]}" for x in (sr, gt))
        raise ValueError("the result is {} and the ground truth {} (width x height)".format(*sizes))
    values, problems = {}, []
    for name, metric in functions.items():
        try:
            values[name] = metric(sr, gt)
        except Exception as error:  # metrics of other packages raise errors of any type; the other values remain valid
            problems.append(f"{name}: {error_text(error)}")
    return values, problems
