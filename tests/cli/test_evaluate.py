"""The command evaluate: published values end to end, failures, a model at several scales, reports."""

import csv
import inspect
import json
import re
import sys
import types
from unittest import mock
from xml.etree import ElementTree

import numpy as np
import pytest
from conftest import DATA, golden, shared_data
from PIL import Image
from small_adapters import random_adapters
from tiny import random_upscaler

from pisa_jax.adapters.files import save_adapters
from pisa_jax.cli import evaluate
from pisa_jax.cli.evaluate_model import BatchUpscaler
from pisa_jax.imaging.image_data import ImageError, from_array
from pisa_jax.imaging.image_reading import read_rgb8
from pisa_jax.imaging.matlab_resize import matlab_bicubic
from pisa_jax.inference import Session, Upscaler
from pisa_jax.metrics import evaluation, niqe, psnr_ssim, registry, report


def colors(seed, height=48, width=40):
    """Smooth random colors, uint8 RGB."""
    small = np.random.default_rng(seed).integers(0, 256, (height // 8, width // 8, 3), np.uint8)
    return np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


def noisy(image, seed, sigma=8):
    noise = np.random.default_rng(seed).normal(0, sigma, image.shape)
    return np.clip(image + noise, 0, 255).astype(np.uint8)


def write(folder, **images):
    """Write images as PNG files; returns the folder."""
    folder.mkdir(exist_ok=True)
    for name, image in images.items():
        Image.fromarray(image).save(folder / f"{name}.png")
    return folder


def write_old(folder, *names):
    """Write files of an earlier run."""
    folder.mkdir()
    for name in names:
        (folder / name).write_text("old")
    return [folder / name for name in names]


@pytest.fixture
def folders(tmp_path):
    """Two results and their ground truths."""
    truths = {name: colors(seed) for seed, name in enumerate(("a", "b"))}
    results = {name: noisy(image, 9) for name, image in truths.items()}
    return write(tmp_path / "sr", **results), write(tmp_path / "gt", **truths)


def run(*arguments):
    return evaluate.main([str(argument) for argument in arguments])


# --- measuring results ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "folder",
    [
        DATA / "pyiqa",
        *(
            pytest.param(shared_data(f"eval/published_metrics/{benchmark}"), marks=pytest.mark.external)
            for benchmark in ("realsr", "drealsr")
        ),
    ],
    ids=lambda folder: folder.name,
)
def test_published_values_from_the_command_line(tmp_path, folder, capsys):
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


@pytest.mark.external
def test_set5_bicubic_from_the_command_line(capsys):
    folder = shared_data("eval/Set5/x4")
    assert run("--lq", folder / "LR", "--gt", folder / "HR", "--crop-border", 4, "--metrics", "psnr") == 0
    assert "| bicubic | 5 | 28.43 |" in capsys.readouterr().out


def test_json_csv_and_markdown_agree(tmp_path, folders):
    sr, gt = folders
    files = [tmp_path / name for name in ("o.json", "o.csv", "o.md")]
    assert run("--sr", sr, "--gt", gt, "--metrics", "PSNR,perceptual", "--color", "rgb",
               "--json", files[0], "--csv", files[1], "--markdown", files[2]) == 0  # fmt: skip
    result = json.loads(files[0].read_text())
    assert result.keys() == {"per_image", "mean", "settings"}
    expected = {name: psnr_ssim.psnr(read_rgb8(sr / name), read_rgb8(gt / name), "rgb")
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


def test_single_files_match_and_psnr_of_equal_images_is_null_in_json(tmp_path):
    sr, gt = write(tmp_path / "x", result=colors(0)), write(tmp_path / "y", truth=colors(0))
    out = tmp_path / "o.json"
    assert run("--sr", sr / "result.png", "--gt", gt / "truth.png", "--metrics", "psnr,ssim", "--json", out) == 0
    row = json.loads(out.read_text())["per_image"]["result.png"]
    assert row["psnr"] is None
    assert row["ssim"] == pytest.approx(1)


def test_results_without_ground_truth_are_measured_by_niqe(tmp_path, capsys):
    sr = write(tmp_path / "sr", a=noisy(colors(0, 192, 192), 1), small=colors(1))
    assert run("--sr", sr) == 1
    output = capsys.readouterr()
    assert f"{niqe.niqe(read_rgb8(sr / 'a.png')):.3f}" in output.out
    assert "small.png: sr: niqe: NIQE needs two blocks" in output.err


# --- failures --------------------------------------------------------------------------------------------------------


def test_missing_unreadable_and_mismatched_files_are_reported_and_the_others_measured(tmp_path, folders, capsys):
    sr, gt = folders
    write(sr, lonely=colors(2), other_size=colors(3))
    write(gt, other_size=colors(3, 64, 40), broken=colors(4), waiting=colors(5))
    (sr / "broken.png").write_bytes(b"not an image")
    out = tmp_path / "o.json"
    assert run("--sr", sr, "--gt", gt, "--metrics", "psnr,ssim", "--json", out) == 1
    output, result = capsys.readouterr(), json.loads(out.read_text())
    assert result["per_image"].keys() == {"a.png", "b.png"}
    assert result["problems"].keys() == {"lonely.png", "other_size.png", "broken.png", "gt/waiting.png"}
    assert "no file of that name" in result["problems"]["lonely.png"]
    assert "the result is 40x48 and the ground truth 40x64" in result["problems"]["other_size.png"]
    assert "broken.png" in result["problems"]["broken.png"]
    assert "no image matches" in result["problems"]["gt/waiting.png"]
    assert "4 with problems" in output.err
    for name in result["problems"]:
        assert name in output.err


def test_nothing_to_measure_is_an_error(tmp_path, folders, capsys):
    sr, _ = folders
    gt = write(tmp_path / "elsewhere", c=colors(0))
    assert run("--sr", sr, "--gt", gt) == 1
    assert run("--sr", sr, "--gt", tmp_path / "nowhere") == 1
    assert "neither a folder nor a file" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert run("--sr", tmp_path / "empty", "--gt", gt) == 1
    assert "no images in" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "give --sr"),
        ("--sr . --metrics psnr", "ground truths are missing for psnr: give --gt"),
        ("--sr . --gt . --metrics pnsr", "unknown metric 'pnsr'.*did you mean 'psnr'"),
        ("--sr . --gt . --metrics LPIPS", "lpips-alex needs the weights of its network: --lpips-alex FILE"),
        ("--sr . --gt . --metrics lpips-vgg", "--lpips-vgg FILE"),
        ("--sr . --gt . --metrics ,", "--metrics is empty"),
        ("--sr . --model m", "--model computes the results from --lq"),
        ("--lq . --adapters a", "--adapters and --scales need --model"),
        ("--lq . --scales 1,0", "--adapters and --scales need --model"),
        ("--lq . --gt . --metrics fid", "fid compares two folders"),
        ("--sr . --gt . --json /no/such/folder/x.json", "folder of /no/such/folder/x.json does not exist"),
        ("--sr . --gt . --crop-border -1", "'-1' is not an integer of at least 0"),
        ("--lq . --scales 1,x", "'1,x' is not PIX,SEM"),
        ("--lq . --model m --scales 1,2,3", r"expected two numbers \(pix, sem\)"),
        ("--sr . --gt . --metrics psnr,ssim --plot p.png", "--plot needs psnr or ssim and one other metric"),
        ("--sr . --gt . --plot p.bmp", "--plot p.bmp cannot be written: use a name ending in one of .png .svg .pdf"),
        ("--sr . --gt . --sheet s", "--sheet s cannot be written: use a name ending in one of .png .jpg"),
    ],
)
def test_wrong_usage_exits_with_2_and_the_reason(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(*arguments.split())
    assert stopped.value.code == 2
    assert re.search(message, capsys.readouterr().err)


def test_missing_matplotlib_is_reported_before_measuring(monkeypatch, folders, capsys):
    monkeypatch.setattr(evaluate, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as stopped:
        run("--sr", folders[0], "--gt", folders[1], "--plot", "p.png")
    assert stopped.value.code == 2
    assert "pip install -e '.[plot]'" in capsys.readouterr().err


def test_reports_that_cannot_be_written_leave_old_files_unchanged(tmp_path, folders, monkeypatch, capsys):
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


def test_lpips_means_lpips_alex():
    names = evaluate.choose_metrics(evaluate.parser().parse_args(["--metrics", "LPIPS, psnr,lpips-alex"]))
    assert names == ["lpips-alex", "psnr"]


def test_nothing_to_plot_is_an_error(tmp_path, folders, capsys):
    sr, gt = folders  # too small for NIQE
    assert run("--sr", sr, "--gt", gt, "--metrics", "psnr,niqe", "--plot", tmp_path / "p.png") == 1
    assert "a plot needs finite values of psnr or ssim" in capsys.readouterr().err
    assert not (tmp_path / "p.png").exists()


# --- a model at several scales ---------------------------------------------------------------------------------------

GRID = [(0.0, 0.0), (0.0, 1.0), (1.0, 0.0), (1.0, 1.0)]


@pytest.fixture
def model(monkeypatch, tmp_path):
    """Calls of a stand-in for the model (pix removes noise, sem sharpens), and its --lq and --gt folders."""
    calls = []

    def load(args):
        def upscale(file, pairs):
            image = read_rgb8(file)
            calls.append((image.shape, list(pairs)))
            large = matlab_bicubic(image, args.scale).astype(float)
            blurred = matlab_bicubic(matlab_bicubic(large, 0.5), 2)
            noise = np.random.default_rng(0).normal(0, 10, large.shape)
            return [np.clip(large + (1 - p) * noise + s * (large - blurred), 0, 255).astype(np.uint8) for p, s in pairs]

        return upscale

    monkeypatch.setattr(evaluate, "load_upscale", load)
    truths = {name: colors(seed, 192, 192) for seed, name in enumerate(("a", "b"))}
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
    labels = [*map(evaluation.scales_label, GRID), "bicubic"]
    assert list(result["methods"]) == labels
    assert result["per_image"] == result["methods"]["pix 0 sem 0"]["per_image"]
    assert result["settings"]["scales"] == [list(pair) for pair in GRID]
    means = {label: part["mean"] for label, part in result["methods"].items()}
    assert means["pix 1 sem 0"]["psnr"] > means["pix 0 sem 0"]["psnr"] + 1
    table = capsys.readouterr().out
    for metric, digits in (("psnr", 2), ("perceptual", 4), ("niqe", 3)):
        assert f"**{means[report.best_method(means, metric)][metric]:.{digits}f}**" in table

    assert ElementTree.parse(plot).getroot().tag.endswith("svg")
    # Two columns (sem 0 and 1), two rows of scales, then bicubic and ground truth.
    cells = Image.open(sheet)
    assert cells.size == (2 * (192 + 8) + 8, 3 * (192 + 34) + 8)
    truth = np.asarray(Image.open(gt / "b.png"))
    corner = np.asarray(cells)[2 * 226 + 8 + 26 :, 200 + 8 :][:192, :192]
    np.testing.assert_array_equal(corner, truth)


def test_an_image_that_the_model_cannot_upscale_does_not_stop_the_others(model, monkeypatch, tmp_path, capsys):
    _, lq, gt = model
    write(lq, c=colors(7, 8, 8))
    write(gt, c=colors(7, 32, 32))
    load = evaluate.load_upscale

    def fragile(args):
        upscale = load(args)

        def fails_on_small(file, pairs):
            if len(read_rgb8(file)) == 8:
                raise RuntimeError("RESOURCE_EXHAUSTED: out of memory")
            return upscale(file, pairs)

        return fails_on_small

    monkeypatch.setattr(evaluate, "load_upscale", fragile)
    assert run("--model", "m", "--lq", lq, "--gt", gt, "--metrics", "psnr") == 1
    output = capsys.readouterr()
    assert "c.png: RESOURCE_EXHAUSTED: out of memory" in output.err
    assert "| pix 1 sem 1 | 2 |" in output.out


def test_model_flags_are_passed_to_the_upscaler(monkeypatch, tmp_path):
    """Stand-ins check the calls against the real signatures."""
    upscaler, session = (mock.create_autospec(kind, instance=True) for kind in (Upscaler, Session))
    monkeypatch.setattr(Upscaler, "load", mock.create_autospec(Upscaler.load, return_value=upscaler))
    upscaler.open_all.return_value = session
    session.render_all.return_value = [from_array(colors(0))]

    def arguments(function):
        return inspect.signature(function).bind(*function.call_args.args, **function.call_args.kwargs).arguments

    lq = write(tmp_path / "lq", a=colors(0))
    assert run("--model", "folder", "--adapters", "a.pkl", "--lq", lq, "--gt", lq, "--metrics", "psnr", "-s", 1,
               "--scales", "0.5", "1,0.7", "--seed", 3, "--dtype", "float32",
               "--vae-tile-mode", "fast") == 0  # fmt: skip
    loaded = {"model": "folder", "adapters": ["a.pkl"], "dtype": "float32"}
    assert loaded.items() <= arguments(Upscaler.load).items()
    assert arguments(Upscaler.load)["settings"]["vae_tile_mode"] == "fast"
    opened = arguments(upscaler.open_all)
    assert (opened["scale"], opened["seed"], opened["adjustable"]) == (1.0, 3, True)
    assert session.render_all.call_args_list == [mock.call(0.5, 0.5), mock.call(1.0, 0.7)]


def test_batches_of_one_bucket_change_no_result(tmp_path):
    """A file that cannot be read, or upscaled in a batch, is not the failure of the others."""
    lq = write(tmp_path / "lq", **{f"i{side}": colors(side, 16, 8 * side) for side in (2, 3, 4, 7)})
    (lq / "broken.png").write_bytes((lq / "i2.png").read_bytes()[:60])
    files, rows = sorted(lq.iterdir()), [(1.0, 0.0), (0.5, 1.0)]
    upscaler = random_upscaler()
    together = BatchUpscaler(upscaler, files, 4, None, 3)
    with mock.patch.object(upscaler, "open_all", wraps=upscaler.open_all) as open_all:
        found = {file: together(file, rows) for file in files[1:]}
    assert [len(call.args[0]) for call in open_all.call_args_list] == [3, 3]  # without the broken file, filled up
    with pytest.raises(ImageError, match="broken"):
        together(files[0], rows)
    for file, results in found.items():
        for result, expected in zip(results, BatchUpscaler(upscaler, [file], 4, None, 1)(file, rows), strict=True):
            assert np.abs(result.astype(int) - expected).max() <= 1  # rounding to 8 bits


def test_three_adapters_of_two_files(model, tmp_path, monkeypatch, capsys):
    """One scale for each adapter, in the order of the files; the columns of the sheet are the scales of the last."""
    _, lq, gt = model
    both, third = random_adapters(), random_adapters(names=("face",))
    save_adapters(tmp_path / "ab", both)
    save_adapters(tmp_path / "c", third)
    rows = []

    def load(args):
        assert args.adapters == [str(tmp_path / "ab"), str(tmp_path / "c")]

        def upscale(file, scales):
            rows.append(scales)
            return [matlab_bicubic(read_rgb8(file), args.scale) for _ in scales]

        return upscale

    monkeypatch.setattr(evaluate, "load_upscale", load)
    out, sheet = tmp_path / "o.json", tmp_path / "o.png"
    arguments = ["--model", "m", "--adapters", tmp_path / "ab", tmp_path / "c", "--lq", lq, "--gt", gt]
    assert run(*arguments, "--metrics", "psnr", "--scales", "1", "1,0.5,0", "1,0.5,1", "1,1,0", "--json", out,
               "--sheet", sheet) == 0  # fmt: skip
    assert rows == [[(1, 1, 1), (1, 0.5, 0), (1, 0.5, 1), (1, 1, 0)]] * 2
    result = json.loads(out.read_text())
    labels = ["pix 1 sem 1 face 1", "pix 1 sem 0.5 face 0", "pix 1 sem 0.5 face 1", "pix 1 sem 1 face 0", "bicubic"]
    assert list(result["methods"]) == labels
    assert result["settings"]["adapters"] == [str(tmp_path / "ab"), str(tmp_path / "c")]
    with Image.open(sheet) as cells:
        assert cells.size == (2 * (192 + 8) + 8, 3 * (192 + 34) + 8)
    with pytest.raises(SystemExit):
        run(*arguments, "--scales", "1,0")
    assert "expected 3 numbers (pix, sem, face)" in capsys.readouterr().err


@pytest.mark.slow
def test_the_fixture_model_end_to_end(tmp_path):
    lq = write(tmp_path / "lq", a=colors(0, 128, 128))
    gt = write(tmp_path / "gt", a=matlab_bicubic(colors(0, 128, 128), 2))
    out = tmp_path / "o.json"
    assert run("--model", golden("sd_tiny"), "--adapters", golden("pisa_sr.pkl"), "--lq", lq, "--gt", gt, "-s", 2,
               "--scales", "0", "1", "--dtype", "float32", "--json", out) == 0  # fmt: skip
    methods = json.loads(out.read_text())["methods"]
    assert list(methods) == ["pix 0 sem 0", "pix 1 sem 1", "bicubic"]
    assert methods["pix 0 sem 0"]["mean"]["psnr"] != methods["pix 1 sem 1"]["mean"]["psnr"]


# --- pyiqa ------------------------------------------------------------------------------------------------------------


def test_pyiqa_metrics_without_pyiqa_name_the_extra(folders, monkeypatch, capsys):
    monkeypatch.setattr(registry.importlib.util, "find_spec", lambda name: None)
    assert run("--sr", folders[0], "--gt", folders[1], "--metrics", "psnr,dists,musiq") == 1
    message = capsys.readouterr().err
    assert "dists, musiq are computed by pyiqa" in message
    assert "pip install -e '.[metrics]'" in message


def test_pyiqa_metrics_are_called_with_images_or_folders(folders, monkeypatch, tmp_path):
    """A stand-in for pyiqa records the calls."""
    pyiqa, calls = types.ModuleType("pyiqa"), []

    def create_metric(name):
        def metric(*images):
            calls.append((name, images))
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
        np.testing.assert_array_equal(np.asarray(given), read_rgb8(folder / "a.png"))
    result = json.loads(out.read_text())
    assert result["mean"] == {"dists": 0.25, "musiq": 0.25, "maniqa-pipal": 0.25, "fid": 0.25}
    assert "fid" not in result["per_image"]["a.png"]


def test_a_failing_external_metric_does_not_affect_other_values(folders, monkeypatch, tmp_path, capsys):
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


def test_reports_never_replace_an_image_or_each_other(tmp_path, folders, capsys):
    sr, gt = folders
    before = (gt / "a.png").read_bytes()
    (tmp_path / "link").symlink_to(gt)
    for arguments, message in (
        (("--sheet", tmp_path / "link" / "a.png"), "is an input and would be overwritten"),
        (("--json", tmp_path / "r", "--csv", tmp_path / "sr" / ".." / "r"), "--json and --csv are both"),
        (("--json", tmp_path), "is a folder"),
    ):
        assert run("--sr", sr, "--gt", gt, "--metrics", "psnr", *arguments) == 1
        captured = capsys.readouterr()
        assert message in captured.err
        assert "psnr" not in captured.out
    assert (gt / "a.png").read_bytes() == before


def test_scales_that_agree_in_six_digits_are_different_methods():
    labels = {evaluation.scales_label(pair) for pair in ((0.1234567, 1.0), (0.12345678, 1.0))}
    assert labels == {"pix 0.1234567 sem 1", "pix 0.12345678 sem 1"}


def test_whatever_one_image_raises_the_others_are_measured(folders, monkeypatch):
    def fail(path):
        if path.name == "a.png":
            raise OverflowError("size")
        return read_rgb8(path)

    monkeypatch.setattr(evaluation, "read_rgb8", fail)
    assert run("--sr", folders[0], "--gt", folders[1], "--metrics", "psnr") == 1
