"""The metrics by name, and functions that compute them for one picture.

PSNR, SSIM and NIQE are computed in NumPy, LPIPS and the feature distance in JAX, the rest by pyiqa (an optional extra,
under its own non-commercial licence).
"""

import importlib.util
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from PIL import Image

from pisa_jax.metrics import niqe, psnr_ssim
from pisa_jax.runtime.trees import suggest

# (result, ground truth or None), uint8 RGB arrays of equal size -> value
MetricFunction = Callable[[np.ndarray, np.ndarray | None], float]


class Metric(NamedTuple):
    """What a metric is called in tables and how it is read."""

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
# What pyiqa and published tables call LPIPS is the AlexNet one.
ALIASES = {"lpips": "lpips-alex"}


def check_names(names: Sequence[str]) -> None:
    """ValueError for a metric that is not there."""
    for name in names:
        if name not in METRICS:
            raise ValueError(f"unknown metric {name!r}: use {', '.join(METRICS)}{suggest(name, METRICS)}")


def require_pyiqa(names: Sequence[str]) -> None:
    """ValueError if one of the metrics needs pyiqa and it is not installed."""
    theirs = [name for name in names if METRICS[name].backend.startswith("pyiqa")]
    if theirs and importlib.util.find_spec("pyiqa") is None:
        raise ValueError(
            f"{', '.join(theirs)} {'is' if len(theirs) == 1 else 'are'} computed by pyiqa, which is not installed: "
            "pip install -e '.[metrics]', or leave them out of --metrics"
        )


def make_metrics(
    names: Sequence[str], color: psnr_ssim.Color = "y", crop_border: int = 0, weights: Mapping[str, Any] | None = None
) -> dict[str, MetricFunction]:
    """A function for every metric that is measured picture by picture (all but fid), in the given order.

    color and crop_border concern PSNR and SSIM only, as in publications. weights: metric -> file or hub id of its
    feature extractor; `perceptual` has one in the package. Raises ValueError or OSError, before anything is measured,
    for what is unknown, not installed or not readable.
    """
    check_names(names)
    require_pyiqa(names)
    own: dict[str, MetricFunction] = {
        "psnr": lambda sr, gt: psnr_ssim.psnr(sr, gt, color, crop_border),
        "ssim": lambda sr, gt: psnr_ssim.ssim(sr, gt, color, crop_border),
        "niqe": lambda sr, gt: niqe.niqe(sr),
    }
    makers = {
        "numpy": lambda name: own[name],
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

    def measure(sr: np.ndarray, gt: np.ndarray) -> float:
        a, b = (jnp.asarray(x, jnp.float32)[None] / 127.5 - 1 for x in (sr, gt))
        with jax.default_matmul_precision("highest"):
            return float(distance(weights, a, b)[0])

    return _one_at_a_time(measure)


def _pyiqa(name: str) -> MetricFunction:
    import pyiqa

    metric = pyiqa.create_metric(name)

    def measure(sr: np.ndarray, gt: np.ndarray | None) -> float:
        # pyiqa takes PIL images, so torch stays its own affair.
        pictures = (sr, gt) if METRICS[name].needs_gt else (sr,)
        return float(metric(*map(Image.fromarray, pictures)))

    return _one_at_a_time(measure)


def _one_at_a_time(measure: MetricFunction) -> MetricFunction:
    """Networks use all cores themselves, and two threads would compile or fetch the same thing twice."""
    lock = threading.Lock()

    def locked(sr, gt):
        with lock:
            return measure(sr, gt)

    return locked


def fid(sr: Path, gt: Path) -> float:
    """Fréchet inception distance of two folders, by pyiqa."""
    import pyiqa

    return float(pyiqa.create_metric("fid")(str(sr), str(gt)))


def one_line(error: BaseException) -> str:
    """What an exception says, or its type if it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__


def compute_metrics(
    measures: Mapping[str, MetricFunction], sr: np.ndarray, gt: np.ndarray | None
) -> tuple[dict[str, float], list[str]]:
    """Values by metric, and "metric: reason" for those that this picture has none of (too small, flat).

    ValueError if the two pictures differ in size.
    """
    if gt is not None and sr.shape != gt.shape:
        sizes = (f"{x.shape[1]}x{x.shape[0]}" for x in (sr, gt))
        raise ValueError("the result is {} and the ground truth {} (width x height)".format(*sizes))
    values, problems = {}, []
    for name, measure in measures.items():
        try:
            values[name] = measure(sr, gt)
        except Exception as error:  # whatever a metric of another package raises, it concerns this one value
            problems.append(f"{name}: {one_line(error)}")
    return values, problems
