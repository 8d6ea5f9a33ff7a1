"""Atomic writes: complete files, no leftovers, the permissions of the umask."""

import os

import pytest

from pisa_jax.runtime.atomic_write import atomic_write


def test_the_file_is_replaced_after_the_block(tmp_path):
    path = tmp_path / "figures.json"
    path.write_text("old")
    with atomic_write(path) as file:
        assert file.parent == tmp_path
        assert file.suffix == ".json"
        file.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_an_error_keeps_the_old_file_and_removes_the_temporary_one(tmp_path, error):
    path = tmp_path / "figures.json"
    path.write_text("old")

    def fail_half_way():
        with atomic_write(path) as file:
            file.write_text("ne")
            raise error

    with pytest.raises(error):
        fail_half_way()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_at_the_path_is_an_os_error(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()

    def write():
        with atomic_write(folder) as file:
            file.write_text("x")

    with pytest.raises(OSError, match="folder"):
        write()
    assert list(tmp_path.iterdir()) == [folder]


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_the_file_has_the_permissions_of_the_umask(tmp_path, umask):
    def write_private(path):  # as safetensors and tempfile do
        path.unlink()
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600))

    before = os.umask(umask)
    try:
        (tmp_path / "usual").touch()
        with atomic_write(tmp_path / "atomic") as file:
            write_private(file)
    finally:
        os.umask(before)
    assert (tmp_path / "atomic").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_a_missing_folder_is_an_error_before_the_block(tmp_path):
    with pytest.raises(FileNotFoundError), atomic_write(tmp_path / "none" / "file"):
        pytest.fail("the block must not run")
