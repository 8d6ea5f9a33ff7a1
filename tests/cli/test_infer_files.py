"""The plan of a run of `pisa-sr infer` and its failures, with a stand-in for the model that returns its input."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import DATA, ROOT
from PIL import Image

from pisa_jax.cli import infer, infer_files
from pisa_jax.cli.infer_names import find_inputs, scale_marks
from pisa_jax.cli.infer_plan import UpscaleOptions, make_plan
from pisa_jax.imaging import network_input
from pisa_jax.imaging.image_reading import read_rgb8
from pisa_jax.inference import Upscaler
from pisa_jax.runtime import file_identity


class StandIn(Upscaler):
    """In place of an `Upscaler`: results are the resized inputs. `batches` are the numbers of images of each call."""

    def __init__(self, fail=lambda images: None):
        self.batches, self.fail = [], fail
        self.pipeline = SimpleNamespace(base=SimpleNamespace(vae_scale_factor=1))

    def plan_buckets(self, sizes, scale):
        pass

    def batch_key(self, size, scale):
        return size

    def _latent_size(self, size, scale):
        return size

    def open_all(self, images, scale, seed, adjustable):
        self.batches.append(len(images))
        self.fail(images)

        def render_all(pix, sem):
            prepared = [(*network_input.prepare_input(image, scale, 1), image) for image in images]
            return [
                network_input.finish_output(array[: plan.working[0], : plan.working[1]], plan, image)
                for array, plan, image in prepared
            ]

        return SimpleNamespace(render_all=render_all)


def save(path, size=(6, 5), color="red", **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path, **options)
    return path


def run(inputs, out, upscaler=None, report=None, **options):
    out.mkdir(exist_ok=True)
    plan = make_plan(find_inputs(inputs), UpscaleOptions(out, **({"scale": 1.0} | options)), report)
    return infer_files.upscale_files(plan, upscaler or StandIn())


def outcomes(reports):
    return {Path(report.input).name: report.outcome for report in reports}


def names(folder):
    return sorted(path.name for path in folder.iterdir())


# ---- originals and results are never replaced by another result


@pytest.mark.parametrize("link", ["symbolic", "hard", "file"])
def test_an_input_under_another_name_is_not_overwritten(tmp_path, link):
    source = save(tmp_path / "in" / "a.png")
    before = source.read_bytes()
    out = tmp_path / "out"
    if link == "symbolic":
        out.symlink_to(tmp_path / "in")
    else:
        out.mkdir()
        os.link(source, out / "a.png") if link == "hard" else (out / "a.png").symlink_to(source)
    [report] = run([tmp_path / "in"], out)
    assert report.error == f"{out}/a.png is an input and would be overwritten; give another --output or a --suffix"
    assert source.read_bytes() == before
    assert not (out / "a.png").is_symlink() or link == "file"


def test_a_folder_mounted_twice_is_recognized_without_device_and_inode(tmp_path, monkeypatch):
    """Two mounts of a network folder can have devices and inodes of their own."""
    source = save(tmp_path / "photos" / "a.png")
    (tmp_path / "mount").symlink_to(tmp_path / "photos")
    monkeypatch.setattr("pisa_jax.cli.infer_plan.file_id", lambda path: None)
    [report] = run([tmp_path / "photos"], tmp_path / "mount")
    assert "is an input and would be overwritten" in report.error
    assert names(source.parent) == ["a.png"]


def test_a_folder_under_two_mounts(tmp_path):
    source = save(tmp_path / "photos" / "a.png")
    before = source.read_bytes()
    for name in ("in", "out"):
        (tmp_path / name).mkdir()
    mounts = " && ".join(f"mount --bind '{tmp_path}/photos' '{tmp_path}/{name}'" for name in ("in", "out"))
    if subprocess.run(["unshare", "-rm", "bash", "-c", mounts], capture_output=True, check=False).returncode:
        pytest.skip("needs mount namespaces")
    code = (
        "import sys; from pathlib import Path; from pisa_jax.cli.infer_plan import *;"
        "print(make_plan([Path('in/a.png')], UpscaleOptions(Path('out'))).files[0].problem)"
    )
    command = ["unshare", "-rm", "bash", "-c", f'{mounts} && cd "{tmp_path}" && exec "$@"', "bash"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([*command, sys.executable, "-c", code], capture_output=True, text=True, check=True,
                          env=environment)  # fmt: skip
    assert done.stdout.startswith("out/a.png is an input and would be overwritten")
    assert source.read_bytes() == before


def test_a_disk_that_ignores_case(tmp_path, monkeypatch):
    """The file system decides which names are equal: here one that stores every name in lower case."""
    opened = open
    monkeypatch.setattr(
        file_identity, "open", lambda path, mode: opened(path.with_name(path.name.lower()), mode), raising=False
    )
    read_text = Path.read_text
    monkeypatch.setattr(
        Path, "read_text", lambda self, *args: read_text(self.with_name(self.name.lower()), *args), raising=False
    )
    inputs = [save(tmp_path / "in" / name) for name in ("IMG.png", "img.png", "other.png")]
    reports = run(inputs, tmp_path / "out")
    assert outcomes(reports) == {"IMG.png": "failed", "img.png": "failed", "other.png": "ok"}
    assert "IMG.png and " in reports[0].error
    assert names(tmp_path / "out") == ["other.png"]


def test_names_that_differ_in_case_are_kept_apart_on_other_disks(tmp_path):
    inputs = [save(tmp_path / "in" / name) for name in ("IMG.png", "img.png")]
    if len(names(tmp_path / "in")) == 2:
        assert outcomes(run(inputs, tmp_path / "out")) == {"IMG.png": "ok", "img.png": "ok"}


def test_a_contact_sheet_and_a_result_of_one_name(tmp_path):
    inputs = [save(tmp_path / "a.jpg"), save(tmp_path / "a_grid.png"), save(tmp_path / "b.png")]
    reports = run(inputs, tmp_path / "out", grid=True)
    assert outcomes(reports) == {"a.jpg": "failed", "a_grid.png": "failed", "b.png": "ok"}
    assert "a_grid.png would be written more than once" in reports[0].error
    assert names(tmp_path / "out") == ["b.png", "b_grid.png"]


def test_inputs_with_equal_names_are_refused_together(tmp_path):
    inputs = [save(tmp_path / name) for name in ("a.png", "a.webp", "x/a.png", "b.png")]
    reports = run(inputs, tmp_path / "out", ext="png")
    assert [report.outcome for report in reports] == ["failed", "failed", "failed", "ok"]
    assert "upscale each in a run of its own with another --output or --suffix" in reports[0].error
    assert outcomes(run(inputs[:2], tmp_path / "auto")) == {"a.png": "ok", "a.webp": "ok"}


def test_names_do_not_depend_on_the_other_files(tmp_path):
    first, second = save(tmp_path / "a.png"), save(tmp_path / "a.jpg")
    run([first], tmp_path / "out")
    upscaler = StandIn()
    reports = run([first, second], tmp_path / "out", upscaler, skip_existing=True)
    assert [report.outcome for report in reports] == ["skipped", "ok"]
    assert upscaler.batches == [1]


def test_the_report_is_not_replaced_by_a_result(tmp_path):
    out = tmp_path / "out"
    [report] = run([save(tmp_path / "a.png")], out, report=out / "a.png")
    assert "a.png is the report of this run and would be overwritten" in report.error


def test_scales_keep_all_their_digits():
    assert scale_marks([(1.0, 0.5), (0.1234567, 100000.0), (0.12345678, -0.2)]) == [
        "_p1_s0.5", "_p0.1234567_s100000", "_p0.12345678_s-0.2",
    ]  # fmt: skip


def test_one_file_under_two_paths_is_one_input(tmp_path, monkeypatch):
    save(tmp_path / "in" / "a.png")
    (tmp_path / "again").symlink_to(tmp_path / "in")
    monkeypatch.chdir(tmp_path)
    paths = ["in", tmp_path / "in" / "a.png", "again", "in/../in/a.png"]
    assert [path.name for path in find_inputs(paths)] == ["a.png"]


# ---- what one file raises is the failure of that file


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("loop"), OverflowError("seed"), KeyError("x")])
def test_any_error_is_the_failure_of_one_file(tmp_path, monkeypatch, error):
    inputs = [save(tmp_path / f"{name}.png", size=(width, 4)) for name, width in (("a", 4), ("b", 5), ("c", 6))]
    read, write = infer_files.read_image, infer_files.write_image

    def fail_at(name, function):
        def call(path, *arguments):
            if Path(path).name == name:
                raise error
            return function(path, *arguments)

        return call

    def compute(images):
        if images[0].rgb.shape[1] == 6:
            raise error

    monkeypatch.setattr(infer_files, "read_image", fail_at("a.png", read))
    reports = run(inputs, tmp_path / "out", StandIn(compute))
    assert outcomes(reports) == {"a.png": "failed", "b.png": "ok", "c.png": "failed"}
    monkeypatch.setattr(infer_files, "read_image", read)
    monkeypatch.setattr(infer_files, "write_image", fail_at("b.png", write))
    assert outcomes(run(inputs, tmp_path / "out")) == {"a.png": "ok", "b.png": "failed", "c.png": "ok"}
    assert all(report.error for report in reports if report.outcome == "failed")


def test_links_in_circles_pipes_and_missing_files(tmp_path):
    folder = tmp_path / "in"
    save(folder / "small.png")
    (folder / "loop.png").symlink_to("loop.png")
    os.mkfifo(folder / "pipe.png")
    (folder / "album.png").mkdir()
    (folder / "._small.jpg").write_bytes(b"\0\5\x16\7")
    reports = run([folder, tmp_path / "missing.png"], tmp_path / "out")
    assert outcomes(reports) == {"loop.png": "failed", "pipe.png": "failed", "small.png": "ok", "missing.png": "failed"}
    assert "pipe.png is not a regular file" in reports[1].error


def test_one_image_does_not_fail_its_batch(tmp_path):
    inputs = [save(tmp_path / f"{name}.png", color=name) for name in ("red", "black", "blue", "white")]

    def fail(images):
        if any(image.rgb.max() == 0 for image in images):
            raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory")

    reports = run(inputs, tmp_path / "out", StandIn(fail), batch_size=4)
    assert outcomes(reports) == {"red.png": "ok", "black.png": "failed", "blue.png": "ok", "white.png": "ok"}
    assert reports[1].error.startswith("out of memory; try")


@pytest.mark.parametrize(("compiled_pixels", "batches"), [(1000, [4, 4]), (20, [4, 1])])
def test_the_last_batch_is_filled_where_compiling_for_fewer_images_takes_longer(
    tmp_path, monkeypatch, compiled_pixels, batches
):
    monkeypatch.setattr("pisa_jax.inference.compiled_pixels", lambda: compiled_pixels)
    colors = ["red", "blue", "green", "white", "black"]
    inputs = [str(save(tmp_path / f"{index}.png", color=color)) for index, color in enumerate(colors)]
    upscaler = StandIn()
    assert set(outcomes(run(inputs, tmp_path / "out", upscaler, batch_size=4)).values()) == {"ok"}
    assert upscaler.batches == batches
    assert names(tmp_path / "out") == [f"{index}.png" for index in range(5)]
    np.testing.assert_array_equal(read_rgb8(tmp_path / "out" / "4.png"), 0)


def test_few_images_wait_for_their_batch(tmp_path, monkeypatch):
    """Files of one size are taken together; sizes that only decoding shows do not fill the memory either."""
    sizes = [(6, 5), (7, 5), (8, 5)] * 4
    inputs = [save(tmp_path / f"{index}.png", size) for index, size in enumerate(sizes)]
    upscaler = StandIn()
    assert set(outcomes(run(inputs, tmp_path / "out", upscaler, batch_size=4)).values()) == {"ok"}
    assert upscaler.batches == [4, 4, 4]
    monkeypatch.setattr("pisa_jax.cli.infer_plan._read_header", lambda path: ("", None, None))
    waiting, most = set(), 0

    def read(path, read=infer_files.read_image):
        nonlocal most
        waiting.add(path)
        most = max(most, len(waiting))
        return read(path)

    plan = make_plan(inputs, UpscaleOptions(tmp_path / "out", 1.0, batch_size=2))
    monkeypatch.setattr(infer_files, "read_image", read)
    infer_files.upscale_files(plan, StandIn(), lambda report: waiting.discard(Path(report.input)))
    assert most <= 4


# ---- refusals come before the work


def test_results_that_the_format_cannot_hold_are_refused_before_the_work(tmp_path):
    source, upscaler = save(tmp_path / "tall.webp", (2, 4100)), StandIn()
    [report] = run([source], tmp_path / "out", upscaler, scale=4.0, ext="webp")
    assert "webp allows at most 16383 pixels per side, not 16400; use --ext png or tiff" in report.error
    assert not upscaler.batches
    [report] = run([source], tmp_path / "out", upscaler, scale=4.0)
    assert (report.outcome, names(tmp_path / "out")) == ("ok", ["tall.png"])


def test_names_that_the_file_system_does_not_allow_are_refused_before_the_work(tmp_path):
    upscaler = StandIn()
    [report] = run([save(tmp_path / f"{'a' * 240}.png")], tmp_path / "out", upscaler, suffix="_upscaled_by_four")
    assert "File name too long" in report.error
    (tmp_path / "out" / "b.png").mkdir()
    [report] = run([save(tmp_path / "b.png")], tmp_path / "out", upscaler)
    assert "b.png is a folder" in report.error
    assert not upscaler.batches
    assert names(tmp_path / "out") == ["b.png"]


def test_an_enormous_scale_is_a_failure_of_the_file(tmp_path):
    [report] = run([save(tmp_path / "a.png")], tmp_path / "out", scale=1e308)
    assert report.outcome == "failed"


def test_the_name_of_a_tiff_that_only_the_decoder_reads(tmp_path):
    source = DATA / "field" / "planar16.tif"
    [file] = make_plan([source], UpscaleOptions(tmp_path)).files
    assert file.outputs == [tmp_path / "planar16.tiff"]
    [report] = run([source], tmp_path)
    assert (report.outcome, report.outputs) == ("ok", [str(tmp_path / "planar16.tiff")])


def test_content_of_another_format_than_the_header_gets_a_name_of_its_own(tmp_path, monkeypatch):
    """The suffix of the decoded image counts, and it is checked as the planned one."""
    inputs = [save(tmp_path / "a.jpg"), save(tmp_path / "a.png"), save(tmp_path / "b.jpg")]
    monkeypatch.setattr(infer_files, "output_suffix", lambda image, ext: ".png")
    reports = run(inputs, tmp_path / "out")
    assert outcomes(reports) == {"a.jpg": "failed", "a.png": "ok", "b.jpg": "ok"}
    assert "a.png is another file of this run" in reports[0].error
    assert names(tmp_path / "out") == ["a.png", "b.png"]
    assert [report.outcome for report in run(inputs[2:], tmp_path / "out", skip_existing=True)] == ["skipped"]


def refuse_to_load(args):
    raise AssertionError("the model must not be loaded")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--json", "nowhere/reports.json"], "the folder nowhere does not exist"),
        (["--json", "."], "--json . is a folder"),
        (["--json", "a.png"], "--json a.png is an input and would be overwritten"),
        (["-i", "empty"], "no images in empty"),
        (["-o", "a.png"], "a.png"),
    ],
)
def test_refused_before_the_model_is_loaded(tmp_path, monkeypatch, capsys, arguments, message):
    save(tmp_path / "a.png")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(infer, "load_upscaler", refuse_to_load)
    assert infer.main(["-i", "a.png", "--compile-cache", "off", *arguments]) == 1
    assert message in capsys.readouterr().err
    with Image.open("a.png") as image:
        assert image.size == (6, 5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seed", str(2**64)], "allowed are None and integers of 0 to 18446744073709551615"),
        (["--scales", "nan,1"], "'nan,1' is not PIX,SEM"),
        (["--scales", "1e39"], "'1e39' is not PIX,SEM"),
        (["--scales", "1,1,0.2"], "scales is (1.0, 1.0, 0.2); expected two numbers (pix, sem)"),
        (["--suffix", "a/b"], "'a/b' is not part of a file name"),
        (["--prompt", "a \udcff"], "'a \\udcff' is not valid UTF-8"),
        (["--max-megapixels", "0"], "'0' is not a number greater than 0"),
    ],
)
def test_wrong_values_of_flags(capsys, arguments, message):
    with pytest.raises(SystemExit, match="2"):
        infer.parse_arguments(["-i", "a.png", *arguments], "infer.py")
    assert message in capsys.readouterr().err


@pytest.fixture
def program(monkeypatch, tmp_path):
    """`infer.main` with a stand-in for the model, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(infer, "load_upscaler", lambda args: StandIn())
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)
    return lambda *arguments: infer.main([*map(str, arguments), "--compile-cache", "off", "-s", "1"])


def test_megapixels_are_limited_by_a_flag(program, tmp_path, capsys):
    save(tmp_path / "a.png", (1200, 1000))
    assert program("-i", "a.png", "--max-megapixels", 1) == 1
    assert "exceeds limit of 1000000 pixels" in (message := capsys.readouterr().err)
    assert "Use --max-megapixels to allow more." in message
    assert program("-i", "a.png", "--max-megapixels", 1.2) == 0


# ---- reporting never fails a run


class Broken:
    """A stream that cannot be written."""

    encoding = "utf-8"

    def isatty(self):
        return False

    def write(self, text):
        raise BrokenPipeError

    def flush(self):
        raise BrokenPipeError


def test_streams_that_nobody_reads(program, tmp_path, monkeypatch):
    save(tmp_path / "a.png")
    for stream in (Broken(), None):
        monkeypatch.setattr(sys, "stdout", stream)
        monkeypatch.setattr(sys, "stderr", stream)
        assert program("-i", "a.png", "missing.png", "--json", "reports.json") == 1
        reports = json.loads((tmp_path / "reports.json").read_text())
        assert [report["outcome"] for report in reports] == ["failed", "ok"]


def test_names_that_the_encoding_of_the_terminal_lacks(tmp_path):
    code = (
        "import sys; sys.path[:0] = sys.argv[1:3]; import test_infer_files as t; from pisa_jax.cli import infer\n"
        "infer.load_upscaler = lambda args: t.StandIn()\n"
        "sys.exit(infer.main(['-i', *sys.argv[3:5], '-o', sys.argv[5], '--compile-cache', 'off', '--json', 'r.json']))"
    )
    save(tmp_path / "写真.png")
    raw = os.fsdecode(b"raw \xff.png")  # not UTF-8
    save(tmp_path / raw)
    command = [sys.executable, "-c", code, ROOT / "tests", Path(__file__).parent, "写真.png", raw, "結果"]
    environment = os.environ | {"PYTHONIOENCODING": "cp1252", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, cwd=tmp_path, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert rb"results in \u7d50\u679c" in done.stdout
    assert len(json.loads((tmp_path / "r.json").read_text())) == 2
    assert len(names(tmp_path / "結果")) == 2


def test_a_pipe_whose_reader_ended(tmp_path):
    code = "import sys; from pisa_jax.runtime.console import say; [say('a line', sys.stdout) for _ in range(3)]"
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, "-c", code], stdout=writer, stderr=subprocess.PIPE, cwd=ROOT, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, b"")


def test_reports_that_cannot_be_written_are_a_failure_after_the_summary(program, tmp_path, monkeypatch, capsys):
    save(tmp_path / "a.png")
    (tmp_path / "reports").mkdir()
    upscale_files = infer_files.upscale_files

    def remove_folder(*arguments):
        upscale_files(*arguments)
        (tmp_path / "reports").rmdir()

    monkeypatch.setattr(infer_files, "upscale_files", remove_folder)
    assert program("-i", "a.png", "--json", "reports/r.json") == 1
    captured = capsys.readouterr()
    assert "1 ok of 1" in captured.out
    assert "the reports cannot be written to reports/r.json" in captured.err


def test_pixels_of_the_stand_in(tmp_path):
    save(tmp_path / "a.png")
    run([tmp_path / "a.png"], tmp_path / "out")
    assert np.array_equal(read_rgb8(tmp_path / "out" / "a.png"), read_rgb8(tmp_path / "a.png"))
