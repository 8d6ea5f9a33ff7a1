"""Texts for messages to the user."""


def error_text(error: BaseException) -> str:
    """The message of an exception on one line, or the name of its type where it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def excerpt(text: object, limit: int = 120) -> str:
    """Return text that comes from a file for a message: on one line, control characters as escapes, the end cut off.

    >>> excerpt("pix\\n" + 200 * "x", 8)
    'pix\\\\nxxxx... (204 characters)'
    """
    text = str(text)
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[:limit])
    return f"{shown}... ({len(text)} characters)" if len(text) > limit else shown


def number_text(value: float) -> str:
    """Format a number with all its digits, so that different numbers have different names: "1", "0.5", "0.12345678"."""
    return repr(float(value)).removesuffix(".0")
