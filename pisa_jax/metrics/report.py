"""Measured values as JSON, CSV, Markdown and a plot.

`methods` is {label: {picture: {metric: value}}} everywhere: one label per way of making the pictures.
"""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pisa_jax.metrics.registry import FIDELITY, METRICS

# Not a contestant: it wins PSNR against most models and would hide which of their settings is best.
REFERENCE = "bicubic"

ImageScores = Mapping[str, Mapping[str, float]]
MethodScores = Mapping[str, ImageScores]


def mean_scores(values: ImageScores) -> dict[str, float]:
    """Mean of every metric over the pictures that have it."""
    names = dict.fromkeys(name for row in values.values() for name in row)
    columns = {name: [row[name] for row in values.values() if name in row] for name in names}
    return {name: sum(column) / len(column) for name, column in columns.items()}


def best_label(means: Mapping[str, Mapping[str, float]], metric: str) -> str | None:
    """The label with the best mean of a metric (the first of equals), less REFERENCE; None without any value."""
    having = {label: row[metric] for label, row in means.items() if metric in row and label != REFERENCE}
    if not having:
        return None
    return (max if METRICS[metric].higher_is_better else min)(having, key=having.get)


def method_means(methods: MethodScores, whole_set: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Means by label, with the figures that exist for a whole set only (FID) added."""
    return {label: mean_scores(values) | dict(whole_set.get(label, {})) for label, values in methods.items()}


def as_json(methods: MethodScores, means: Mapping, settings: Mapping[str, Any], problems: Mapping[str, str]) -> dict:
    """{"per_image": {name: {metric: value}}, "mean": {metric: value}, "settings": {...}} of the first method.

    With several methods "methods" has {"per_image", "mean"} of each by label; "problems" is there if there are any.
    Infinite values (PSNR of equal pictures) become null, which JSON lacks a number for.
    """

    def clean(row):
        return {name: value if math.isfinite(value) else None for name, value in row.items()}

    def part(label):
        return {"per_image": {n: clean(row) for n, row in methods[label].items()}, "mean": clean(means[label])}

    first = next(iter(methods))
    result = part(first) | {"settings": dict(settings)}
    if len(methods) > 1:
        result["methods"] = {label: part(label) for label in methods}
    if problems:
        result["problems"] = dict(problems)
    return result


def as_csv(methods: MethodScores, means: Mapping, metrics: Sequence[str]) -> str:
    """One row per method and picture, then a row "mean" per method; empty where there is no value."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["method", "picture", *metrics])
    for label, values in methods.items():
        for name, row in [*values.items(), ("mean", means[label])]:
            writer.writerow([label, name, *(row.get(metric, "") for metric in metrics)])
    return out.getvalue()


def _cell(metric: str, value: float | None) -> str:
    return "" if value is None else f"{value:.{METRICS[metric].digits}f}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join(f"| {' | '.join(row)} |" for row in [header, rule, *rows])


def _header(metrics: Sequence[str]) -> list[str]:
    return [f"{METRICS[m].label} {'↑' if METRICS[m].higher_is_better else '↓'}" for m in metrics]


def mean_table(methods: MethodScores, means: Mapping, metrics: Sequence[str]) -> str:
    """Markdown: one row per method, the best mean of each metric bold if several contend."""
    contend = len(methods.keys() - {REFERENCE}) > 1
    winners = {metric: best_label(means, metric) for metric in metrics} if contend else {}
    rows = []
    for label, values in methods.items():
        cells = [_cell(m, means[label].get(m)) for m in metrics]
        rows.append([label, str(len(values)), *(f"**{c}**" if winners.get(m) == label else c
                                                for m, c in zip(metrics, cells, strict=True))])  # fmt: skip
    return _table(["", "pictures", *_header(metrics)], rows)


def image_table(values: ImageScores, metrics: Sequence[str]) -> str:
    """Markdown: one row per picture."""
    rows = [[name, *(_cell(m, row.get(m)) for m in metrics)] for name, row in values.items()]
    return _table(["picture", *_header(metrics)], rows)


def as_markdown(
    methods: MethodScores, means: Mapping, metrics: Sequence[str], conditions: str, problems: Mapping[str, str]
) -> str:
    """Means, the conditions they hold under, what went wrong, and a table of pictures per method."""
    parts = [mean_table(methods, means, metrics), conditions]
    if problems:
        lines = [f"- `{name}`: {text}" for name, text in problems.items()]
        parts.append("\n".join([f"Not (fully) measured ({len(problems)}):", "", *lines]))
    for label, values in methods.items():
        parts += [f"## {label}", image_table(values, metrics)]
    return "\n\n".join(parts) + "\n"


def plot(means: Mapping[str, Mapping[str, float]], metrics: Sequence[str], path: Path) -> None:
    """Fidelity against perception: one panel per perceptual metric, every method a labelled point, the best marked.

    Fidelity is PSNR if it was measured, else SSIM. Axes point so that better is right and up.
    ValueError where there is nothing to plot, ImportError without matplotlib.
    """
    across = next((m for m in FIDELITY if m in metrics), None)
    panels = {m: _points(means, across, m) for m in metrics if m not in FIDELITY}
    panels = {m: points for m, points in panels.items() if points}
    if not panels:
        raise ValueError("a plot needs finite values of psnr or ssim and of at least one perceptual metric")
    # The figure class alone: pyplot would look for a display and keep the figure alive.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5 * len(panels), 4.8), layout="constrained")
    for axes, (up, points) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        axes.scatter(*zip(*points.values(), strict=True), zorder=2)
        for metric, marker in ((across, ">"), (up, "^")):
            winner = best_label(means, metric)
            if winner in points:
                axes.scatter(*points[winner], s=160, marker=marker, facecolors="none", edgecolors="tab:red",
                             label=f"best {METRICS[metric].label}: {winner}", zorder=3)  # fmt: skip
        axes.set_xlabel(_header([across])[0])
        axes.set_ylabel(_header([up])[0])
        if not METRICS[up].higher_is_better:
            axes.invert_yaxis()
        axes.margins(0.15)
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[1]:
            axes.legend(fontsize=8, frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    figure.draw_without_rendering()  # settles where points lie on the page
    for axes, points in zip(figure.axes, panels.values(), strict=True):
        _label_points(axes, points)
    figure.savefig(path, dpi=120)


def _points(means: Mapping[str, Mapping[str, float]], across: str | None, up: str) -> dict[str, tuple[float, float]]:
    points = {label: (row[across], row[up]) for label, row in means.items() if across in row and up in row}
    return {label: point for label, point in points.items() if all(map(math.isfinite, point))}


def _label_points(axes: Any, points: Mapping[str, tuple[float, float]], width: float = 90, height: float = 11) -> None:
    """Labels right above their points, pushed up until none covers another; sizes in typographic points."""
    to_page = 72 / axes.figure.dpi
    places = {label: axes.transData.transform(point) * to_page for label, point in points.items()}
    taken = []
    for label, (x, y) in sorted(places.items(), key=lambda item: item[1][1]):
        top = y + 5
        while blocking := [at for left, at in taken if abs(left - x) < width and abs(at - top) < height]:
            top = max(blocking) + height + 1
        taken.append((x, top))
        axes.annotate(label, points[label], textcoords="offset points", xytext=(8, top - y), fontsize=8,
                      arrowprops={"arrowstyle": "-", "color": "0.7", "relpos": (0, 0.5), "shrinkA": 0})  # fmt: skip
