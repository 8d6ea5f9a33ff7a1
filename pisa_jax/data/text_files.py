"""Lists and prompts in text files, and the normal form of the paths in them."""

import codecs
import os
import posixpath
import unicodedata
from pathlib import Path

# Byte order marks. That of UTF-32-LE begins with that of UTF-16-LE.
BYTE_ORDER_MARKS = {
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF32_LE: "utf-32-le",
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}


def read_lines(path: str | os.PathLike) -> list[str]:
    r"""Read the lines of a text file in UTF-8, or in the encoding that its byte order mark names.

    Lines end with \n, \r\n or \r. Other characters at which `str.splitlines` splits, such as U+2028 and U+0085, are
    valid in JSON texts and in file names, and do not end a line.

    Raises:
        ValueError: the file is not text in that encoding.
    """
    data = Path(path).read_bytes()
    mark = next((mark for mark in BYTE_ORDER_MARKS if data.startswith(mark)), b"")
    encoding = BYTE_ORDER_MARKS.get(mark, "utf-8")
    data = data[len(mark) :]
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        place = f", line {line}" if encoding == "utf-8" else ""
        raise ValueError(
            f"{path}{place}: byte {data[error.start]:#04x} is not {encoding.upper()}; save the file as UTF-8"
        ) from error
    if "\0" in text:
        raise ValueError(f"{path} holds NUL characters, as UTF-16 without byte order mark does; save the file as UTF-8")
    return text.replace("\r\n", "\n").replace("\r", "\n").split("\n")


def normalize_path(path: str) -> str:
    r"""Return the form in which paths are compared: NFC, separated by "/", without "./", "//" and "x/../".

    >>> normalize_path(r".\dogs\0001.jpg")
    'dogs/0001.jpg'
    """
    return unicodedata.normalize("NFC", posixpath.normpath(path.replace("\\", "/")))


def listed_name(root: Path, line: str) -> str:
    r"""Return the name of the file below `root` that a line of a list names.

    That is the line itself or, if there is no such file, the line with "/" for each "\" in NFC or NFD, of which the
    one that exists is taken. Only lines with "\" or characters outside ASCII need to look for the file.
    """
    slashed = line.replace("\\", "/")
    if line.isascii() and slashed == line:
        return line
    forms = (line, slashed, *(unicodedata.normalize(form, slashed) for form in ("NFC", "NFD")))
    return next((form for form in forms if os.path.exists(root / form)), slashed)
