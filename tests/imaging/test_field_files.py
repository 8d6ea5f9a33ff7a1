"""Files as users reported them (`tests/assets/field`): each was once read wrongly without a message, or refused."""

import numpy as np
import pytest
from conftest import DATA
from PIL import Image

from pisa_jax.imaging import network_input
from pisa_jax.imaging.any_image import to_image_data
from pisa_jax.imaging.contact_sheet import CAPTION, MARGIN, contact_sheet
from pisa_jax.imaging.image_data import from_array, to_pil
from pisa_jax.imaging.image_reading import from_pil, read_image
from pisa_jax.imaging.image_writing import output_suffix, write_image


def read(name):
    return read_image(DATA / "field" / name)


def through_identity(image, scale, tint=(0, 0, 0)):
    """Pass an image through the steps around a network that adds `tint` to its input."""
    array, plan = network_input.prepare_input(image, scale, 1)
    return network_input.finish_output(array + np.array(tint, np.float32), plan, image)


def over(image, background):
    alpha = image.alpha[..., None]
    return np.clip(image.rgb, 0, 1) * alpha + background * (1 - alpha)


def test_planar_16_bit_tiff():
    np.testing.assert_allclose(read("planar16.tif").rgb, read("planar16_expected.png").rgb, atol=1e-6)


def test_white_of_a_12_bit_tiff_is_4095():
    image = read("grey12.tif")
    assert abs(image.rgb.mean() - 0.378) < 0.001
    assert (image.gray, image.bits) == (True, 16)


def test_the_image_behind_a_preview():
    image = read("camera.dng")
    assert image.rgb.shape == (48, 64, 3)
    assert "the file has 2 frames or pages; only page 2 (64x48) is used" in image.notes


def test_a_bigtiff_has_no_note():
    assert read("bigtiff.tif").notes == ()


def test_cmyk_of_16_bits_stays_exact():
    assert read("cmyk16.tif").bits == 16


def test_text_of_exif_is_kept_byte_for_byte(tmp_path):
    image = through_identity(read("exif_utf8.jpg"), 2)
    for suffix in (".jpg", ".png", ".webp", ".tif"):
        write_image(tmp_path / f"a{suffix}", image)
        for text in ("Møte på Tromsø – 東京", "Fotostudio Ålesund", "© Bildstelle Köln"):
            assert text.encode() in read_image(tmp_path / f"a{suffix}").exif
            assert text.encode() in (tmp_path / f"a{suffix}").read_bytes()


@pytest.mark.parametrize("background", ["black", "white", "pattern"])
def test_colors_of_invisible_pixels_do_not_reach_visible_ones(background):
    images = [through_identity(read(name), 4) for name in ("cutout_black.png", "cutout_bled.png")]
    shape = images[0].rgb.shape
    colors = {"black": 0, "white": 1, "pattern": np.random.default_rng(0).random(shape)}[background]
    black, bled = (over(image, colors) for image in images)
    assert np.abs(black - bled).max() * 255 < 3


def test_ancillary_png_chunks_that_decoders_refuse_are_dropped_with_a_note():
    assert "the PNG chunk zTXt was dropped" in read("long_text.png").notes[0]
    assert "the PNG chunk tEXt was dropped: its checksum is wrong" in read("text_crc.png").notes[0]


def test_one_level_of_4_bit_gray_is_transparent():
    assert np.mean(read("grey4_transparent.png").alpha == 0) == 1 / 16


def test_linear_light_stays_linear_light(tmp_path):
    image = read("linear_gama.png")
    assert abs(image.rgb.mean() - 0.424) < 0.001
    write_image(tmp_path / "a.png", image)
    np.testing.assert_allclose(read_image(tmp_path / "a.png").rgb, image.rgb, atol=1e-3)
    with Image.open(tmp_path / "a.png") as written, Image.open(DATA / "field" / "linear_gama.png") as source:
        np.testing.assert_allclose(np.asarray(written), np.asarray(source), atol=1)


def test_colorless_images_stay_colorless():
    image = through_identity(read("grey_as_rgb.png"), 2, tint=(0.04, 0, -0.04))
    assert np.ptp(image.rgb, axis=-1).max() == 0


def test_contact_sheets_show_the_colors_of_the_profile():
    image = read("p3_patches.png")
    sheet = np.asarray(contact_sheet([("", to_pil(image))], 1)) / 255
    row, columns = MARGIN + CAPTION + 8, [MARGIN + column for column in (8, 24, 40, 56)]
    expected = np.clip(image.rgb[8, [8, 24, 40, 56]], 0, 1)
    assert np.abs(sheet[row, columns] - expected).max() * 255 < 2


def test_contact_sheets_show_transparent_parts_over_white():
    image = read("cutout_black.png")
    sheet = np.asarray(contact_sheet([("", to_pil(image))], 1))
    cell = sheet[MARGIN + CAPTION :, MARGIN:][: len(image.alpha), : image.alpha.shape[1]]
    np.testing.assert_array_equal(cell[image.alpha == 0], 255)
    np.testing.assert_array_equal(cell[image.alpha == 1] / np.float32(255), image.rgb[image.alpha == 1])


def test_webp_without_loss_is_written_without_loss(tmp_path):
    image = read("stripes_lossless.webp")
    assert output_suffix(image) == ".webp"
    write_image(tmp_path / "a.webp", image)
    np.testing.assert_array_equal(read_image(tmp_path / "a.webp").rgb, image.rgb)


def test_floats_reach_the_network_with_all_their_levels():
    ramp = np.linspace(100 / 255, 102 / 255, 64, dtype=np.float32)[None, :, None].repeat(48, 0).repeat(3, -1)
    assert len(np.unique(network_input.prepare_input(from_array(ramp), 2, 64)[0])) > 60


@pytest.mark.parametrize("name", ["grey12.tif", "bigtiff.tif", "linear_gama.png", "p3_patches.png"])
def test_images_that_pillow_opened_equal_their_files(name):
    with Image.open(DATA / "field" / name) as opened:
        # Pillow reduces linear_gama.png to 8 bits
        np.testing.assert_allclose(from_pil(opened).rgb, read(name).rgb, atol=0.02)


def test_types_of_results_of_the_library():
    deep = Image.fromarray((np.mgrid[:8, :9][1] * 7000).astype(np.uint16))
    image, like = to_image_data(deep)
    assert (like(image).mode, image.bits) == ("I;16", 16)
    np.testing.assert_array_equal(np.asarray(like(image)), np.asarray(deep))
    mask = np.mgrid[:8, :9][1] > 4
    image, like = to_image_data(mask)
    np.testing.assert_array_equal(like(image), mask)
    assert like(image).dtype == bool
    assert to_image_data(DATA / "field" / "planar16.tif")[1](image).mode == "L"
