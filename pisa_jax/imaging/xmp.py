"""XMP packets: what of them describes an upscaled image."""

import re

# XMP that describes further images or videos inside the source file: gain maps, motion photos.
_CONTAINER = (b"hdrgm:Version", b"Container:Directory", b"GCamera:MicroVideo")


def describes_other_files(packet: bytes) -> bool:
    """Return True if a packet would be wrong in a file that holds one image."""
    return any(name in packet for name in _CONTAINER)


def upright(packet: bytes) -> bytes:
    """Set the orientation, where there is one, to 1."""
    return _replace(packet, b"tiff:Orientation", 1)


def with_size(packet: bytes, height: int, width: int) -> bytes:
    """Replace the image size in a packet that has one."""
    for field, side in ((b"Width", width), (b"Length", height)):
        packet = _replace(packet, b"tiff:Image" + field, side)
    for field, side in ((b"X", width), (b"Y", height)):
        packet = _replace(packet, b"exif:Pixel" + field + b"Dimension", side)
    return packet


def _replace(packet: bytes, name: bytes, number: int) -> bytes:
    """Replace the number of a property, which is an attribute or an element."""
    return re.sub(rb"(" + name + rb"(?:\s*=\s*[\"']|>)\s*)\d+", rb"\g<1>%d" % number, packet)
