"""Folders of images: which entries are taken, and the report about them."""

import logging
import os

import numpy as np
import pytest
from PIL import Image

from pisa_jax.data.folders import image_names, list_tree
from pisa_jax.data.loader import make_loader
from pisa_jax.data.sources import folder_source


def touch(*paths):
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")


def test_hidden_entries_other_files_and_folders_with_suffixes_are_ignored(tmp_path):
    taken = ("a.png", "sub/B.JPG", "sub/deep/c.avif", "x.png/d.jfif")
    touch(*(tmp_path / name for name in taken))
    for name in (".ipynb_checkpoints/a-checkpoint.png", "sub/.Trash/b.png", "._a.png", "notes.txt", "raw.jxl", "none"):
        touch(tmp_path / name)
    names, ignored = list_tree(tmp_path)
    assert names == tuple(sorted(taken))
    assert ignored == {"hidden": 3, ".txt": 1, ".jxl": 1, "without suffix": 1}


def test_every_folder_is_listed_once_under_its_own_name(tmp_path):
    root, elsewhere = tmp_path / "root", tmp_path / "elsewhere"
    touch(root / "a.png", root / "sub/b.png", elsewhere / "c.png")
    (root / "sub/up").symlink_to("..")
    (root / "a_link").symlink_to("sub")
    (root / "out").symlink_to(elsewhere)
    (elsewhere / "back").symlink_to(root)
    names, ignored = list_tree(root)
    assert names == ("a.png", "out/c.png", "sub/b.png")
    assert ignored == {"folders that are listed under another name": 3}


def test_pipes_and_broken_links_are_ignored(tmp_path):
    touch(tmp_path / "a.png")
    os.mkfifo(tmp_path / "b.png")
    (tmp_path / "c.png").symlink_to("missing.png")
    (tmp_path / "d.png").symlink_to("d.png")
    names, ignored = list_tree(tmp_path)
    assert names == ("a.png",)
    assert ignored == {"pipes or devices": 1, "broken links": 2}


def test_links_to_files_are_taken(tmp_path):
    touch(tmp_path / "store" / "1", tmp_path / "set" / "b.png")
    (tmp_path / "set" / "a.png").symlink_to("../store/1")
    assert list_tree(tmp_path / "set").names == ("a.png", "b.png")


def test_names_that_are_not_utf8_can_be_trained_on(tmp_path):
    Image.fromarray(np.full((20, 20, 3), 5, np.uint8)).save(tmp_path / "a.png")
    os.rename(tmp_path / "a.png", os.fsencode(tmp_path) + b"/caf\xe9.png")
    loader = make_loader(folder_source(tmp_path), batch_size=1, crop=16, seed=0, degrade=lambda gt, rng: gt)
    assert os.fsencode(str(next(loader)["path"][0])) == b"caf\xe9.png"
    assert len(loader.get_state()["fingerprint"]["source"]) == 16


def test_one_line_reports_what_was_taken_and_ignored(tmp_path, caplog):
    touch(tmp_path / "a.png", tmp_path / "b.PNG", tmp_path / "c.jpg", tmp_path / ".d.png", tmp_path / "e.txt")
    with caplog.at_level(logging.INFO):
        image_names(tmp_path)
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("WARNING", f"{tmp_path}: 3 images (2 .png, 1 .jpg); ignored: 1 .txt, 1 hidden")
    ]
    caplog.clear()
    (tmp_path / ".d.png").unlink()
    (tmp_path / "e.txt").unlink()
    with caplog.at_level(logging.INFO):
        image_names(tmp_path)
    assert [record.levelname for record in caplog.records] == ["INFO"]


def test_the_error_about_a_folder_without_images_names_what_it_holds(tmp_path):
    touch(*(tmp_path / f"{index}.jxl" for index in range(3)), *(tmp_path / f"x.{index}" for index in range(9)))
    with pytest.raises(ValueError, match=r"no images in .* \(3 \.jxl, 1 \.0, .*, 2 of other kinds ignored\)"):
        image_names(tmp_path)
