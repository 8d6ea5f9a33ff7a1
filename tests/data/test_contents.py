"""Digest of the contents of files."""

import os

import numpy as np
import pytest

from pisa_jax.data import contents
from pisa_jax.data.contents import digest_files, file_sizes


@pytest.fixture
def files(tmp_path):
    rng = np.random.default_rng(0)
    for index, size in enumerate((0, 10, 5000, 300_000)):
        (tmp_path / str(index)).write_bytes(rng.bytes(size))
    return [str(tmp_path / str(index)) for index in range(4)]


def digest(files):
    return digest_files(files, file_sizes(files))


def test_copies_have_the_same_digest(files, tmp_path):
    before = digest(files)
    os.utime(files[2], (0, 0))
    (tmp_path / "copy").mkdir()
    copies = [str(tmp_path / "copy" / os.path.basename(file)) for file in files]
    for file, copy in zip(files, copies, strict=True):
        os.link(file, copy)
    assert digest(copies) == before


@pytest.mark.parametrize(("index", "position"), [(1, 3), (2, 4999), (3, 0), (3, 150_000), (3, 299_999)])
def test_a_changed_byte_changes_the_digest_of_a_small_set(files, index, position):
    before = digest(files)
    with open(files[index], "r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ 1]))
    assert digest(files) != before


def test_a_changed_size_or_a_missing_file_changes_the_digest(files):
    digests = {digest(files)}
    with open(files[0], "wb") as file:
        file.write(b"x")
    digests.add(digest(files))
    os.unlink(files[1])
    digests.add(digest(files))
    assert len(digests) == 3
    assert file_sizes([*files, files[0] + "\0", os.path.dirname(files[0])]) == [1, -1, 5000, 300_000, -1, -1]


def test_a_large_set_is_sampled(files, monkeypatch):
    monkeypatch.setattr(contents, "SAMPLED_FILES", 2)
    monkeypatch.setattr(contents, "SAMPLED_BLOCKS", 4)
    opened = []
    monkeypatch.setattr(contents, "_sample", lambda path, size, blocks: opened.append((path, blocks)) or b"")
    digest(files * 3)
    assert sorted(opened) == [(files[2], 4)]  # every sixth file, without the empty one
