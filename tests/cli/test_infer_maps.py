"""Scale maps of `pisa-sr infer`, with a stand-in for the model that returns its input and keeps the scales."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from pisa_jax.cli import infer
from pisa_jax.cli.scale_map_files import check_aspect_ratio, read_scale_map
from pisa_jax.inference import Upscaler


class StandIn(Upscaler):
    """In place of an `Upscaler`; `calls` are the scales of every rendering."""

    adapter_names = ("pix", "sem")

    def __init__(self):
        self.calls, self.adjustable = [], []

    def plan_buckets(self, sizes, scale):
        pass

    def batch_key(self, size, scale):
        return size

    def filling(self, count, batch_size, size, scale):
        return 0

    def open_all(self, images, scale, seed, adjustable):
        self.adjustable.append(adjustable)
        return SimpleNamespace(render_all=lambda *scales: self.calls.append(scales) or list(images))


@pytest.fixture
def upscaler(monkeypatch, tmp_path):
    """Replace the model, and make the images a.png and b.png in an empty working folder."""
    monkeypatch.chdir(tmp_path)
    stand_in = StandIn()
    monkeypatch.setattr(infer, "load_upscaler", lambda args: stand_in)
    for name in ("a", "b"):
        save(f"in/{name}.png", np.full((4, 6, 3), 90))
    return stand_in


def save(name, values, **options):
    values = np.asarray(values, np.uint16 if np.max(values) > 255 else np.uint8)
    path = Path(name)
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(values).save(path, **options)
    return path


def run(*arguments, code=0):
    assert infer.main([*map(str, arguments), "--compile-cache", "off", "-s", "1", "--json", "r.json"]) == code
    return {report["input"][-5:]: report for report in json.loads(Path("r.json").read_text())}


def test_white_is_the_scale_and_black_is_0(upscaler):
    levels = np.array([[0, 51, 255], [255, 102, 0]])
    save("map.png", levels)
    reports = run("-i", "in", "--sem-map", "map.png", "--scales", "1,0.7", "0.4,-2", "--grid", "--batch-size", 2)
    assert [pix for pix, _ in upscaler.calls] == [1.0, 0.4]
    for (_, maps), scale in zip(upscaler.calls, (0.7, -2), strict=True):
        assert len(maps) == 2
        for each in maps:
            np.testing.assert_allclose(each, scale * levels / 255, rtol=1e-6)
            assert each[0, 2] == np.float32(scale)
    assert upscaler.adjustable == [True]
    assert reports["a.png"]["maps"] == {"sem": "map.png"}
    assert len(reports["a.png"]["outputs"]) == 3


def test_maps_of_a_folder_are_matched_by_stem(upscaler, capsys):
    save("maps/a.tif", np.full((2, 3), 13107))  # a fifth of the white of 16 bits
    save("maps/c.png", np.full((2, 3), 255))
    reports = run("-i", "in", "in/missing.png", "--pix-map", "maps", "--sem-map", "maps", "--scales", "0.5", code=1)
    assert {name: report["outcome"] for name, report in reports.items()} == {
        "a.png": "ok", "b.png": "failed", "g.png": "failed",
    }  # fmt: skip
    assert reports["b.png"]["error"] == "there is no scale map 'b' in maps; add an image file of that stem"
    [(pix, sem)] = upscaler.calls
    np.testing.assert_allclose([*pix, *sem], np.full((2, 2, 3), 0.1), rtol=1e-6)
    save("maps/a.png", np.full((2, 3), 255))
    assert "several scale maps match a.png: maps/a.png, maps/a.tif" in run(
        "-i", "in", "--sem-map", "maps", code=1
    )["a.png"]["error"]  # fmt: skip


def test_white_maps_need_no_second_prediction(upscaler):
    save("map.png", np.full((4, 6), 255))
    run("-i", "in/a.png", "--sem-map", "map.png", "--scales", "1")
    assert upscaler.adjustable == [False]


def test_a_map_is_upright_and_without_alpha(upscaler, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise
    levels = np.arange(6).reshape(3, 2) * 50
    path = save("map.png", np.stack([levels, 255 - levels], -1), exif=exif)
    values, notes = read_scale_map(path, (6, 4))
    np.testing.assert_allclose(values, np.rot90(levels, -1) / 255, rtol=1e-6)
    assert notes == ("the alpha channel of map.png is ignored",)
    reports = run("-i", "in/a.png", "--sem-map", path)
    assert reports["a.png"]["notes"] == ["the alpha channel of map.png is ignored"]


def test_maps_that_cannot_be_used_fail_their_image(upscaler):
    save("colors.png", np.stack([np.full((4, 6), level) for level in (10, 20, 30)], -1))
    assert "colors.png has colors; save it as a gray image" in failure("colors.png")
    save("wide.png", np.zeros((4, 9)))
    assert "wide.png has 9x4 pixels, and its image 6x4; a map covers its image and has" in failure("wide.png")
    save("turned.png", np.zeros((60, 40)))  # which its header alone does not exclude
    assert "turned.png has 40x60 pixels" in failure("turned.png")
    Path("text.png").write_text("no image")
    assert "text.png is not an image" in failure("text.png")
    assert not upscaler.calls


def failure(name):
    return run("-i", "in/a.png", "--sem-map", name, code=1)["a.png"]["error"]


@pytest.mark.parametrize(
    ("size", "image", "fits"),
    [
        ((3, 2), (6, 4), True),
        ((1, 1), (6, 4), True),
        ((301, 200), (1501, 1000), True),
        ((512, 344), (1500, 1000), True),  # a multiple of 8
        ((512, 360), (1500, 1000), False),
        ((4, 2), (5, 5), False),
    ],
)
def test_aspect_ratios(size, image, fits):
    if fits:
        check_aspect_ratio(Path("map.png"), size, image)
    else:
        with pytest.raises(ValueError, match="has the same aspect ratio"):
            check_aspect_ratio(Path("map.png"), size, image)


def test_maps_are_checked_before_the_model_is_loaded(upscaler, monkeypatch, capsys):
    def refuse_to_load(args):
        raise AssertionError("the model is loaded")

    monkeypatch.setattr(infer, "load_upscaler", refuse_to_load)
    Path("empty").mkdir()
    for name, message in (("nowhere", "nowhere is neither a folder nor a file"), ("empty", "no images in empty")):
        assert infer.main(["-i", "in", "--sem-map", name, "--compile-cache", "off"]) == 1
        assert message in capsys.readouterr().err


def test_a_map_is_not_overwritten(upscaler):
    save("maps/a.png", np.full((4, 6), 255))
    error = run("-i", "in/a.png", "--sem-map", "maps", "-o", "maps", code=1)["a.png"]["error"]
    assert error == "maps/a.png is a scale map and would be overwritten; give another --output or a --suffix"
    assert infer.main(["-i", "in/a.png", "--sem-map", "maps", "--json", "maps/a.png", "--compile-cache", "off"]) == 1


def test_adapters_of_other_names_have_no_map(upscaler, monkeypatch, capsys):
    monkeypatch.setattr(infer, "adapter_names", lambda paths: ["pix", "face"])
    with pytest.raises(SystemExit, match="2"):
        run("-i", "in", "--sem-map", "map.png")
    assert "--sem-map: there is no adapter 'sem'; the adapters are pix, face" in capsys.readouterr().err
