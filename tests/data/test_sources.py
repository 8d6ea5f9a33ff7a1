"""Sources: what they list, how they decode, how they fail."""

import cloudpickle
import numpy as np
import pytest
from conftest import shared_data
from PIL import Image

from pisa_jax.data.sources import fake_source, folder_source, list_source, pair_source


def save(path, picture, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture).save(path, **options)


def flat(value, height=4, width=6):
    return np.full((height, width, 3), value, np.uint8)


def test_a_folder_is_read_recursively_in_order_and_only_its_pictures(tmp_path):
    for name in ("b.png", "a/z.JPG", "a/b.webp", "c.tiff", "d.bmp", ".hidden.png"):
        save(tmp_path / name, flat(7))
    (tmp_path / "notes.txt").write_text("no picture")
    source = folder_source(tmp_path)
    assert source.names == ("a/b.webp", "a/z.JPG", "b.png", "c.tiff", "d.bmp")
    assert len(source) == 5
    assert source[2].path == "b.png"
    np.testing.assert_array_equal(source[2].image, flat(7))


def test_a_folder_without_pictures_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no picture"):
        folder_source(tmp_path)
    with pytest.raises(ValueError, match="not a folder"):
        folder_source(tmp_path / "missing")


def test_pictures_are_turned_upright(tmp_path):
    stored = flat(0)
    stored[:, :3] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # shown rotated by 90 degrees clockwise
    save(tmp_path / "turned.png", stored, exif=exif)
    np.testing.assert_array_equal(folder_source(tmp_path)[0].image, np.rot90(stored, -1))


def test_palette_grey_and_alpha_become_rgb(tmp_path):
    colours = flat(0)
    colours[0], colours[1] = (200, 10, 30), (1, 2, 3)
    Image.fromarray(colours).quantize(8).save(tmp_path / "palette.png")
    save(tmp_path / "rgba.png", np.dstack([colours, flat(128)[..., :1]]))
    save(tmp_path / "grey.png", colours[..., 0])
    grey, palette, rgba = (record.image for record in folder_source(tmp_path))
    np.testing.assert_array_equal(palette, colours)
    np.testing.assert_array_equal(rgba, colours)
    np.testing.assert_array_equal(grey, np.repeat(colours[..., :1], 3, axis=2))


def test_sixteen_bit_grey_is_refused_rather_than_clipped(tmp_path):
    save(tmp_path / "deep.png", np.full((4, 4), 30000, np.uint16))
    with pytest.raises(OSError, match=r"deep\.png.*not 8 bit"):
        folder_source(tmp_path)[0]


@pytest.mark.parametrize("content", [b"", b"\xff\xd8\xff\xe0 not a picture", b"\x89PNG\r\n\x1a\n"])
def test_a_broken_file_is_named(tmp_path, content):
    (tmp_path / "broken.jpg").write_bytes(content)
    with pytest.raises(OSError, match=r"broken\.jpg"):
        folder_source(tmp_path)[0]


def test_a_truncated_jpeg_is_an_error_and_not_half_a_picture(tmp_path):
    save(tmp_path / "whole.jpg", fake_source(1, 64)[0].image)
    content = (tmp_path / "whole.jpg").read_bytes()
    (tmp_path / "whole.jpg").write_bytes(content[: len(content) // 2])
    with pytest.raises(OSError, match="truncated"):
        folder_source(tmp_path)[0]


def test_real_photographs_decode():
    source = folder_source(shared_data("train/photos"))
    image = source[len(source) // 2].image
    assert image.dtype == np.uint8
    assert min(image.shape[:2]) == 512


def test_a_list_is_relative_to_its_own_folder(tmp_path):
    save(tmp_path / "pictures/a.png", flat(1))
    save(tmp_path / "pictures/b.png", flat(2))
    (tmp_path / "list.txt").write_text("pictures/b.png\n\npictures/a.png\n")
    source = list_source(tmp_path / "list.txt")
    assert [record.path for record in source] == ["pictures/b.png", "pictures/a.png"]
    assert [record.image[0, 0, 0] for record in source] == [2, 1]
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(ValueError, match="names no picture"):
        list_source(tmp_path / "empty.txt")


def mixed(tmp_path, probability):
    for value in range(4):
        save(tmp_path / f"{value}.png", flat(value))
    (tmp_path / "general.txt").write_text("0.png\n1.png\n")
    (tmp_path / "hq.txt").write_text("2.png\n3.png\n")
    return list_source(tmp_path / "general.txt", tmp_path / "hq.txt", probability)


def test_the_high_quality_list_is_mixed_in_with_its_probability(tmp_path):
    source = mixed(tmp_path, 0.25)
    rng = np.random.default_rng(0)
    drawn = np.array([source.draw(1, rng).image[0, 0, 0] for _ in range(800)])
    assert set(drawn.tolist()) == {1, 2, 3}  # the asked record of the general list, or any of the other
    assert abs(np.mean(drawn >= 2) - 0.25) < 4 * np.sqrt(0.25 * 0.75 / 800)
    assert abs(np.sum(drawn == 2) - np.sum(drawn == 3)) < 4 * np.sqrt(200)
    again = np.random.default_rng(0)
    assert [source.draw(1, again).image[0, 0, 0] for _ in range(800)] == drawn.tolist()


@pytest.mark.parametrize(("hq_file", "probability"), [(None, 0.5), ("hq.txt", 0.0), ("hq.txt", 1.5)])
def test_a_probability_without_a_list_or_the_reverse_is_refused(tmp_path, hq_file, probability):
    with pytest.raises(ValueError, match="hq_probability"):
        list_source(tmp_path / "general.txt", hq_file, probability)


def test_pairs_are_matched_by_name_and_lq_is_enlarged_to_gt(tmp_path):
    rng = np.random.default_rng(0)
    gt, lq = rng.integers(0, 256, (16, 24, 3), np.uint8), rng.integers(0, 256, (4, 6, 3), np.uint8)
    save(tmp_path / "gt/sub/a.png", gt)
    save(tmp_path / "lq/sub/a.bmp", lq)
    save(tmp_path / "gt/b.png", gt)
    save(tmp_path / "lq/b.png", gt)
    source = pair_source(tmp_path)
    assert source.paired
    assert source.names == ("gt/b.png", "gt/sub/a.png")
    np.testing.assert_array_equal(source[0].lq, gt)
    np.testing.assert_array_equal(source[1].image, gt)
    np.testing.assert_array_equal(source[1].lq, np.asarray(Image.fromarray(lq).resize((24, 16), Image.BICUBIC)))


def test_pairs_that_do_not_fit_are_named(tmp_path):
    save(tmp_path / "gt/a.png", flat(0, 16, 24))
    save(tmp_path / "lq/a.png", flat(0, 4, 8))
    with pytest.raises(OSError, match=r"a\.png: GT is 24x16 and LQ 8x4"):
        pair_source(tmp_path)[0]
    save(tmp_path / "gt/lonely.png", flat(0))
    with pytest.raises(ValueError, match="lonely"):
        pair_source(tmp_path)


def test_the_identity_changes_with_what_a_source_holds(tmp_path):
    before = mixed(tmp_path, 0.25)
    assert mixed(tmp_path, 0.25).identity == before.identity
    assert mixed(tmp_path, 0.5).identity != before.identity
    folder = folder_source(tmp_path)
    save(tmp_path / "new.png", flat(0))
    assert folder_source(tmp_path).identity != folder.identity
    assert fake_source(3, 8, 0).identity != fake_source(3, 8, 1).identity


def test_fake_pictures_depend_on_seed_and_index_only():
    source = fake_source(3, 32, seed=5)
    np.testing.assert_array_equal(source[1].image, cloudpickle.loads(cloudpickle.dumps(source))[1].image)
    assert source[1].image.shape == (32, 32, 3)
    assert np.any(source[1].image != source[2].image)
    assert np.any(source[1].image != fake_source(3, 32, seed=6)[1].image)
    assert source[1].image.std() > 5
    assert source[1].path == source.names[1]
    with pytest.raises(ValueError, match="count"):
        fake_source(0, 32)
