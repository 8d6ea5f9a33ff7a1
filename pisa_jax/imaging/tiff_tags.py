"""Directories of tags of TIFF files and EXIF blocks, read and written byte for byte.

A value is kept as the bytes of the file: text in any encoding survives, which Pillow's `Exif` does not do.
"""

import struct
from collections.abc import Mapping
from typing import NamedTuple

EXIF_DIRECTORY, GPS_DIRECTORY, INTEROP_DIRECTORY = 34665, 34853, 40965
_SUBDIRECTORIES = (EXIF_DIRECTORY, GPS_DIRECTORY, INTEROP_DIRECTORY)
_MAKER_NOTE = 37500
BYTE, SHORT, LONG, _RATIONAL, UNDEFINED = 1, 3, 4, 5, 7
_FORMATS = {BYTE: "B", SHORT: "H", LONG: "I"}
# type of TIFF 6.0 and BigTIFF: (bytes of a number, numbers of a value)
_TYPES = {1: (1, 1), 2: (1, 1), 3: (2, 1), 4: (4, 1), 5: (4, 2), 6: (1, 1), 7: (1, 1), 8: (2, 1), 9: (4, 1)}
_TYPES |= {10: (4, 2), 11: (4, 1), 12: (8, 1), 13: (4, 1), 16: (8, 1), 17: (8, 1), 18: (8, 1)}
_LARGEST_OF_TIFF = 13  # larger types are those of BigTIFF


class Value(NamedTuple):
    """A value of a tag: its type, and its bytes in the byte order of the file."""

    kind: int
    data: bytes
    # offset at which the bytes were read, 0 if there is none
    offset: int = 0


# tag -> value or subdirectory
Directory = dict[int, Value | dict]


class Tags(NamedTuple):
    """A directory of a block with its EXIF, GPS and interoperability directories."""

    # "<" or ">"
    order: str
    directory: Directory
    # False if entries were damaged, which are left out
    complete: bool = True


def parse(block: bytes, start: int | None = None) -> Tags:
    """Parse the directory at `start`, by default the first, of a TIFF, a BigTIFF or an EXIF block without its prefix.

    Raises:
        ValueError: the block is neither.
    """
    order = {b"II": "<", b"MM": ">"}.get(block[:2], "")
    try:
        version = struct.unpack_from(f"{order}H", block, 2)[0] if order else 0
        if version not in (42, 43):
            raise ValueError("not a TIFF header")
        big = version == 43
        (first,) = struct.unpack_from(order + ("Q" if big else "I"), block, 8 if big else 4)
        directory, complete = _read_directory(block, order, big, first if start is None else start, depth=2)
    except struct.error as error:
        raise ValueError("the first directory is missing") from error
    return Tags(order, directory, complete)


def _read_directory(block: bytes, order: str, big: bool, start: int, depth: int) -> tuple[Directory, bool]:
    """Read one directory; damaged entries are left out, and the second result is then False.

    Values that share their bytes are damaged, too: a small block could hold thousands of copies of a large value.
    """
    head, entry, inline = ("Q", "HHQ", 8) if big else ("H", "HHI", 4)
    (count,) = struct.unpack_from(order + head, block, start)
    start += struct.calcsize(head)
    size = struct.calcsize(f"={entry}") + inline
    directory, complete, unread = {}, start + count * size <= len(block), len(block)
    for place in range(start, min(start + count * size, len(block) - size + 1), size):
        tag, kind, number = struct.unpack_from(order + entry, block, place)
        width, numbers = _TYPES.get(kind, (0, 0))
        length, offset = width * numbers * number, place + size - inline
        if length > inline:
            (offset,) = struct.unpack_from(order + ("Q" if big else "I"), block, offset)
        data = block[offset : offset + length]
        if tag in _SUBDIRECTORIES:
            details, whole = _read_subdirectory(block, order, big, data, depth - 1)
            complete = complete and whole
            if details:
                directory[tag] = details
        elif width and len(data) == length <= unread:
            unread -= length
            directory[tag] = Value(kind, data, offset if length > inline else 0)
        else:
            complete = False
    return directory, complete


def _read_subdirectory(block: bytes, order: str, big: bool, pointer: bytes, depth: int) -> tuple[Directory, bool]:
    """Read the directory at the offset in `pointer`; it is empty if it is damaged or deeper than EXIF allows."""
    form = {4: "I", 8: "Q"}.get(len(pointer))
    if form is None or depth < 0:
        return {}, False
    try:
        return _read_directory(block, order, big, *struct.unpack(order + form, pointer), depth)
    except struct.error:
        return {}, False


def number(value: Value | Directory | None, order: str, default: int) -> int:
    """Return the first number of an integer value, or `default` if it is missing or of another type."""
    form = _FORMATS.get(value.kind) if isinstance(value, Value) else None
    return struct.unpack_from(order + form, value.data)[0] if form else default


def fraction(value: Value | Directory | None, order: str) -> float:
    """Return the first number of a value of type RATIONAL, or 0 if it is missing, infinite or of another type."""
    if not isinstance(value, Value) or value.kind != _RATIONAL:
        return 0.0
    above, below = struct.unpack_from(order + "II", value.data)
    return above / below if below else 0.0


def integers(kind: int, *numbers: int, order: str = "<") -> Value:
    """Make a value of type BYTE, SHORT or LONG."""
    return Value(kind, struct.pack(f"{order}{len(numbers)}{_FORMATS[kind]}", *numbers))


def rational(number: float) -> Value:
    """Make a little-endian value of type RATIONAL."""
    return Value(_RATIONAL, struct.pack("<II", round(number * 1000), 1000))


def little_endian(tags: Tags) -> Directory:
    """Return the directory with all numbers in little-endian order."""
    return tags.directory if tags.order == "<" else _swapped(tags.directory)


def _swapped(directory: Directory) -> Directory:
    result: Directory = {}
    for tag, value in directory.items():
        if not isinstance(value, Value):
            result[tag] = _swapped(value)
            continue
        width, data = _TYPES[value.kind][0], value.data
        words = [data[i : i + width][::-1] for i in range(0, len(data), width)] if width > 1 else [data]
        result[tag] = Value(value.kind, b"".join(words))
    return result


def serialize(directory: Mapping[int, Value | Directory], order: str = "<") -> bytes:
    """Write a directory and its subdirectories as a TIFF without pixels, the content of an EXIF block.

    A maker note stays at its offset, because its own offsets usually count from the start of the block.

    Raises:
        struct.error: the block would exceed 4 GiB.
    """
    details = directory.get(EXIF_DIRECTORY)
    note = details.get(_MAKER_NOTE) if isinstance(details, dict) else None
    body = bytearray(8)
    fixed = {}
    if isinstance(note, Value) and 8 <= note.offset < 65536 and note.offset + len(note.data) < 65000:
        body += bytes(note.offset - len(body)) + note.data
        fixed[note] = note.offset
    first = _append_directory(body, directory, order, fixed)
    body[:8] = {"<": b"II", ">": b"MM"}[order] + struct.pack(f"{order}HI", 42, first)
    return bytes(body)


def _append_directory(body: bytearray, directory: Mapping, order: str, fixed: Mapping[Value, int]) -> int:
    """Append a directory and what it refers to; return its offset."""
    entries = []
    for tag, value in sorted(directory.items()):
        if not isinstance(value, Value):
            value = integers(LONG, _append_directory(body, value, order, fixed), order=order)
        if value.kind > _LARGEST_OF_TIFF:
            continue
        width, numbers = _TYPES[value.kind]
        field = value.data.ljust(4, b"\0")
        if len(value.data) > 4:
            offset = fixed.get(value)
            if offset is None:
                offset = _append(body, value.data)
            field = struct.pack(f"{order}I", offset)
        entries.append(struct.pack(f"{order}HHI", tag, value.kind, len(value.data) // (width * numbers)) + field)
    return _append(body, struct.pack(f"{order}H", len(entries)) + b"".join(entries) + bytes(4))


def _append(body: bytearray, data: bytes) -> int:
    body += bytes(len(body) % 2)  # offsets are even (TIFF 6.0, section 2)
    offset = len(body)
    body += data
    return offset
