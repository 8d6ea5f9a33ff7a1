"""Image files and arrays: decoding, encoding, color management, resizing, value ranges, contact sheets."""
