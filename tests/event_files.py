"""A reader of TensorBoard's event files that does not need TensorBoard."""

import struct
from pathlib import Path
from typing import Any

from tensorboardX.proto.event_pb2 import Event


def events(folder: Path) -> dict[str, dict[int, Any]]:
    """Read all values in a TensorBoard folder: {tag: {step: value}}. Files have records of length, crc, data, crc."""
    found = {}
    for path in folder.glob("events*"):
        content = path.read_bytes()
        while content:
            (length,) = struct.unpack("<Q", content[:8])
            event = Event.FromString(content[12 : 12 + length])
            for value in event.summary.value:
                found.setdefault(value.tag, {})[event.step] = value
            content = content[16 + length :]
    return found
