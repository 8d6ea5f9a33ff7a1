"""Texts for messages to the user."""


def error_text(error: BaseException) -> str:
    """The message of an exception on one line, or the name of its type where it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def number_text(value: float) -> str:
    """Format a number with all its digits, so that different numbers have different names: "1", "0.5", "0.12345678"."""
    return repr(float(value)).removesuffix(".0")
