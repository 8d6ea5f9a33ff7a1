"""Files appear whole or not at all."""

import pytest

from pisa_jax.runtime.atomic_write import atomic_write


def test_the_file_appears_when_it_is_complete(tmp_path):
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
def test_after_an_error_the_old_file_is_there_and_no_rest(tmp_path, error):
    path = tmp_path / "figures.json"
    path.write_text("old")

    def half_written():
        with atomic_write(path) as file:
            file.write_text("ne")
            raise error

    with pytest.raises(error):
        half_written()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_place_that_cannot_be_written_is_an_os_error(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()

    def write():
        with atomic_write(folder) as file:
            file.write_text("x")

    with pytest.raises(OSError, match="folder"):
        write()
    assert list(tmp_path.iterdir()) == [folder]
