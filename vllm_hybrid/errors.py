"""Other programs' errors, and values of any length, as part of a sentence."""

from __future__ import annotations


def one_line(error: BaseException) -> str:
    """What an error says on one line; its type where it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__


def last_line(text: str) -> str:
    """The last line of a program's output that says something; "" without one."""
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")


def abbreviated(text: str) -> str:
    """A text on one line of at most 60 characters."""
    text = " ".join(text.split())
    return text if len(text) <= 60 else f"{text[:57]}..."
