"""Sources of images: listing, decoding, errors."""

import unicodedata

import cloudpickle
import numpy as np
import pytest
from conftest import DATA
from PIL import Image
from raw_files import DISPLAY_P3, SRGB_CURVE, rgb_profile

from pisa_jax.data.sources import fake_source, folder_source, list_source, pair_source
from pisa_jax.imaging.image_data import to_array
from pisa_jax.imaging.image_reading import read_image


def save(path, image, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path, **options)


def flat(value, height=4, width=6):
    return np.full((height, width, 3), value, np.uint8)


def test_a_folder_lists_its_images_recursively_in_order(tmp_path):
    for name in ("b.png", "a/z.JPG", "a/b.webp", "c.tiff", "d.bmp", ".hidden.png"):
        save(tmp_path / name, flat(7))
    (tmp_path / "notes.txt").write_text("not an image")
    source = folder_source(tmp_path)
    assert source.names == ("a/b.webp", "a/z.JPG", "b.png", "c.tiff", "d.bmp")
    assert len(source) == 5
    assert source[2].path == "b.png"
    np.testing.assert_array_equal(source[2].image, flat(7))


def test_a_folder_without_images_raises_an_error(tmp_path):
    with pytest.raises(ValueError, match="no images"):
        folder_source(tmp_path)
    with pytest.raises(ValueError, match="not a folder"):
        folder_source(tmp_path / "missing")


def test_exif_orientation_is_applied(tmp_path):
    stored = flat(0)
    stored[:, :3] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # display rotated by 90 degrees clockwise
    save(tmp_path / "turned.png", stored, exif=exif)
    np.testing.assert_array_equal(folder_source(tmp_path)[0].image, np.rot90(stored, -1))


def test_palette_gray_and_alpha_become_rgb(tmp_path):
    colors = flat(0)
    colors[0], colors[1] = (200, 10, 30), (1, 2, 3)
    Image.fromarray(colors).quantize(8).save(tmp_path / "palette.png")
    save(tmp_path / "rgba.png", np.dstack([colors, flat(128)[..., :1]]))
    save(tmp_path / "gray.png", colors[..., 0])
    gray, palette, rgba = (item.image for item in folder_source(tmp_path))
    np.testing.assert_array_equal(palette, colors)
    np.testing.assert_array_equal(rgba, colors)
    np.testing.assert_array_equal(gray, np.repeat(colors[..., :1], 3, axis=2))


def test_sixteen_bit_gray_is_scaled_to_8_bits(tmp_path):
    save(tmp_path / "deep.png", np.full((4, 4), 30000, np.uint16))
    np.testing.assert_array_equal(folder_source(tmp_path)[0].image, flat(117, 4, 4))  # 30000 / 257 = 116.7


def test_icc_profiles_are_applied_as_in_inference(tmp_path):
    stored = np.random.default_rng(0).integers(0, 256, (6, 8, 3), np.uint8)
    save(tmp_path / "p3.png", stored, icc_profile=rgb_profile(DISPLAY_P3, SRGB_CURVE))
    expected = to_array(read_image(tmp_path / "p3.png"))
    assert np.any(expected != stored)
    np.testing.assert_array_equal(folder_source(tmp_path)[0].image, expected)


def test_files_that_cannot_be_decoded_raise_oserror_with_their_name(tmp_path):
    Image.fromarray(np.full((4, 4), 70000, np.int32)).save(tmp_path / "deep.tiff")
    with pytest.raises(OSError, match=r"deep\.tiff: holds signed integers of 32 bits"):
        folder_source(tmp_path)[0]
    (tmp_path / "list.txt").write_text("missing.png\n")
    with pytest.raises(OSError, match=r"missing\.png"):
        list_source(tmp_path / "list.txt")[0]


@pytest.mark.parametrize("content", [b"", b"\xff\xd8\xff\xe0 not an image", b"\x89PNG\r\n\x1a\n"])
def test_the_error_names_a_broken_file(tmp_path, content):
    (tmp_path / "broken.jpg").write_bytes(content)
    with pytest.raises(OSError, match=r"broken\.jpg"):
        folder_source(tmp_path)[0]


def test_a_truncated_jpeg_raises_an_error(tmp_path):
    save(tmp_path / "whole.jpg", fake_source(1, 64)[0].image)
    content = (tmp_path / "whole.jpg").read_bytes()
    (tmp_path / "whole.jpg").write_bytes(content[: len(content) // 2])
    with pytest.raises(OSError, match="truncated"):
        folder_source(tmp_path)[0]


def test_photographs_decode():
    source = folder_source(DATA / "demo")
    image = source[len(source) // 2].image
    assert image.dtype == np.uint8
    assert min(image.shape[:2]) == 512


def test_paths_of_a_list_are_relative_to_its_folder(tmp_path):
    save(tmp_path / "images/a.png", flat(1))
    save(tmp_path / "images/b.png", flat(2))
    (tmp_path / "list.txt").write_text("images/b.png\n\nimages/a.png\n")
    source = list_source(tmp_path / "list.txt")
    assert [item.path for item in source] == ["images/b.png", "images/a.png"]
    assert [item.image[0, 0, 0] for item in source] == [2, 1]
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(ValueError, match="lists no images"):
        list_source(tmp_path / "empty.txt")


def mixed(tmp_path, probability):
    for value in range(4):
        save(tmp_path / f"{value}.png", flat(value))
    (tmp_path / "general.txt").write_text("0.png\n1.png\n")
    (tmp_path / "hq.txt").write_text("2.png\n3.png\n")
    return list_source(tmp_path / "general.txt", tmp_path / "hq.txt", probability)


def test_images_of_the_high_quality_list_are_drawn_with_its_probability(tmp_path):
    source = mixed(tmp_path, 0.25)
    rng = np.random.default_rng(0)
    drawn = [source.choose(1, rng) for _ in range(800)]
    assert set(drawn) == {(0, 1), (1, 0), (1, 1)}  # image 1 of the general list, or any of the other list
    assert abs(np.mean([part for part, _ in drawn]) - 0.25) < 4 * np.sqrt(0.25 * 0.75 / 800)
    assert abs(drawn.count((1, 0)) - drawn.count((1, 1))) < 4 * np.sqrt(200)
    again = np.random.default_rng(0)
    assert [source.choose(1, again) for _ in range(800)] == drawn


@pytest.mark.parametrize(("hq_file", "probability"), [(None, 0.5), ("hq.txt", 0.0), ("hq.txt", 1.5)])
def test_a_probability_without_a_list_and_the_reverse_raise_an_error(tmp_path, hq_file, probability):
    with pytest.raises(ValueError, match="hq_probability"):
        list_source(tmp_path / "general.txt", hq_file, probability)


def test_pairs_are_matched_by_name_and_lq_is_upscaled_to_gt(tmp_path):
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


def test_pairs_are_matched_in_either_unicode_normalization(tmp_path):
    composed, decomposed = (unicodedata.normalize(form, "größe.png") for form in ("NFC", "NFD"))
    save(tmp_path / "gt" / composed, flat(1))
    save(tmp_path / "lq" / decomposed, flat(2))
    assert pair_source(tmp_path).lq_names == (f"lq/{decomposed}",)
    save(tmp_path / "lq" / composed, flat(2))
    with pytest.raises(ValueError, match=r"lq has images that differ only in the suffix or the Unicode normalization"):
        pair_source(tmp_path)


def test_errors_name_pairs_that_do_not_match(tmp_path):
    save(tmp_path / "gt/a.png", flat(0, 16, 24))
    save(tmp_path / "lq/a.png", flat(0, 4, 8))
    with pytest.raises(OSError, match=r"a\.png: GT is 24x16 and LQ 8x4"):
        pair_source(tmp_path)[0]
    save(tmp_path / "gt/unpaired.png", flat(0))
    with pytest.raises(ValueError, match="unpaired"):
        pair_source(tmp_path)


def test_the_identity_changes_with_the_content_of_a_source(tmp_path):
    before = mixed(tmp_path, 0.25)
    assert mixed(tmp_path, 0.25).identity == before.identity
    assert mixed(tmp_path, 0.5).identity != before.identity
    folder = folder_source(tmp_path)
    save(tmp_path / "new.png", flat(0))
    assert folder_source(tmp_path).identity != folder.identity
    assert fake_source(3, 8, 0).identity != fake_source(3, 8, 1).identity


def test_fake_images_depend_on_seed_and_index_only():
    source = fake_source(3, 32, seed=5)
    np.testing.assert_array_equal(source[1].image, cloudpickle.loads(cloudpickle.dumps(source))[1].image)
    assert source[1].image.shape == (32, 32, 3)
    assert np.any(source[1].image != source[2].image)
    assert np.any(source[1].image != fake_source(3, 32, seed=6)[1].image)
    assert source[1].image.std() > 5
    assert source[1].path == source.names[1]
    with pytest.raises(ValueError, match="count"):
        fake_source(0, 32)
