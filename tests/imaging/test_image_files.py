"""Image formats, and the listing of image files."""

import pytest
from PIL import Image

from pisa_jax.imaging.image_files import IMAGE_SUFFIXES, READABLE, find_images, list_images


def test_suffixes_equal_those_of_pillow():
    registered = Image.registered_extensions()
    assert set(IMAGE_SUFFIXES) == {suffix for suffix, kind in registered.items() if kind in READABLE}
    for kind, suffixes in READABLE.items():
        assert {registered[suffix] for suffix in suffixes} == {kind}


@pytest.fixture
def folder(tmp_path):
    for name in ("b.PNG", "a.jfif", "c.txt", ".hidden.png", "a/d.tiff", "a-b.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "folder.png").mkdir()
    return tmp_path


def test_images_of_a_folder(folder):
    assert list_images(folder) == ["a-b.png", "a.jfif", "b.PNG"]


def test_a_path_that_is_no_folder(folder):
    for name in ("missing", "a.jfif"):
        with pytest.raises(NotADirectoryError, match=f"{name} is not a folder"):
            list_images(folder / name)


def test_find_images_accepts_a_folder_or_a_file(folder):
    assert [path.name for path in find_images(folder)] == ["a-b.png", "a.jfif", "b.PNG"]
    assert find_images(folder / "c.txt") == [folder / "c.txt"]
    with pytest.raises(FileNotFoundError, match="neither a folder nor a file"):
        find_images(folder / "missing")
    with pytest.raises(FileNotFoundError, match=r"no images in .*folder.png; suffixes of images: .png"):
        find_images(folder / "folder.png")
