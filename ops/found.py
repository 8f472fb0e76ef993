"""Finds webhooks and dead letters in a text: a file of them, or a log with other lines in between. Pure."""

import json
import re
from typing import Any, NamedTuple

from translate import NotAnObject, Undeliverable, parse

LETTER = re.compile(r'\{\s*"event"\s*:')  # how a dead letter begins, whatever a log puts in front of it
BETWEEN = " \t\r,"  # items on the same line


class Found(NamedTuple):
    """A webhook or dead letter, or what is left of one."""

    line: int  # where it begins, counted from 1
    text: str  # as it stood
    body: bytes  # of the webhook
    problem: str = ""  # why there is none
    item: int = 0  # of an array, counted from 1

    @property
    def place(self) -> str:
        return f"line {self.line}, item {self.item}" if self.item else f"line {self.line}"


def find(text: str) -> tuple[list[Found], int]:
    """Return what is in `text`, in order, and the number of other lines.

    Webhooks and dead letters may be one a line, pretty-printed, or the items of a JSON array.
    """
    found: list[Found] = []
    others, line, position = 0, 1, 0
    empty = True  # so far, the line
    while position < len(text):
        items, end = _read(text, position, _end_of_line(text, position))
        found += [item._replace(line=line) for item in items]
        empty = empty and not items
        line += text.count("\n", position, end)
        end_of_line = _end_of_line(text, end)
        # Behind an item there may be another one; behind JSON of a log's, like "[1] ", only a dead letter.
        if (items and text[end:end_of_line].strip(BETWEEN)) or LETTER.search(text, end, end_of_line):
            position = end
        else:
            others += empty
            empty = True
            line += 1
            position = end_of_line + 1
    return found, others


def _end_of_line(text: str, position: int) -> int:
    return end if (end := text.find("\n", position)) >= 0 else len(text)


def _read(text: str, position: int, end_of_line: int) -> tuple[list[Found], int]:
    """Return what begins in a line, and where it ends."""
    line = text[position:end_of_line].strip().lstrip(BETWEEN)
    letter = LETTER.search(text, position, end_of_line)
    if line.startswith(("{", "[")):
        start = text.index(line[0], position)
    elif letter:
        start = letter.start()
    else:
        return [], end_of_line
    try:
        value, end = json.JSONDecoder().raw_decode(text, start)
    except (ValueError, RecursionError):
        if letter and text[start] == "[" and "{" not in text[start : letter.start()]:  # a log's prefix
            return _read(text, letter.start(), end_of_line)
        return _broken(line, bool(letter)), end_of_line
    if isinstance(value, list):
        numbered = enumerate(value, 1)
        return [item._replace(item=number) for number, one in numbered for item in _classify(json.dumps(one), one)], end
    return _classify(text[start:end], value), end


def _classify(text: str, value: Any) -> list[Found]:
    if isinstance(value, dict) and {"event", "reason"} <= set(value):
        event = value["event"]
        text_of_event = event if isinstance(event, str) else json.dumps(event)  # a text is what couldn't be parsed
        return [Found(0, text, text_of_event.encode("utf-8", "surrogatepass"))]
    if isinstance(value, dict) and {"event_type", "metric", "event_id", "data"} & set(value):
        return [Found(0, text, text.encode("utf-8", "surrogateescape"))]
    return []


def _broken(line: str, letter: bool) -> list[Found]:
    """Return what a line holds that isn't JSON, or nests too deeply to be read."""
    body = line.encode("utf-8", "surrogateescape")
    if letter:
        return [Found(0, line, body, "a dead letter that is not whole")]
    if not (line.startswith("{") and line.endswith("}")):
        return []
    try:
        parse(body)
    except NotAnObject as error:
        return [Found(0, line, body, str(error))]
    except Undeliverable:
        pass  # as whoever translates it will find out
    return [Found(0, line, body)]
