"""Finds webhooks and dead letters in a text: a file of them, or a log with other lines in between. Pure."""

import json
import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import Any, NamedTuple

from translate import NotAnObject, Undeliverable, parse

# How a dead letter begins, or a part of one, whatever a log puts in front of it.
START = re.compile(r'\{\s*"(event"|letter"\s*:\s*"[0-9a-f]{32}"\s*,\s*"part")\s*:')
PART = re.compile(
    r'\{\s*"letter"\s*:\s*"([0-9a-f]{32})"\s*,\s*"part"\s*:\s*([0-9]{1,9})\s*,\s*"of"\s*:\s*([0-9]{1,9})\s*,'
    r'\s*"text"\s*:\s*("(?:[^"\\\n]|\\.)*"(?=\s*\})\s*\})?'
)
BETWEEN = re.compile(r"[ \t\r,]*")  # items on the same line
WITHIN = re.compile(r"\s*[,}\]]")  # what follows an object that is within another one
# A line of a container's log on a node of Kubernetes, and whether the next one of its stream continues it (P).
# CRI-O cuts lines of any length, when several are written at once.
ON_A_NODE = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T\S+ (stdout|stderr) ([PF]) ")
OBJECT = re.compile(r'[\s\[]*\{\s*"')  # how one begins, or an array of them; a log's own "[1]" or "{web}" doesn't

# Take an event with a raw control character in a string.
DECODER = json.JSONDecoder(strict=False)

NOT_WHOLE = "a dead letter that is not whole"


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


class Text(str):
    """A text in which JSONDecodeError can't count the lines before each fault: nobody reads that, and it takes long."""

    def count(self, *_: Any) -> int:
        return 0


class Part(NamedTuple):
    """A part of a dead letter that is too long for one line of the log."""

    line: int
    text: str  # as it stood
    letter: str  # its id
    number: int  # counted from 1
    of: int
    content: str | None  # None if the part is not whole
    item: int = 0


def find(text: str) -> tuple[list[Found], int]:
    """Return what is in `text`, in order, and the number of other lines.

    Webhooks and dead letters may be one a line, pretty-printed, or the items of a JSON array. Parts of
    a letter may be anywhere, in any order, and more than once.
    """
    items, others = _items(_uncut(text))
    letters = _put_together(item for item in items if isinstance(item, Part))
    return sorted([*(item for item in items if isinstance(item, Found)), *letters], key=lambda item: item.line), others


def _uncut(text: str) -> str:
    """Return a log with whole lines where a node of Kubernetes has pieces; other pieces become empty lines."""
    lines = text.split("\n")
    begun: dict[str, tuple[int, list[str]]] = {}  # stream -> where its line begins, and its pieces
    for number, line in enumerate(lines):
        if not (piece := ON_A_NODE.match(line)):
            continue
        stream, tag = piece.groups()
        first, pieces = begun.pop(stream, (number, [piece[0]]))
        pieces.append(line[piece.end() :])
        lines[number] = ""
        if tag == "P":
            begun[stream] = first, pieces
        else:
            lines[first] = "".join(pieces)
    for first, pieces in begun.values():  # their ends are missing
        lines[first] = "".join(pieces)
    return "\n".join(lines)


def _items(text: str) -> tuple[list[Found | Part], int]:
    plain, text = text, Text(text)
    found: list[Found | Part] = []
    others, line, position = 0, 1, 0
    empty = True  # so far, the line
    end_of_line = _end_of_line(text, 0)
    while position < len(text):
        items, end = _read(text, position, end_of_line)
        found += [item._replace(line=line) for item in items]
        empty = empty and not items
        line += plain.count("\n", position, end)
        if end > end_of_line:
            end_of_line = _end_of_line(text, end)
        # Behind an item there may be another one; behind JSON of a log's, like "[1] ", only a dead letter.
        if _content(text, end, end_of_line) < end_of_line if items else START.search(text, end, end_of_line):
            position = end
        else:
            others += empty
            empty = True
            line += 1
            position = end_of_line + 1
            end_of_line = _end_of_line(text, position)
    return found, others


def _put_together(parts: Iterable[Part]) -> Iterator[Found]:
    letters: dict[tuple[str, int], list[Part]] = {}
    for part in parts:
        letters.setdefault((part.letter, part.of), []).append(part)
    for (_, of), there in letters.items():
        contents = {part.number: part.content for part in there if part.content is not None and 1 <= part.number <= of}
        whole: list[Found | Part] = []
        if len(contents) == of:
            text = "".join(contents[number] for number in sorted(contents))
            with suppress(ValueError, RecursionError):
                whole = _classify(text, json.loads(text))
        stood = "\n".join(part.text for part in there)
        missing = f"{NOT_WHOLE}: {of - len(contents)} of its {of} parts are missing"
        torn = Found(0, stood, stood.encode("utf-8", "surrogateescape"), missing)
        letter = next((item for item in whole if isinstance(item, Found)), torn)
        yield letter._replace(line=there[0].line)


def _end_of_line(text: str, position: int) -> int:
    return end if (end := text.find("\n", position)) >= 0 else len(text)


def _content(text: str, position: int, end_of_line: int) -> int:
    """Return where in the rest of a line an item may begin."""
    between = BETWEEN.match(text, position, end_of_line)
    return between.end() if between else position


def _read(text: str, position: int, end_of_line: int) -> tuple[list[Found | Part], int]:
    """Return what begins in a line, and where it ends."""
    start = _content(text, position, end_of_line)
    letter = None
    if not text.startswith(("{", "["), start):
        if not (letter := START.search(text, position, end_of_line)):
            return [], end_of_line
        start = letter.start()
    if part := PART.match(text, start, end_of_line):
        return _part(text, part, end_of_line)
    try:
        value, end = DECODER.raw_decode(text, start)
    except (ValueError, RecursionError):
        letter = letter or START.search(text, position, end_of_line)
        if letter and letter.start() > start and not OBJECT.match(text, start, letter.start()):  # a log's prefix
            return _read(text, letter.start(), end_of_line)
        end = _next_letter(text, start + 1, end_of_line)
        return _broken(text[start:end].strip(), bool(letter)), end
    if isinstance(value, list):
        numbered = enumerate(value, 1)
        return [item._replace(item=number) for number, one in numbered for item in _classify(json.dumps(one), one)], end
    return _classify(text[start:end], value), end


def _part(text: str, part: re.Match[str], end_of_line: int) -> tuple[list[Found | Part], int]:
    identity, number, of, content = part.groups()
    end = part.end() if content else _next_letter(text, part.end(), end_of_line)
    whole = json.loads(content.rstrip("} \t\r\n"), strict=False) if content else None
    return [Part(0, text[part.start() : end], identity, int(number), int(of), whole)], end


def _next_letter(text: str, position: int, end_of_line: int) -> int:
    """Return where the next whole letter, or part of one, begins in a line behind one that is torn; else its end."""
    for start in START.finditer(text, position, end_of_line):
        if part := PART.match(text, start.start(), end_of_line):
            whole, end = bool(part[4]), part.end()
        else:
            try:
                value, end = DECODER.raw_decode(text, start.start())
            except (ValueError, RecursionError):
                continue
            whole = {"event", "reason", "at"} <= set(value) and end <= end_of_line
        # Not what an event holds, which its sender chooses.
        if whole and not WITHIN.match(text, end, end_of_line):
            return start.start()
    return end_of_line


def _classify(text: str, value: Any) -> list[Found | Part]:
    if not isinstance(value, dict):
        return []
    if {"event", "reason"} <= set(value):
        event = value["event"]
        # A string: the body couldn't be parsed.
        return [Found(0, text, _bytes(event) if isinstance(event, str) else json.dumps(event).encode())]
    if {"event_type", "metric", "event_id", "data"} & set(value):
        return [Found(0, text, text.encode("utf-8", "surrogateescape"))]
    if {"log", "stream", "time"} <= set(value) and isinstance(value["log"], str):  # a line of Docker's json-file
        return _items(value["log"])[0]
    return []


def _bytes(text: str) -> bytes:
    """Return the body of a letter that is a text, in which surrogates stand for bytes that are not UTF-8."""
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return text.encode("utf-8", "surrogatepass")


def _broken(line: str, letter: bool) -> list[Found | Part]:
    """Return what a line holds that isn't JSON, or nests too deeply to be read."""
    body = line.encode("utf-8", "surrogateescape")
    if letter:
        return [Found(0, line, body, NOT_WHOLE)]
    if not (line.startswith("{") and line.endswith("}")):
        return []
    try:
        parse(body)
    except NotAnObject as error:
        return [Found(0, line, body, str(error))]
    except Undeliverable:
        pass  # the translation will fail on it
    return [Found(0, line, body)]
