"""Texts for messages to the user."""


def error_text(error: BaseException) -> str:
    """The message of an exception on one line, or the name of its type where it has none."""
    return " ".join(str(error).split()) or type(error).__name__
