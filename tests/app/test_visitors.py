import io

import numpy as np
import pytest
from PIL import Image

from pisa_jax.app.settings import Painted, ScaleMap, Setting, check_range, read_area
from pisa_jax.app.shared_files import SharedFile, SharedFiles
from pisa_jax.app.visitor import Visitor
from pisa_jax.app.visitors import Visitors


class Fake(Visitor):
    """A visitor that remembers whether it was closed."""

    def __init__(self):
        self.closed = False

    def close(self):
        self.closed = True


def test_visitors_are_freed_when_closed_idle_or_surplus():
    now = [0.0]
    visitors = Visitors(Fake, most=2, idle=10.0, clock=lambda: now[0])
    one, two = visitors.get("one"), visitors.get("two")
    assert visitors.get("one") is one
    three = visitors.get("three")  # two was used longest ago
    assert (one.closed, two.closed, three.closed) == (False, True, False)
    visitors.close("three")
    visitors.close("three")
    assert three.closed
    now[0] = 11
    assert not visitors.get("four").closed
    assert one.closed
    assert len(visitors) == 1
    visitors.close_all()
    assert len(visitors) == 0


def test_shared_files_are_there_until_they_are_removed():
    files = SharedFiles()
    urls = [files.add(SharedFile(data, "image/png")) for data in (b"a", b"b", b"b")]
    assert len(set(urls)) == 3
    assert all(len(url) >= len("/pisa-files/") + 22 for url in urls)  # 128 bits
    files.remove(urls[0])
    assert files.get(urls[0]) is None
    assert files.get(urls[1]).data == b"b"
    assert len(files) == 2


def area():
    painted = np.zeros((40, 60), np.uint8)
    painted[:, :30] = 255
    return painted


def test_setting_without_an_area_is_its_numbers():
    assert Setting((1.0, 0.5)).maps() == [1.0, 0.5]
    nothing = Painted(np.zeros((4, 4), np.uint8), (0.0, 0.0))
    assert Setting((1.0, 0.5), nothing).maps() == [1.0, 0.5]


def test_map_has_the_scales_inside_and_outside():
    setting = Setting((1.0, 0.5), Painted(area(), (1.0, 1.5)))
    pix, sem = setting.maps()
    assert pix == 1.0
    assert isinstance(sem, ScaleMap)
    np.testing.assert_allclose(sem.values()[:, :30], 1.5, rtol=0, atol=1.5 / 255)
    np.testing.assert_allclose(sem.values()[:, 30:], 0.5, rtol=0, atol=1.5 / 255)
    decoded = np.asarray(Image.open(io.BytesIO(sem.png())))
    np.testing.assert_array_equal(np.float32(sem.white) * (decoded / np.float32(255)), sem.values())
    assert setting.label(["pix", "sem"]) == "pix 1, sem 0.5 (painted 1.5)"


@pytest.mark.parametrize("softness", [5.0, 20.0])
def test_softness_is_the_width_of_the_edge(softness):
    strength = Painted(area(), (1.0, 1.0), softness).strength()
    row = strength[20]
    assert (np.diff(row) <= 1e-6).all()
    width = softness / 100 * 40
    # A Gaussian transition of standard deviation width / 4 covers 95 % within the width.
    inside = np.abs(np.arange(60) + 0.5 - 30) > width / 2 + 1
    assert np.abs(row - (np.arange(60) < 30))[inside].max() < 0.03
    assert row[29] + row[30] == pytest.approx(1, abs=1e-5)


def test_area_is_the_opacity_of_a_png():
    image = Image.new("RGBA", (6, 4), (0, 0, 0, 0))
    image.putpixel((2, 1), (255, 0, 0, 255))
    file = io.BytesIO()
    image.save(file, "PNG")
    found = read_area(file.getvalue())
    assert found.shape == (4, 6)
    assert np.argwhere(found).tolist() == [[1, 2]]


@pytest.mark.parametrize("size", [(5000, 1), (4, 4)])
def test_wrong_areas_are_refused(size):
    file = io.BytesIO()
    Image.new("RGBA" if size[0] > 4 else "L", size).save(file, "PNG")
    for data in (file.getvalue(), file.getvalue()[:40], b""):
        with pytest.raises(ValueError, match="painted area is not an RGBA image"):
            read_area(data)


@pytest.mark.parametrize("value", [-0.1, 2.1, float("nan"), "1", None, float("inf")])
def test_values_out_of_range_are_refused(value):
    assert check_range("sem", 2, 0, 2) == 2
    with pytest.raises(ValueError, match=r"sem is .*; allowed are numbers from 0 to 2"):
        check_range("sem", value, 0, 2)
