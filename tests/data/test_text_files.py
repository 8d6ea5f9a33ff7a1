"""Lists in text files: encodings, ends of lines, and the files that lines name."""

import codecs
import unicodedata

import pytest

from pisa_jax.data.sources import list_source
from pisa_jax.data.text_files import normalize_path, read_lines


@pytest.mark.parametrize(
    "content",
    [
        b"0.png\n1.png\n",
        b"0.png\r\n1.png\r\n",
        b"0.png\r1.png",
        codecs.BOM_UTF8 + b"0.png\r\n\r\n1.png\r\n",
        codecs.BOM_UTF16_LE + "0.png\r\n1.png\r\n".encode("utf-16-le"),
        codecs.BOM_UTF16_BE + "0.png\n1.png".encode("utf-16-be"),
        codecs.BOM_UTF32_LE + "0.png\n1.png".encode("utf-32-le"),
        b"# all images\n0.png\n  # more\n1.png\n",
    ],
)
def test_lists_as_editors_and_shells_save_them(tmp_path, content):
    (tmp_path / "list.txt").write_bytes(content)
    assert list_source(tmp_path / "list.txt").names == ("0.png", "1.png")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"0.png\ncaf\xe9.png\n", r"list\.txt, line 2: byte 0xe9 is not UTF-8; save the file as UTF-8"),
        ("0.png\n".encode("utf-16-le"), r"list\.txt holds NUL characters"),
        (codecs.BOM_UTF16_LE + b"0\x00.", r"list\.txt: byte 0x2e is not UTF-16-LE"),
        (b"# nothing\n\n", r"list\.txt lists no images"),
    ],
)
def test_the_error_about_other_files_names_them(tmp_path, content, message):
    (tmp_path / "list.txt").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        list_source(tmp_path / "list.txt")


def test_only_line_ends_end_a_line(tmp_path):
    (tmp_path / "list.txt").write_text("a\u2028b\u0085c\x0bd\x1ce.png\nf.png", encoding="utf-8")
    assert read_lines(tmp_path / "list.txt") == ["a\u2028b\u0085c\x0bd\x1ce.png", "f.png"]


def test_lines_name_files_with_either_separator_and_normalization(tmp_path):
    composed, decomposed = (unicodedata.normalize(form, "größe.png") for form in ("NFC", "NFD"))
    (tmp_path / "sub").mkdir()
    for name in (f"sub/{composed}", "sub/b.png", "#1.png", "odd\\name.png"):
        (tmp_path / name).touch()
    lines = ["sub\\b.png", f"sub/{decomposed}", f"sub\\{composed}", "#1.png", "#2.png", "odd\\name.png", "sub\\no.png"]
    (tmp_path / "list.txt").write_text("\n".join(lines), encoding="utf-8")
    expected = ("sub/b.png", f"sub/{composed}", f"sub/{composed}", "#1.png", "odd\\name.png", "sub/no.png")
    source = list_source(tmp_path / "list.txt")
    assert source.names == expected
    assert source.missing() == ["sub/no.png"]
    assert source.distinct == 5


@pytest.mark.parametrize("path", ["a/b.png", "./a/b.png", "a\\b.png", ".\\a\\b.png", "a//b.png", "a/x/../b.png"])
def test_normal_form_of_a_path(path):
    assert normalize_path(path) == "a/b.png"
