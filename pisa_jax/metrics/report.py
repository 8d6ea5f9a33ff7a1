"""Reports of an evaluation: JSON, CSV, Markdown tables and a plot of fidelity against perception.

`scores` is {method: {image: {metric: value}}}, `means` is {method: {metric: mean}}.
"""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pisa_jax.metrics.registry import FIDELITY, METRICS

# The reference is never marked as best: bicubic has a higher PSNR than most models, so the mark would not show which of
# a model's settings is best.
REFERENCE = "bicubic"

ImageScores = Mapping[str, Mapping[str, float]]
MethodScores = Mapping[str, ImageScores]
Means = Mapping[str, Mapping[str, float]]


def mean_scores(scores: ImageScores) -> dict[str, float]:
    """Mean of every metric over the images that have a value of it."""
    names = dict.fromkeys(name for row in scores.values() for name in row)
    columns = {name: [row[name] for row in scores.values() if name in row] for name in names}
    return {name: sum(column) / len(column) for name, column in columns.items()}


def best_method(means: Means, metric: str) -> str | None:
    """The method with the best mean of a metric (the first of equals), REFERENCE excluded; None without any value."""
    candidates = {method: row[metric] for method, row in means.items() if metric in row and method != REFERENCE}
    if not candidates:
        return None
    return (max if METRICS[metric].higher_is_better else min)(candidates, key=candidates.get)


def method_means(scores: MethodScores, folder_scores: Means) -> dict[str, dict[str, float]]:
    """Mean scores by method, plus the scores that exist for whole folders only (FID)."""
    return {method: mean_scores(images) | dict(folder_scores.get(method, {})) for method, images in scores.items()}


def as_json(scores: MethodScores, means: Means, settings: Mapping[str, Any], problems: Mapping[str, str]) -> dict:
    """Convert to {"per_image": {image: {metric: value}}, "mean": {metric: value}, "settings": {...}}.

    "per_image" and "mean" are those of the first method. With several methods, "methods" is {method: {"per_image",
    "mean"}}. "problems" exists only if there are any. Infinite values (PSNR of equal images) become null: JSON has no
    infinity.
    """

    def clean(row):
        return {name: value if math.isfinite(value) else None for name, value in row.items()}

    def part(method):
        return {"per_image": {n: clean(row) for n, row in scores[method].items()}, "mean": clean(means[method])}

    result = part(next(iter(scores))) | {"settings": dict(settings)}
    if len(scores) > 1:
        result["methods"] = {method: part(method) for method in scores}
    if problems:
        result["problems"] = dict(problems)
    return result


def as_csv(scores: MethodScores, means: Means, metrics: Sequence[str]) -> str:
    """Convert to CSV: one row per method and image, then a row "mean" per method; missing values are empty cells."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["method", "picture", *metrics])  # the column names are part of the file format
    for method, images in scores.items():
        for name, row in [*images.items(), ("mean", means[method])]:
            writer.writerow([method, name, *(row.get(metric, "") for metric in metrics)])
    return out.getvalue()


def _cell(metric: str, value: float | None) -> str:
    return "" if value is None else f"{value:.{METRICS[metric].digits}f}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join(f"| {' | '.join(row)} |" for row in [header, rule, *rows])


def _header(metrics: Sequence[str]) -> list[str]:
    return [f"{METRICS[m].label} {'↑' if METRICS[m].higher_is_better else '↓'}" for m in metrics]


def mean_table(scores: MethodScores, means: Means, metrics: Sequence[str]) -> str:
    """Markdown table of one row per method; the best mean of each metric is bold if there are several methods."""
    several = len(scores.keys() - {REFERENCE}) > 1
    best = {metric: best_method(means, metric) for metric in metrics} if several else {}
    rows = []
    for method, images in scores.items():
        cells = [_cell(m, means[method].get(m)) for m in metrics]
        marked = [f"**{c}**" if best.get(m) == method else c for m, c in zip(metrics, cells, strict=True)]
        rows.append([method, str(len(images)), *marked])
    return _table(["", "images", *_header(metrics)], rows)


def image_table(scores: ImageScores, metrics: Sequence[str]) -> str:
    """Markdown table of one row per image."""
    rows = [[name, *(_cell(m, row.get(m)) for m in metrics)] for name, row in scores.items()]
    return _table(["image", *_header(metrics)], rows)


def as_markdown(
    scores: MethodScores, means: Means, metrics: Sequence[str], conditions: str, problems: Mapping[str, str]
) -> str:
    """Convert to Markdown: means, definitions of the metrics, problems, and one table of images per method."""
    parts = [mean_table(scores, means, metrics), conditions]
    if problems:
        lines = [f"- `{name}`: {text}" for name, text in problems.items()]
        parts.append("\n".join([f"Not or only partly measured ({len(problems)}):", "", *lines]))
    for method, images in scores.items():
        parts += [f"## {method}", image_table(images, metrics)]
    return "\n\n".join(parts) + "\n"


def plot(means: Means, metrics: Sequence[str], path: Path) -> None:
    """Plot fidelity against perception: one panel per perceptual metric, one labeled point per method.

    The x axis is PSNR if it was measured, else SSIM. Better values are right and up; the best of each axis is marked.
    Raises ValueError if no method has finite values of both axes, ImportError without matplotlib.
    """
    x_metric = next((m for m in FIDELITY if m in metrics), None)
    panels = {m: _points(means, x_metric, m) for m in metrics if m not in FIDELITY}
    panels = {m: points for m, points in panels.items() if points}
    if not panels:
        raise ValueError("a plot needs finite values of psnr or ssim and of at least one perceptual metric")
    # Not through pyplot, which looks for a display and keeps a reference to every figure.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5 * len(panels), 4.8), layout="constrained")
    for axes, (y_metric, points) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        _draw_panel(axes, means, x_metric, y_metric, points)
    figure.draw_without_rendering()  # computes the layout, and with it the positions of the points on the page
    for axes, points in zip(figure.axes, panels.values(), strict=True):
        _label_points(axes, points)
    figure.savefig(path, dpi=120)


def _points(means: Means, x_metric: str | None, y_metric: str) -> dict[str, tuple[float, float]]:
    """{method: (x, y)} of the methods with finite values of both metrics."""
    both = {method: (row[x_metric], row[y_metric]) for method, row in means.items() if {x_metric, y_metric} <= set(row)}
    return {method: point for method, point in both.items() if all(map(math.isfinite, point))}


def _draw_panel(
    axes: Any, means: Means, x_metric: str, y_metric: str, points: Mapping[str, tuple[float, float]]
) -> None:
    axes.scatter(*zip(*points.values(), strict=True), zorder=2)
    for metric, marker in ((x_metric, ">"), (y_metric, "^")):
        best = best_method(means, metric)
        if best in points:
            axes.scatter(*points[best], s=160, marker=marker, facecolors="none", edgecolors="tab:red",
                         label=f"best {METRICS[metric].label}: {best}", zorder=3)  # fmt: skip
    axes.set_xlabel(_header([x_metric])[0])
    axes.set_ylabel(_header([y_metric])[0])
    if not METRICS[y_metric].higher_is_better:
        axes.invert_yaxis()
    axes.margins(0.15)
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[1]:
        axes.legend(fontsize=8, frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0))


def _label_points(axes: Any, points: Mapping[str, tuple[float, float]], width: float = 90, height: float = 11) -> None:
    """Annotate points above and to the right, moved up until no label overlaps another; sizes in typographic points."""
    points_per_pixel = 72 / axes.figure.dpi
    positions = {label: axes.transData.transform(point) * points_per_pixel for label, point in points.items()}
    placed = []
    for label, (x, y) in sorted(positions.items(), key=lambda item: item[1][1]):
        top = y + 5
        while blocking := [other_y for other_x, other_y in placed
                           if abs(other_x - x) < width and abs(other_y - top) < height]:  # fmt: skip
            top = max(blocking) + height + 1
        placed.append((x, top))
        axes.annotate(label, points[label], textcoords="offset points", xytext=(8, top - y), fontsize=8,
                      arrowprops={"arrowstyle": "-", "color": "0.7", "relpos": (0, 0.5), "shrinkA": 0})  # fmt: skip
