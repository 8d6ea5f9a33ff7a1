"""Image files to arrays and back: decoding, encoding, color management, resizing, contact sheets."""
