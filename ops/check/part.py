"""What a check returns: its part of the report."""

from collections.abc import Sequence
from typing import Any, NamedTuple

SHOWN = 100  # characters of a name from outside

Report = dict[str, Any]


class Part(NamedTuple):
    """What a check found, and what there is to say about it, in sentences."""

    found: Any = None  # as JSON has it
    wrong: Sequence[str] = ()
    incomplete: Sequence[str] = ()
    not_checked: Sequence[str] = ()


def printable(text: str) -> str:
    """Return a text from outside as a terminal can take it."""
    return "".join(character if character.isprintable() else "?" for character in text[:SHOWN])
