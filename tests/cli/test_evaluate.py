"""The evaluation command: published figures end to end, pairing, failures, grids of scales, reports."""

import csv
import functools
import inspect
import itertools
import json
import re
import sys
import types
from xml.etree import ElementTree

import numpy as np
import pytest
from conftest import golden, shared_data
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from pisa_jax.cli import evaluate
from pisa_jax.imaging.matlab_resize import matlab_bicubic
from pisa_jax.inference import Upscaler
from pisa_jax.metrics import niqe, psnr_ssim, registry, report
from pisa_jax.metrics.pairing import pair_files


def picture(seed, height=48, width=40):
    """Smooth random colours, uint8."""
    small = np.random.default_rng(seed).integers(0, 256, (height // 8, width // 8, 3), np.uint8)
    return np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


def noisy(image, seed, sigma=8):
    noise = np.random.default_rng(seed).normal(0, sigma, image.shape)
    return np.clip(image + noise, 0, 255).astype(np.uint8)


def write(folder, **images):
    """Pictures as PNG files."""
    folder.mkdir(exist_ok=True)
    for name, image in images.items():
        Image.fromarray(image).save(folder / f"{name}.png")
    return folder


def write_old(folder, *names):
    """Files of an earlier run."""
    folder.mkdir()
    for name in names:
        (folder / name).write_text("old")
    return [folder / name for name in names]


@pytest.fixture
def folders(tmp_path):
    """Two results with their ground truths."""
    truths = {name: picture(seed) for seed, name in enumerate(("a", "b"))}
    results = {name: noisy(image, 9) for name, image in truths.items()}
    return write(tmp_path / "sr", **results), write(tmp_path / "gt", **truths)


def run(*arguments):
    return evaluate.main([str(argument) for argument in arguments])


# --- measuring results ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("benchmark", ["realsr", "drealsr"])
def test_published_figures_from_the_command_line(tmp_path, benchmark, capsys):
    folder = shared_data(f"eval/published_metrics/{benchmark}")
    out = tmp_path / "out.json"
    assert run("--sr", folder / "SR", "--gt", folder / "HR", "--metrics", "psnr,ssim", "--json", out) == 0
    result, published = json.loads(out.read_text()), json.loads((folder / "metrics.json").read_text())
    assert result["per_image"].keys() == published.keys()
    for name, row in result["per_image"].items():
        assert row["psnr"] == pytest.approx(published[name]["PSNR"], abs=1e-3)
        assert row["ssim"] == pytest.approx(published[name]["SSIM"], abs=1e-4)
    mean = np.mean([row["PSNR"] for row in published.values()])
    assert result["mean"]["psnr"] == pytest.approx(mean, abs=1e-3)
    assert f"{mean:.2f}" in capsys.readouterr().out


def test_set5_bicubic_from_the_command_line(capsys):
    folder = shared_data("eval/Set5/x4")
    assert run("--lq", folder / "LR", "--gt", folder / "HR", "--crop-border", 4, "--metrics", "psnr") == 0
    assert "| bicubic | 5 | 28.43 |" in capsys.readouterr().out


def test_json_csv_and_markdown_say_the_same(tmp_path, folders):
    sr, gt = folders
    files = [tmp_path / name for name in ("o.json", "o.csv", "o.md")]
    assert run("--sr", sr, "--gt", gt, "--metrics", "PSNR,perceptual", "--color", "rgb",
               "--json", files[0], "--csv", files[1], "--markdown", files[2]) == 0  # fmt: skip
    result = json.loads(files[0].read_text())
    assert result.keys() == {"per_image", "mean", "settings"}
    expected = {name: psnr_ssim.psnr(evaluate.read_rgb8(sr / name), evaluate.read_rgb8(gt / name), "rgb")
                for name in ("a.png", "b.png")}  # fmt: skip
    assert {name: row["psnr"] for name, row in result["per_image"].items()} == pytest.approx(expected)
    assert result["mean"]["psnr"] == pytest.approx(sum(expected.values()) / 2)
    assert result["settings"]["color"] == "rgb"
    assert "not LPIPS" in result["settings"]["metrics"]["perceptual"]
    rows = list(csv.DictReader(files[1].read_text().splitlines()))
    assert [row["picture"] for row in rows] == ["a.png", "b.png", "mean"]
    assert float(rows[2]["perceptual"]) == result["mean"]["perceptual"]
    text = files[2].read_text()
    assert f"| a.png | {expected['a.png']:.2f} |" in text
    assert "PSNR of RGB, 0 pixels of border cropped" in text


def test_single_files_belong_together_and_equal_ones_have_no_psnr_in_json(tmp_path):
    sr, gt = write(tmp_path / "x", result=picture(0)), write(tmp_path / "y", truth=picture(0))
    out = tmp_path / "o.json"
    assert run("--sr", sr / "result.png", "--gt", gt / "truth.png", "--metrics", "psnr,ssim", "--json", out) == 0
    row = json.loads(out.read_text())["per_image"]["result.png"]
    assert row["psnr"] is None
    assert row["ssim"] == pytest.approx(1)


def test_many_workers_measure_what_one_does(tmp_path, folders):
    items, _ = pair_files(*folders, None)
    functions = registry.make_metrics(["psnr", "ssim", "perceptual"])
    assert evaluate.evaluate(items, functions, workers=2) == evaluate.evaluate(items, functions, workers=1)


def test_results_without_ground_truth_get_niqe(tmp_path, capsys):
    sr = write(tmp_path / "sr", a=noisy(picture(0, 192, 192), 1), small=picture(1))
    assert run("--sr", sr) == 1
    output = capsys.readouterr()
    assert f"{niqe.niqe(evaluate.read_rgb8(sr / 'a.png')):.3f}" in output.out
    assert "small.png: sr: niqe: NIQE needs two blocks" in output.err


# --- what goes wrong --------------------------------------------------------------------------------------------------


def test_missing_unreadable_and_mismatched_files_are_named_and_the_rest_is_measured(tmp_path, folders, capsys):
    sr, gt = folders
    write(sr, lonely=picture(2), other_size=picture(3))
    write(gt, other_size=picture(3, 64, 40), broken=picture(4), waiting=picture(5))
    (sr / "broken.png").write_bytes(b"no picture")
    out = tmp_path / "o.json"
    assert run("--sr", sr, "--gt", gt, "--metrics", "psnr,ssim", "--json", out) == 1
    output, result = capsys.readouterr(), json.loads(out.read_text())
    assert result["per_image"].keys() == {"a.png", "b.png"}
    assert result["problems"].keys() == {"lonely.png", "other_size.png", "broken.png", "gt/waiting.png"}
    assert "no file of that name" in result["problems"]["lonely.png"]
    assert "the result is 40x48 and the ground truth 40x64" in result["problems"]["other_size.png"]
    assert "broken.png" in result["problems"]["broken.png"]
    assert "no picture belongs" in result["problems"]["gt/waiting.png"]
    assert "4 with problems" in output.err
    for name in result["problems"]:
        assert name in output.err


def test_nothing_to_measure_is_a_failure(tmp_path, folders, capsys):
    sr, _ = folders
    gt = write(tmp_path / "elsewhere", c=picture(0))
    assert run("--sr", sr, "--gt", gt) == 1
    assert run("--sr", sr, "--gt", tmp_path / "nowhere") == 1
    assert "neither a folder nor a file" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert run("--sr", tmp_path / "empty", "--gt", gt) == 1
    assert "no pictures in" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "give --sr"),
        ("--sr . --metrics psnr", "psnr compare with ground truths: give --gt"),
        ("--sr . --gt . --metrics pnsr", "unknown metric 'pnsr'.*did you mean 'psnr'"),
        ("--sr . --gt . --metrics LPIPS", "lpips-alex needs the weights of its backbone: --lpips-alex FILE"),
        ("--sr . --gt . --metrics lpips-vgg", "--lpips-vgg FILE"),
        ("--sr . --gt . --metrics ,", "--metrics is empty"),
        ("--sr . --model m", "--model makes the results from --lq"),
        ("--lq . --adapters a", "--adapters and --scales need --model"),
        ("--lq . --scales 1,0", "--adapters and --scales need --model"),
        ("--lq . --gt . --metrics fid", "fid compares two folders"),
        ("--sr . --gt . --json /no/such/folder/x.json", "folder of /no/such/folder/x.json does not exist"),
        ("--sr . --gt . --crop-border -1", "'-1' is not a number of at least 0"),
        ("--lq . --scales 1,2,3", "'1,2,3' is not PIX,SEM"),
        ("--sr . --gt . --metrics psnr,ssim --plot p.png", "--plot needs psnr or ssim and one other metric"),
        ("--sr . --gt . --plot p.bmp", "--plot p.bmp cannot be written: use a name ending in one of .png .svg .pdf"),
        ("--sr . --gt . --sheet s", "--sheet s cannot be written: use a name ending in one of .png .jpg"),
    ],
)
def test_wrong_usage_says_what_is_wrong_and_exits_with_2(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(*arguments.split())
    assert stopped.value.code == 2
    assert re.search(message, capsys.readouterr().err)


def test_no_matplotlib_is_told_before_measuring(monkeypatch, folders, capsys):
    monkeypatch.setattr(evaluate, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as stopped:
        run("--sr", folders[0], "--gt", folders[1], "--plot", "p.png")
    assert stopped.value.code == 2
    assert "pip install -e '.[plot]'" in capsys.readouterr().err


def test_reports_that_cannot_be_written_leave_what_was_there(tmp_path, folders, monkeypatch, capsys):
    sr, gt = folders
    out, plot = write_old(tmp_path / "reports", "o.json", "p.png")

    def full_disk(means, names, path):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(report, "plot", full_disk)
    assert run("--sr", sr, "--gt", gt, "--metrics", "psnr,perceptual", "--json", out, "--plot", plot) == 1
    output = capsys.readouterr()
    assert "| sr | 2 |" in output.out
    assert "No space left on device" in output.err
    assert json.loads(out.read_text())["per_image"].keys() == {"a.png", "b.png"}
    assert plot.read_text() == "old"
    assert sorted(path.name for path in out.parent.iterdir()) == ["o.json", "p.png"]


def test_lpips_is_the_published_one_under_its_precise_name():
    names = evaluate.choose_metrics(evaluate.parser().parse_args(["--metrics", "LPIPS, psnr,lpips-alex"]))
    assert names == ["lpips-alex", "psnr"]


def test_nothing_to_plot_is_told(tmp_path, folders, capsys):
    sr, gt = folders  # too small for NIQE
    assert run("--sr", sr, "--gt", gt, "--metrics", "psnr,niqe", "--plot", tmp_path / "p.png") == 1
    assert "a plot needs finite values of psnr or ssim" in capsys.readouterr().err
    assert not (tmp_path / "p.png").exists()


# --- pairing ----------------------------------------------------------------------------------------------------------


def test_pairs_by_stem_then_without_marks(tmp_path):
    dot = np.zeros((4, 4, 3), np.uint8)
    sr = write(tmp_path / "sr", **{"0801x4": dot, "0802_SR": dot, "0803": dot, "img_1": dot, "img_10": dot})
    gt = write(tmp_path / "gt", **{"0801": dot, "0802_HR": dot, "0803": dot, "img_1": dot, "img_10": dot})
    lq = write(tmp_path / "lq", **{"0801x4": dot, "0802_LR4": dot, "0803x4": dot, "img_1": dot, "img_10": dot})
    items, problems = pair_files(sr, gt, lq)
    assert problems == {}
    assert {i.name: (i.gt.stem, i.lq.stem) for i in items} == {
        "0801x4.png": ("0801", "0801x4"),
        "0802_SR.png": ("0802_HR", "0802_LR4"),
        "0803.png": ("0803", "0803x4"),
        "img_1.png": ("img_1", "img_1"),
        "img_10.png": ("img_10", "img_10"),
    }


def test_equal_file_names_belong_together_whatever_else_is_there(tmp_path):
    dot = np.zeros((4, 4, 3), np.uint8)
    sr, gt = write(tmp_path / "sr", a=dot), write(tmp_path / "gt", a=dot)
    for folder in (sr, gt):
        Image.fromarray(dot).save(folder / "a.tiff")
    items, problems = pair_files(sr, gt, None)
    assert problems == {}
    assert {item.name: item.gt.name for item in items} == {"a.png": "a.png", "a.tiff": "a.tiff"}


def test_doubtful_pairs_are_not_guessed(tmp_path):
    dot = np.zeros((4, 4, 3), np.uint8)
    sr = write(tmp_path / "sr", **{"a_x2": dot, "a_x4": dot, "b_SR": dot})
    gt = write(tmp_path / "gt", **{"a": dot, "b_HR": dot, "b_GT": dot})
    items, problems = pair_files(sr, gt, None)
    assert items == []
    assert problems.keys() == {"a_x2.png", "a_x4.png", "b_SR.png"}
    assert "a.png belongs to several pictures" in problems["a_x2.png"]
    assert "several files match: b_GT.png, b_HR.png" in problems["b_SR.png"]


# --- a model over a grid of scales ------------------------------------------------------------------------------------

GRID = [(0.0, 0.0), (0.0, 1.0), (1.0, 0.0), (1.0, 1.0)]


@pytest.fixture
def model(monkeypatch, tmp_path):
    """A stand-in for the model (noise that pix removes, sharpening that sem adds), and --lq / --gt folders for it."""
    calls = []

    def load(args):
        def upscale(image, pairs):
            calls.append((image.shape, list(pairs)))
            large = matlab_bicubic(image, args.scale).astype(float)
            blurred = matlab_bicubic(matlab_bicubic(large, 0.5), 2)
            noise = np.random.default_rng(0).normal(0, 10, large.shape)
            return [np.clip(large + (1 - p) * noise + s * (large - blurred), 0, 255).astype(np.uint8) for p, s in pairs]

        return upscale

    monkeypatch.setattr(evaluate, "load_upscale", load)
    truths = {name: picture(seed, 192, 192) for seed, name in enumerate(("a", "b"))}
    small = {name: matlab_bicubic(image, 0.25) for name, image in truths.items()}
    return calls, write(tmp_path / "lq", **small), write(tmp_path / "gt", **truths)


def test_grid_of_scales_table_plot_and_sheet(model, tmp_path, capsys):
    calls, lq, gt = model
    out, plot, sheet = (tmp_path / name for name in ("o.json", "o.svg", "o.png"))
    scales = [f"{p:g},{s:g}" for p, s in GRID]
    assert run("--model", "m", "--adapters", "f", "--lq", lq, "--gt", gt, "--scales", *scales, "--json", out,
               "--plot", plot, "--sheet", sheet, "--sheet-of", "b.png") == 0  # fmt: skip
    assert calls == [((48, 48, 3), GRID), ((48, 48, 3), GRID)]
    result = json.loads(out.read_text())
    labels = [*map(evaluate.label_of, GRID), "bicubic"]
    assert list(result["methods"]) == labels
    assert result["per_image"] == result["methods"]["pix 0 sem 0"]["per_image"]
    assert result["settings"]["scales"] == [list(pair) for pair in GRID]
    means = {label: part["mean"] for label, part in result["methods"].items()}
    assert means["pix 1 sem 0"]["psnr"] > means["pix 0 sem 0"]["psnr"] + 1
    table = capsys.readouterr().out
    for metric, digits in (("psnr", 2), ("perceptual", 4), ("niqe", 3)):
        assert f"**{means[report.best_label(means, metric)][metric]:.{digits}f}**" in table

    assert ElementTree.parse(plot).getroot().tag.endswith("svg")
    # two columns (sem 0, 1), two rows of pairs, then bicubic and ground truth
    tiles = Image.open(sheet)
    assert tiles.size == (2 * (192 + 8) + 8, 3 * (192 + 34) + 8)
    truth = np.asarray(Image.open(gt / "b.png"))
    corner = np.asarray(tiles)[2 * 226 + 8 + 26 :, 200 + 8 :][:192, :192]
    np.testing.assert_array_equal(corner, truth)


def test_a_picture_the_model_cannot_do_does_not_stop_the_others(model, monkeypatch, tmp_path, capsys):
    _, lq, gt = model
    write(lq, c=picture(7, 8, 8))
    write(gt, c=picture(7, 32, 32))
    load = evaluate.load_upscale

    def fragile(args):
        upscale = load(args)

        def fails_on_small(image, pairs):
            if image.shape[0] == 8:
                raise RuntimeError("RESOURCE_EXHAUSTED: out of memory")
            return upscale(image, pairs)

        return fails_on_small

    monkeypatch.setattr(evaluate, "load_upscale", fragile)
    assert run("--model", "m", "--lq", lq, "--gt", gt, "--metrics", "psnr") == 1
    output = capsys.readouterr()
    assert "c.png: RESOURCE_EXHAUSTED: out of memory" in output.err
    assert "| pix 1 sem 1 | 2 |" in output.out


def test_the_projects_model_is_driven_by_its_flags(monkeypatch, tmp_path):
    """Calls are checked against the real signatures; `many` is one of an object, hence the partial."""
    real = {"load": inspect.signature(Upscaler.load), "many": inspect.signature(functools.partial(Upscaler.many, None))}
    calls = {}

    def record(name, answer):
        def call(*arguments, **options):
            calls[name] = real[name].bind(*arguments, **options).arguments
            return answer(calls[name])

        return call

    upscaler = types.SimpleNamespace(many=record("many", lambda call: [call["image"] for _ in call["pairs"]]))
    monkeypatch.setattr(Upscaler, "load", record("load", lambda call: upscaler))
    lq = write(tmp_path / "lq", a=picture(0))
    assert run("--model", "folder", "--adapters", "a.pkl", "--lq", lq, "--gt", lq, "--metrics", "psnr", "-s", 1,
               "--scales", "0.5", "1,0.7", "--seed", 3, "--dtype", "float32") == 0  # fmt: skip
    assert {key: calls["load"][key] for key in ("model", "adapters", "dtype")} == {
        "model": "folder",
        "adapters": "a.pkl",
        "dtype": "float32",
    }
    assert {key: calls["many"][key] for key in ("scale", "pairs", "seed")} == {
        "scale": 1.0,
        "pairs": [(0.5, 0.5), (1.0, 0.7)],
        "seed": 3,
    }


@pytest.mark.slow
def test_the_fixture_model_end_to_end(tmp_path):
    lq = write(tmp_path / "lq", a=picture(0, 128, 128))
    gt = write(tmp_path / "gt", a=matlab_bicubic(picture(0, 128, 128), 2))
    out = tmp_path / "o.json"
    assert run("--model", golden("sd_tiny"), "--adapters", golden("pisa_sr.pkl"), "--lq", lq, "--gt", gt, "-s", 2,
               "--scales", "0", "1", "--dtype", "float32", "--json", out) == 0  # fmt: skip
    methods = json.loads(out.read_text())["methods"]
    assert list(methods) == ["pix 0 sem 0", "pix 1 sem 1", "bicubic"]
    assert methods["pix 0 sem 0"]["mean"]["psnr"] != methods["pix 1 sem 1"]["mean"]["psnr"]


# --- pyiqa ------------------------------------------------------------------------------------------------------------


def test_pyiqa_metrics_ask_for_the_extra(folders, monkeypatch, capsys):
    monkeypatch.setattr(registry.importlib.util, "find_spec", lambda name: None)
    assert run("--sr", folders[0], "--gt", folders[1], "--metrics", "psnr,dists,musiq") == 1
    message = capsys.readouterr().err
    assert "dists, musiq are computed by pyiqa" in message
    assert "pip install -e '.[metrics]'" in message


def test_pyiqa_metrics_get_what_they_expect(folders, monkeypatch, tmp_path):
    """pyiqa is replaced by a stand-in that records the calls."""
    pyiqa, calls = types.ModuleType("pyiqa"), []

    def create_metric(name):
        def metric(*pictures):
            calls.append((name, pictures))
            return 0.25

        return metric

    pyiqa.create_metric = create_metric
    monkeypatch.setitem(sys.modules, "pyiqa", pyiqa)
    monkeypatch.setattr(registry.importlib.util, "find_spec", lambda name: object())
    sr, gt = folders
    for folder in folders:
        (folder / "b.png").unlink()
    out = tmp_path / "o.json"
    assert run("--sr", sr, "--gt", gt, "--metrics", "dists,musiq,maniqa-pipal,fid", "--json", out) == 0
    by_name = dict(calls)
    assert by_name["fid"] == (str(sr), str(gt))
    assert [len(by_name[name]) for name in ("dists", "musiq", "maniqa-pipal")] == [2, 1, 1]
    for given, folder in zip(by_name["dists"], folders, strict=True):
        assert isinstance(given, Image.Image)
        np.testing.assert_array_equal(np.asarray(given), evaluate.read_rgb8(folder / "a.png"))
    result = json.loads(out.read_text())
    assert result["mean"] == {"dists": 0.25, "musiq": 0.25, "maniqa-pipal": 0.25, "fid": 0.25}
    assert "fid" not in result["per_image"]["a.png"]


def test_a_metric_of_another_package_that_fails_costs_only_its_own_values(folders, monkeypatch, tmp_path, capsys):
    def broken(sr, gt):
        raise AssertionError("weights could not be downloaded")

    monkeypatch.setattr(registry, "require_pyiqa", lambda names: None)
    monkeypatch.setattr(registry, "_pyiqa", lambda name: broken)
    monkeypatch.setattr(registry, "fid", broken)
    out = tmp_path / "o.json"
    assert run("--sr", folders[0], "--gt", folders[1], "--metrics", "psnr,dists,fid", "--json", out) == 1
    result = json.loads(out.read_text())
    assert result["mean"].keys() == {"psnr"}
    assert result["problems"]["a.png"] == "sr: dists: weights could not be downloaded"
    assert result["problems"][str(folders[0])] == "fid: weights could not be downloaded"
    assert "3 with problems" in capsys.readouterr().err


# --- reading ----------------------------------------------------------------------------------------------------------


def test_pictures_are_read_as_8_bit_rgb_without_change(tmp_path):
    image = picture(0)
    Image.fromarray(np.concatenate([image, image[..., :1]], axis=2)).save(tmp_path / "alpha.png")
    Image.fromarray(image[..., 0]).save(tmp_path / "grey.png")
    np.testing.assert_array_equal(evaluate.read_rgb8(tmp_path / "alpha.png"), image)
    np.testing.assert_array_equal(evaluate.read_rgb8(tmp_path / "grey.png"), np.repeat(image[..., :1], 3, axis=2))


def test_best_knows_which_way_is_up():
    means = {"x": {"psnr": 30.0, "niqe": 5.0}, "y": {"psnr": 29.0, "niqe": 4.0}, "z": {}}
    assert report.best_label(means, "psnr") == "x"
    assert report.best_label(means, "niqe") == "y"
    assert report.best_label(means, "musiq") is None


def test_bicubic_does_not_contend():
    methods = {"x": {"a": {"psnr": 30.0}}, "y": {"a": {"psnr": 29.0}}, "bicubic": {"a": {"psnr": 31.0}}}
    means = report.method_means(methods, {})
    assert report.best_label(means, "psnr") == "x"
    table = report.mean_table(methods, means, ["psnr"])
    assert "| **30.00** |" in table
    assert "| 31.00 |" in table
    del methods["x"]  # the one that is left wins nothing
    assert "**" not in report.mean_table(methods, means, ["psnr"])


def test_labels_of_a_plot_do_not_cover_each_other():
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
