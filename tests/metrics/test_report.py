"""Reports of an evaluation: means, marks of the best method, labels of the plot."""

import itertools

from matplotlib.figure import Figure
from matplotlib.text import Text

from pisa_jax.metrics import report


def test_best_method_follows_the_direction_of_the_metric():
    means = {"x": {"psnr": 30.0, "niqe": 5.0}, "y": {"psnr": 29.0, "niqe": 4.0}, "z": {}}
    assert report.best_method(means, "psnr") == "x"
    assert report.best_method(means, "niqe") == "y"
    assert report.best_method(means, "musiq") is None


def test_bicubic_is_never_the_best_method():
    scores = {"x": {"a": {"psnr": 30.0}}, "y": {"a": {"psnr": 29.0}}, "bicubic": {"a": {"psnr": 31.0}}}
    means = report.method_means(scores, {})
    assert report.best_method(means, "psnr") == "x"
    table = report.mean_table(scores, means, ["psnr"])
    assert "| **30.00** |" in table
    assert "| 31.00 |" in table
    del scores["x"]  # a single method is not marked
    assert "**" not in report.mean_table(scores, means, ["psnr"])


def test_labels_of_a_plot_do_not_overlap():
    figure = Figure(figsize=(5, 4))
    axes = figure.subplots()
    axes.set(xlim=(10, 30), ylim=(0, 10))
    points = {f"pix {i} sem {j}": (12 + 0.1 * i, 5 + 0.1 * j) for i in range(3) for j in range(3)}
    report._label_points(axes, points)
    figure.draw_without_rendering()
    boxes = [Text.get_window_extent(text) for text in axes.texts]  # without the line to the point
    assert [text.xy for text in axes.texts] == [points[text.get_text()] for text in axes.texts]
    assert len(boxes) == 9
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
