"""The command degrade: output files, reproducibility, failures."""

import numpy as np
import pytest
from PIL import Image

from pisa_jax.cli import degrade, evaluate
from pisa_jax.data.sources import fake_source, pair_source
from pisa_jax.imaging.image_reading import read_rgb8


def run(*arguments):
    return degrade.main([str(argument) for argument in arguments])


def write(folder, sizes):
    """Write generated images {name: (width, height)} as PNG files; returns the folder."""
    folder.mkdir(exist_ok=True)
    for index, (name, (width, height)) in enumerate(sizes.items()):
        Image.fromarray(fake_source(9, 96)[index].image[:height, :width]).save(folder / f"{name}.png")
    return folder


def contents(out):
    """Files of an evaluation set: {relative path: bytes}."""
    return {file.relative_to(out).as_posix(): file.read_bytes() for file in sorted(out.rglob("*")) if file.is_file()}


@pytest.fixture
def photos(tmp_path):
    return write(tmp_path / "photos", {"a": (96, 64), "b": (67, 41), "c": (9, 8)})


def test_lq_is_a_quarter_of_the_cropped_gt(photos, tmp_path, capsys):
    assert run("--gt", photos, "--out", tmp_path / "set") == 0
    assert "3 pairs, 0 skipped; seed 0" in capsys.readouterr().out
    sizes = {"a": (64, 96), "b": (40, 64), "c": (8, 8)}
    for name, (height, width) in sizes.items():
        source, gt = (read_rgb8(folder / f"{name}.png") for folder in (photos, tmp_path / "set" / "gt"))
        np.testing.assert_array_equal(gt, source[:height, :width])
        with Image.open(tmp_path / "set" / "lq" / f"{name}.png") as lq:
            assert (lq.mode, lq.size) == ("RGB", (width // 4, height // 4))
    # LQ has the content of GT and is degraded.
    lq, gt = (read_rgb8(tmp_path / "set" / side / "a.png").astype(float) for side in ("lq", "gt"))
    assert 1 < np.abs(gt.reshape(16, 4, 24, 4, 3).mean((1, 3)) - lq).mean() < 30
    assert sorted(path.name for path in (tmp_path / "set").iterdir()) == ["gt", "lq"]


def test_evaluation_and_training_read_the_set(photos, tmp_path, capsys):
    (photos / "c.png").unlink()
    run("--gt", photos, "--out", tmp_path / "set")
    lq, gt = (str(tmp_path / "set" / side) for side in ("lq", "gt"))
    assert evaluate.main(["--lq", lq, "--gt", gt, "--metrics", "psnr,ssim"]) == 0
    assert "| bicubic | 2 |" in capsys.readouterr().out
    assert [pair.lq.shape for pair in pair_source(tmp_path / "set")] == [(64, 96, 3), (40, 64, 3)]


def test_an_image_depends_only_on_its_name_and_the_seed(photos, tmp_path):
    for out in ("one", "again"):
        assert run("--gt", photos, "--out", tmp_path / out, "--seed", 3) == 0
    first = contents(tmp_path / "one")
    assert contents(tmp_path / "again") == first

    Image.open(photos / "a.png").save(photos / "0.png")  # sorts before all others
    assert run("--gt", photos, "--out", tmp_path / "more", "--seed", 3) == 0
    more = contents(tmp_path / "more")
    assert {path: more[path] for path in first} == first
    assert more["gt/0.png"] == more["gt/a.png"]
    assert more["lq/0.png"] != more["lq/a.png"]

    assert run("--gt", photos, "--out", tmp_path / "other", "--seed", 4) == 0
    assert contents(tmp_path / "other")["lq/a.png"] != first["lq/a.png"]


def test_invalid_images_are_reported_and_skipped(photos, tmp_path, capsys):
    (photos / "broken.png").write_bytes(b"not an image")
    write(photos, {"small": (96, 7)})
    assert run("--gt", photos, "--out", tmp_path / "set") == 1
    output = capsys.readouterr()
    assert "broken.png is not an image" in output.err
    assert "small.png: cannot degrade float32 (4, 96, 3)" in output.err
    assert "3 pairs, 2 skipped" in output.out
    assert {path.name for path in (tmp_path / "set" / "lq").iterdir()} == {"a.png", "b.png", "c.png"}


def test_an_existing_set_is_replaced_only_with_overwrite(photos, tmp_path, capsys):
    assert run("--gt", photos, "--out", tmp_path / "set") == 0
    before = contents(tmp_path / "set")
    (photos / "a.png").unlink()
    with pytest.raises(SystemExit) as stopped:
        run("--gt", photos, "--out", tmp_path / "set")
    assert stopped.value.code == 2
    assert "add --overwrite" in capsys.readouterr().err
    assert contents(tmp_path / "set") == before
    assert run("--gt", photos, "--out", tmp_path / "set", "--overwrite") == 0
    assert contents(tmp_path / "set") == {path: data for path, data in before.items() if "/a." not in path}


@pytest.mark.parametrize("failure", ["nothing to degrade", "full disk"])
def test_a_failure_leaves_the_old_set_and_no_temporary_files(photos, tmp_path, monkeypatch, capsys, failure):
    run("--gt", photos, "--out", tmp_path / "set")
    before = contents(tmp_path / "set")
    write_image = degrade.write_image

    def full_disk(path, image):
        if path.name == "b.png":
            raise OSError(28, "No space left on device")
        return write_image(path, image)

    if failure == "full disk":
        monkeypatch.setattr(degrade, "write_image", full_disk)
    else:
        photos = write(tmp_path / "tiny", {"dot": (1, 1)})
    assert run("--gt", photos, "--out", tmp_path / "set", "--overwrite") == 1
    assert {"full disk": "No space left", "nothing to degrade": "none of the 1"}[failure] in capsys.readouterr().err
    assert contents(tmp_path / "set") == before
    assert sorted(path.name for path in (tmp_path / "set").iterdir()) == ["gt", "lq"]


def test_errors_of_wrong_usage(photos, tmp_path, capsys):
    run("--gt", photos, "--out", tmp_path / "set")
    for arguments, message in (
        (("--gt", tmp_path / "set" / "gt", "--out", tmp_path / "set", "--overwrite"), "is inside"),
        (("--gt", photos, "--out", tmp_path / "other", "--seed", -1), "--seed -1"),
    ):
        with pytest.raises(SystemExit) as stopped:
            run(*arguments)
        assert stopped.value.code == 2
        assert message in capsys.readouterr().err
    assert run("--gt", tmp_path / "nowhere", "--out", tmp_path / "other") == 1
    assert "neither a folder nor a file" in capsys.readouterr().err
    Image.open(photos / "a.png").save(photos / "a.jpg")
    assert run("--gt", photos, "--out", tmp_path / "other") == 1
    assert "the results of a.jpg and a.png would overwrite each other" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("link", ["folder", "file"])
def test_originals_in_a_folder_that_is_replaced_are_kept(photos, tmp_path, capsys, link):
    """The folder of the originals can have two names, and its files can be links into the set."""
    (tmp_path / "set").mkdir()
    photos.rename(tmp_path / "set" / "gt")
    originals = tmp_path / "originals"
    if link == "folder":
        originals.symlink_to(tmp_path / "set" / "gt")
        with pytest.raises(SystemExit):
            run("--gt", originals, "--out", tmp_path / "set", "--overwrite")
        assert "is inside" in capsys.readouterr().err
    else:
        originals.mkdir()
        (originals / "a.png").symlink_to(tmp_path / "set" / "gt" / "a.png")
        assert run("--gt", originals, "--out", tmp_path / "set", "--overwrite") == 1
        assert "which would be replaced; give another --out" in capsys.readouterr().err
    assert len(contents(tmp_path / "set")) == 3


@pytest.mark.parametrize("error", [RuntimeError("loop"), OverflowError("size"), MemoryError()])
def test_whatever_one_image_raises_the_others_are_degraded(photos, tmp_path, monkeypatch, error):
    def fail(file):
        if file.name == "b.png":
            raise error
        return read_rgb8(file)

    monkeypatch.setattr(degrade, "read_rgb8", fail)
    assert run("--gt", photos, "--out", tmp_path / "set") == 1
    assert {path.name for path in (tmp_path / "set" / "gt").iterdir()} == {"a.png", "c.png"}
