"""Evaluation of result files, or of a model at several scales: the scores of every image by every method.

A method is one way of making a result: "sr" (the given files), the model at given scales of its adapters, or bicubic
upscaling.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from pisa_jax.config import Scales
from pisa_jax.imaging.arrays import RGB8
from pisa_jax.imaging.contact_sheet import contact_sheet
from pisa_jax.imaging.image_reading import from_pil, read_rgb8
from pisa_jax.imaging.image_writing import write_image
from pisa_jax.imaging.matlab_resize import matlab_bicubic
from pisa_jax.metrics import registry, report
from pisa_jax.metrics.pairing import EvaluationItem
from pisa_jax.runtime.messages import error_text, number_text

RESULT, GROUND_TRUTH = "sr", "ground truth"

# The file of an LQ image and scales of the adapters -> the upscaled image at each of them.
UpscaleFunction = Callable[[Path, Sequence[Scales]], list[np.ndarray]]


class ItemResult(NamedTuple):
    """Scores {method: {metric: value}}, problems, and images {method: RGB8} (the ground truth last) of one item."""

    scores: dict[str, dict[str, float]]
    problems: list[str]
    images: dict[str, np.ndarray]


class Evaluation(NamedTuple):
    """Scores {method: {image: {metric: value}}}, problems {image: reason}, and the images of the contact sheet."""

    scores: dict[str, dict[str, dict[str, float]]]
    problems: dict[str, str]
    sheet_images: dict[str, np.ndarray]


def scales_label(scales: Scales, adapters: Sequence[str] = ("pix", "sem")) -> str:
    """Name of the model at given scales in tables: "pix 1 sem 0.5"."""
    return " ".join(f"{name} {number_text(scale)}" for name, scale in zip(adapters, scales, strict=True))


def method_images(
    item: EvaluationItem, scale: float, scales: Mapping[str, Scales], upscale: UpscaleFunction | None
) -> dict[str, np.ndarray]:
    """The item's image by every method: its result file, the model at all scales, bicubic of its LQ image."""
    images = {RESULT: read_rgb8(item.sr)} if item.sr else {}
    if item.lq:
        lq = read_rgb8(item.lq)
        if upscale:
            images |= dict(zip(scales, upscale(item.lq, list(scales.values())), strict=True))
        images[report.REFERENCE] = matlab_bicubic(lq, scale)
    return images


def evaluate_item(
    item: EvaluationItem,
    functions: Mapping[str, registry.MetricFunction],
    scale: float = 4.0,
    scales: Mapping[str, Scales] = MappingProxyType({}),
    upscale: UpscaleFunction | None = None,
) -> ItemResult:
    """Compute all metrics of one item; a failure becomes a problem and does not affect other methods and metrics."""
    try:
        images = method_images(item, scale, scales, upscale)
        gt = read_rgb8(item.gt) if item.gt else None
    except Exception as error:  # files and models raise errors of any type; the other items remain valid
        return ItemResult({}, [error_text(error)], {})
    scores, problems = {}, []
    for method, image in images.items():
        try:
            scores[method], failed = registry.compute_metrics(functions, image, gt)
        except ValueError as error:
            failed = [str(error)]
        problems += [f"{method}: {text}" for text in failed]
    return ItemResult(scores, problems, images if gt is None else images | {GROUND_TRUTH: gt})


def evaluate(
    items: Sequence[EvaluationItem],
    functions: Mapping[str, registry.MetricFunction],
    *,
    scale: float = 4.0,
    scales: Mapping[str, Scales] = MappingProxyType({}),
    upscale: UpscaleFunction | None = None,
    sheet_item: str | None = None,
    workers: int = 1,
    on_done: Callable[[], Any] = lambda: None,
) -> Evaluation:
    """Evaluate every item; an item that fails is reported in `problems`, and the evaluation continues.

    Args:
        functions: from `registry.make_metrics`.
        scale: upscale factor of the LQ images.
        scales, upscale: the model and the scales to evaluate it at, by the name of the method in tables.
        sheet_item: name of the item whose images are kept for the contact sheet.
        workers: threads. NumPy, OpenCV and JAX release the interpreter lock: 1.9 times the speed on two cores, more
            than processes reach.
        on_done: called after each item.
    """

    def work(item: EvaluationItem) -> ItemResult:
        result = evaluate_item(item, functions, scale, scales, upscale)
        # Images of items that wait for their turn below would fill the memory.
        return result if item.name == sheet_item else result._replace(images={})

    evaluation = Evaluation({}, {}, {})
    # A model uses all cores itself, and one thread drives it.
    for item, result in zip(items, _map(work, items, 1 if upscale else workers), strict=True):
        evaluation.sheet_images.update(result.images)
        for method, row in result.scores.items():
            if row or not functions:
                evaluation.scores.setdefault(method, {})[item.name] = row
        if result.problems:
            evaluation.problems[item.name] = "; ".join(result.problems)
        on_done()
    return evaluation


def _map(function: Callable, items: Sequence[EvaluationItem], workers: int) -> Iterator[ItemResult]:
    if workers == 1:
        yield from map(function, items)
        return
    with ThreadPoolExecutor(workers) as threads:
        yield from threads.map(function, items)


def write_contact_sheet(images: Mapping[str, RGB8], scales: Mapping[str, Scales], path: Path) -> None:
    """Write a labeled contact sheet of `Evaluation.sheet_images`; bicubic and ground truth are the last images.

    The sheet has a column for each scale of the last adapter if the scales form a full grid, otherwise up to four.
    """
    columns = len({last for *_, last in scales.values()})
    if len(scales) != columns * len({tuple(others) for *others, _ in scales.values()}):
        columns = min(len(scales), 4)
    order = sorted(scales, key=lambda name: scales[name])
    order += [method for method in images if method not in order]
    cells = [(method, Image.fromarray(images[method])) for method in order]
    write_image(path, from_pil(contact_sheet(cells, columns=columns or len(cells))))
