"""Mutations of the bytes of a file: flipped bits, cuts, exchanged chunks, lengths at their limits, spliced halves.

The chunks of a file are the units of its format where the format is known (PNG chunks, JPEG segments, boxes of AVIF and
JPEG 2000, RIFF chunks, TIFF directory entries, zip headers), and blocks of random size elsewhere. All functions draw
from the given generator alone, so a seed gives the same files everywhere.
"""

import random
import re
import struct
import zlib
from collections.abc import Callable, Sequence

Chunks = list[tuple[int, int]]  # (start, end) of each

PNG = b"\x89PNG\r\n\x1a\n"
# Boxes of ISO files that contain boxes -> bytes between their header and the first of these.
CONTAINERS = {b"meta": 4, b"iprp": 0, b"ipco": 0, b"jp2h": 0, b"moov": 0, b"trak": 0, b"iref": 4, b"iinf": 6}
# Values of a field of n bits that are at a limit, or one step beyond it.
LIMITS: tuple[Callable[[int], int], ...] = (
    lambda bits: 0,
    lambda bits: 1,
    lambda bits: 2**bits - 1,
    lambda bits: 2**bits - 2,
    lambda bits: 2 ** (bits - 1),
    lambda bits: 2 ** (bits - 1) - 1,
    lambda bits: 2 ** (bits // 2),
    lambda bits: 65500 % 2**bits,
)


def mutate(data: bytes, others: Sequence[bytes], rng: random.Random) -> tuple[bytes, list[str]]:
    """Apply one to three mutations; returns the new content and their names. `others` are partners of a splice."""
    names = []
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        mutation = rng.choice(MUTATIONS)
        data = splice(data, rng.choice(others), rng) if mutation is splice else mutation(data, rng)
        names.append(mutation.__name__)
    if data.startswith(PNG) and rng.random() < 0.5:  # else most damage ends at the checksum
        data = repair_checksums(data)
        names.append("repair_checksums")
    return data, names


def flip_bits(data: bytes, rng: random.Random) -> bytes:
    """Flip 1 to 16 bits: anywhere, or in the first 256 bytes, where headers are."""
    changed, end = bytearray(data), rng.choice((len(data), 256))
    for _ in range(rng.randint(1, 16) if data else 0):
        changed[rng.randrange(min(end, len(data)))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def truncate(data: bytes, rng: random.Random) -> bytes:
    """Cut off the end."""
    return data[: rng.randrange(len(data))] if data else data


def remove(data: bytes, rng: random.Random) -> bytes:
    """Remove a chunk."""
    start, end = rng.choice(split(data, rng))
    return data[:start] + data[end:]


def repeat(data: bytes, rng: random.Random) -> bytes:
    """Repeat a chunk up to 50 times, behind itself."""
    start, end = rng.choice(split(data, rng))
    return data[:end] + data[start:end] * min(rng.choice((1, 2, 50)), 2**20 // max(end - start, 1)) + data[end:]


def swap(data: bytes, rng: random.Random) -> bytes:
    """Exchange two chunks."""
    (a, b), (c, d) = sorted((rng.choice(split(data, rng)), rng.choice(split(data, rng))))
    return data if b > c else data[:a] + data[c:d] + data[b:c] + data[a:b] + data[d:]


def noise(data: bytes, rng: random.Random) -> bytes:
    """Insert random bytes, or replace as many."""
    at, inserted = rng.randrange(len(data) + 1), rng.randbytes(rng.randint(1, 64))
    return data[:at] + inserted + data[at + rng.choice((0, len(inserted))) :]


def extreme_length(data: bytes, rng: random.Random) -> bytes:
    """Set a field of 1, 2, 4 or 8 bytes to a limit: near the start of a chunk, or in the first 256 bytes."""
    start = rng.choice(split(data, rng))[0] + rng.randrange(16) if rng.random() < 0.7 else rng.randrange(256)
    size = rng.choice((1, 2, 4, 4, 8))
    field = rng.choice(LIMITS)(8 * size).to_bytes(size, rng.choice(("big", "little")))
    return data[:start] + field + data[start + size :]


def extreme_number(data: bytes, rng: random.Random) -> bytes:
    """Replace a decimal number in the first 256 bytes, such as a size in a PPM header."""
    found = list(re.finditer(rb"\d+", data[:256]))
    if not found:
        return extreme_length(data, rng)
    match = rng.choice(found)
    number = rng.choice((b"0", b"-1", b"1", b"65536", b"2147483648", b"9" * 30, b"1e9", b"nan", b""))
    return data[: match.start()] + number + data[match.end() :]


def splice(data: bytes, other: bytes, rng: random.Random) -> bytes:
    """Join the first part of one file and the last part of another; in the middle of both, or at random places."""
    cut = rng.choice((0.5, rng.random()))
    return data[: round(cut * len(data))] + other[round(rng.choice((cut, rng.random())) * len(other)) :]


MUTATIONS = (flip_bits, flip_bits, truncate, remove, repeat, swap, noise, *[extreme_length] * 4, extreme_number, splice)


def repair_checksums(data: bytes) -> bytes:
    """Recompute the checksum of every PNG chunk."""
    parts, end = [data[:8]], 8
    for start, end in png_chunks(data):
        body = data[start + 4 : end - 4]
        parts += [data[start : start + 4], body, struct.pack(">I", zlib.crc32(body))]
    return b"".join([*parts, data[end:]])


def split(data: bytes, rng: random.Random) -> Chunks:
    """Return the chunks of a file; at least one, which may be empty."""
    chunks = next((function(data) for start, function in FORMATS if re.match(start, data, re.DOTALL)), [])
    size = rng.choice((4, 16, 64, 256))
    return chunks or [(start, min(start + size, len(data))) for start in range(0, len(data), size)] or [(0, 0)]


def png_chunks(data: bytes) -> Chunks:
    """Split a PNG after its signature."""
    chunks, start = [], 8
    while start + 12 <= len(data):
        end = start + 12 + int.from_bytes(data[start : start + 4], "big")
        if end > len(data):
            break
        chunks.append((start, end))
        start = end
    return chunks


def riff_chunks(data: bytes) -> Chunks:
    """Split a WebP after its header."""
    chunks, start = [], 12
    while start + 8 <= len(data):
        size = int.from_bytes(data[start + 4 : start + 8], "little")
        end = min(start + 8 + size + size % 2, len(data))
        chunks.append((start, end))
        start = end
    return chunks


def marker_segments(data: bytes) -> Chunks:
    """Split a JPEG or a JPEG 2000 codestream after its first marker; the entropy-coded data are one segment."""
    chunks, start = [], 2
    while start + 4 <= len(data) and data[start] == 0xFF and data[start + 1] not in (0x93, 0xD9):
        end = min(start + 2 + int.from_bytes(data[start + 2 : start + 4], "big"), len(data))
        chunks.append((start, end))
        start = end
    return [*chunks, (start, len(data))] if start < len(data) else chunks


def boxes(data: bytes, start: int = 0, end: int | None = None) -> Chunks:
    """List the boxes of an ISO file (AVIF, HEIC, JPEG 2000), those that contain others before their content."""
    chunks, end = [], len(data) if end is None else end
    while start + 8 <= end:
        size, kind = int.from_bytes(data[start : start + 4], "big"), data[start + 4 : start + 8]
        stop = start + size if 8 <= size <= end - start else end
        chunks.append((start, stop))
        if kind in CONTAINERS:
            chunks += boxes(data, start + 8 + CONTAINERS[kind], stop)
        start = stop
    return chunks


def directory_entries(data: bytes) -> Chunks:
    """List the entries of the directories of a TIFF, at most 8 directories."""
    order, chunks = "<" if data[:1] == b"I" else ">", []
    big = struct.unpack_from(f"{order}H", data, 2)[0] == 43
    count_format, offset_format, entry = ("Q", "Q", 20) if big else ("H", "I", 12)
    at = 8 if big else 4
    for _ in range(8):
        try:
            (start,) = struct.unpack_from(order + offset_format, data, at)
            (count,) = struct.unpack_from(order + count_format, data, start)
        except (struct.error, OverflowError):
            break
        first, at = start + struct.calcsize(count_format), start + struct.calcsize(count_format) + count * entry
        if not count or at > len(data):
            break
        chunks += [(position, position + entry) for position in range(first, at, entry)]
    return chunks


def icon_entries(data: bytes) -> Chunks:
    """List the directory entries of an ICO, and its images."""
    count = min(int.from_bytes(data[4:6], "little"), (len(data) - 6) // 16)
    chunks = [(6 + 16 * index, 22 + 16 * index) for index in range(count)]
    return [*chunks, (6 + 16 * count, len(data))]


def zip_headers(data: bytes) -> Chunks:
    """Split a zip archive at its headers."""
    starts = [match.start() for match in re.finditer(rb"PK(\x01\x02|\x03\x04|\x05\x06|\x06\x06|\x06\x07)", data)]
    return list(zip(starts, [*starts[1:], len(data)], strict=True))


FORMATS: tuple[tuple[bytes, Callable[[bytes], Chunks]], ...] = (
    (re.escape(PNG), png_chunks),
    (rb"RIFF....WEBP", riff_chunks),
    (rb"\xff\xd8\xff|\xff\x4f\xff", marker_segments),
    (rb"....(ftyp|jP  )", boxes),
    (rb"II[*+]\0|MM\0[*+]", directory_entries),
    (rb"\x00\x00\x01\x00..", icon_entries),
    (rb"PK\x03\x04", zip_headers),
)
