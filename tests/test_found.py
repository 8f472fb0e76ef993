"""ops/found.py: what replay and translate find in a file."""

import json
import subprocess
import sys

import pytest
from conftest import ROOT

from ops.found import find
from relay.dead_letters import log_lines

MISSING = TORN = "a dead letter that is not whole"

EVENT = {"event_id": "1", "metric": "opened", "object_type": "email", "data": {"customer_id": "15"}}
OTHER = {"event_id": "2", "event_type": "email_clicked", "data": {"customer_id": "16"}}
INNER = EVENT | {"data": {"customer_id": "15", "variables": {"event": {"metric": "inner"}, "reason": "none"}}}


def letter(event, **more):
    return {"event": event, "reason": "Segment refuses it (400)", "at": "2026-11-23T00:00:00+00:00"} | more


def text(value, **how):
    return json.dumps(value, **how)


def pretty(value):
    return json.dumps(value, indent=2)


JSON_LOG = text({"time": "2026-11-23T00:00:00+00:00", "level": "warning", "message": "answered 503: x", "count": 1})

# A file -> for each item in it: its line, and its event (or what is wrong with it); and the number of other lines.
FILES = {
    "nothing": ("", [], 0),
    "empty lines": ("\n\n", [], 2),
    "a webhook": (text(EVENT), [(1, EVENT)], 0),
    "webhooks, one a line": (f"{text(EVENT)}\n{text(OTHER)}\n", [(1, EVENT), (2, OTHER)], 0),
    "with Windows' line ends": (f"{text(EVENT)}\r\n{text(OTHER)}\r\n", [(1, EVENT), (2, OTHER)], 0),
    "without spaces": (text(EVENT, separators=(",", ":")), [(1, EVENT)], 0),
    "a webhook that is only an id": (text({"event_id": "1"}), [(1, {"event_id": "1"})], 0),
    "a dead letter": (text(letter(EVENT)), [(1, EVENT)], 0),
    "dead letters and webhooks": (f"{text(letter(EVENT))}\n\n{text(OTHER)}", [(1, EVENT), (3, OTHER)], 1),
    "a dead letter with more": (text(letter(EVENT, level="warning", count=1)), [(1, EVENT)], 0),
    "a dead letter behind a log's prefix": (f"2026-11-23 app[web.1]: {text(letter(EVENT))}", [(1, EVENT)], 0),
    "behind a prefix in square brackets": (f"[2026-11-25 web.1] {text(letter(EVENT))}", [(1, EVENT)], 0),
    "behind a number in square brackets": (f"[1] {text(letter(EVENT))}\nend", [(1, EVENT)], 1),
    "behind a time in square brackets": (f"[12345.678] {text(letter(EVENT))}", [(1, EVENT)], 0),
    "behind several": (f"[2026-11-23 12:00:00 +0000] [1] [INFO] {text(letter(EVENT))}", [(1, EVENT)], 0),
    "behind an object of a log's": (f'{{"level": "info"}} {text(letter(EVENT))}', [(1, EVENT)], 0),
    "a webhook behind a number is a log's": (f"[1] {text(EVENT)}", [], 1),
    "behind braces of a log's": (f"{{web}} {text(letter(EVENT))}", [(1, EVENT)], 0),
    "behind braces in brackets": (f"[web {{1}}] {text(letter(EVENT))}", [(1, EVENT)], 0),
    "not whole behind braces": (f"{{web}} {text(letter(EVENT))[:-30]}", [(1, "a dead letter that is not whole")], 0),
    "not whole behind a number": (f"[1] {text(letter(EVENT))[:-30]}", [(1, "a dead letter that is not whole")], 0),
    "an array that is not whole": (
        f"[{text(letter(EVENT))}, {text(letter(OTHER))[:-30]}",
        [(1, EVENT), (1, "a dead letter that is not whole")],
        0,
    ),
    "an object within a webhook that is not whole": (text(INNER)[:-2], [(1, "a dead letter that is not whole")], 0),
    "the same in an array": (f"[{text(INNER)[:-2]}", [(1, "a dead letter that is not whole")], 0),
    "and before a log's suffix": (f"app: {text(letter(EVENT))} (end)", [(1, EVENT)], 0),
    "in a log of text": (f"[INFO] Booting\n{text(letter(EVENT))}\n[INFO] Bye\n", [(2, EVENT)], 2),
    "in a log of JSON": (f"{JSON_LOG}\n{text(letter(EVENT))}\n{JSON_LOG}\n", [(2, EVENT)], 2),
    "a webhook behind a prefix is a log's": (f"POST {text(EVENT)}", [], 1),
    "pretty-printed": (pretty(EVENT), [(1, EVENT)], 0),
    "pretty-printed, one after the other": (
        f"{pretty(EVENT)}\n{pretty(OTHER)}\n",
        [(1, EVENT), (1 + len(pretty(EVENT).splitlines()), OTHER)],
        0,
    ),
    "a pretty-printed dead letter": (pretty(letter(EVENT)), [(1, EVENT)], 0),
    "an array": (text([EVENT, letter(OTHER)]), [(1, EVENT), (1, OTHER)], 0),
    "a pretty-printed array": (f"\n{pretty([EVENT, OTHER])}\n", [(2, EVENT), (2, OTHER)], 1),
    "a line after an array": (f"{pretty([EVENT])}\n{text(OTHER)}", [(1, EVENT), (11, OTHER)], 0),
    "an empty array": ("[]", [], 1),
    "an array of something else": ('[1, "x", null, {"a": 1}]', [], 1),
    "an object of something else": ('{"a": 1}', [], 1),
    "an object within a webhook whose first key is event": (text(INNER), [(1, INNER)], 0),
    "the same, pretty-printed": (pretty(INNER), [(1, INNER)], 0),
    "a webhook with a key named event": (text({"event": "x"} | EVENT), [(1, {"event": "x"} | EVENT)], 0),
    "a letter that is not whole": (text(letter(EVENT))[:-30], [(1, "a dead letter that is not whole")], 0),
    "the same behind a prefix": (f"app: {text(letter(EVENT))[:-30]}", [(1, "a dead letter that is not whole")], 0),
    "the next line belongs to something else": (
        f"{text(letter(EVENT))[:-30]}\n{text(OTHER)}",
        [(1, "a dead letter that is not whole"), (2, OTHER)],
        0,
    ),
    "the next letter on the same line": (
        f"{text(letter(INNER))[:-60]}{text(letter(OTHER))}\n{text(EVENT)}",
        [(1, "a dead letter that is not whole"), (1, OTHER), (2, EVENT)],
        0,
    ),
    "the same behind prefixes": (
        f"web.1: {text(letter(EVENT))[:-30]}web.2: {text(letter(OTHER))}",
        [(1, "a dead letter that is not whole"), (1, OTHER)],
        0,
    ),
    "what looks like a letter within one that is not whole": (
        text(letter(EVENT | {"data": {"variables": letter(OTHER), "more": 1}}))[:-30],
        [(1, "a dead letter that is not whole")],
        0,
    ),
    "a raw control character": ('{"metric": "a\tb"}', [(1, {"metric": "a\tb"})], 0),
    "a line of Docker's json-file": (
        text({"log": text(letter(EVENT)) + "\n", "stream": "stderr", "time": "2026-11-23T00:00:00Z"}),
        [(1, EVENT)],
        0,
    ),
    "another log's text is not looked into": (text({"message": text(letter(EVENT))}), [], 1),
    "a broken webhook": ("{broken}\n" + text(OTHER), [(1, "the body is not JSON"), (2, OTHER)], 0),
}


@pytest.mark.parametrize(("file", "expected", "others"), FILES.values(), ids=FILES.keys())
def test_find(file, expected, others):
    found, other_lines = find(file)
    events = [item.problem.partition(":")[0] or json.loads(item.body, strict=False) for item in found]
    assert list(zip((item.line for item in found), events, strict=True)) == expected
    assert other_lines == others


def test_a_webhook_is_found_byte_for_byte():
    """Without an event_id the spelling of an integer or a float could be another messageId."""
    body = '{"metric":"m",  "data": {"x": 1.50e1, "y": "\\u00e9", "z": ' + "1" * 5_000 + "}}"
    (item,), _ = find(body + "\n")
    assert (item.body, item.text) == (body.encode(), body)


def test_what_could_not_be_parsed_is_found_as_it_came():
    body = '{"metric": "m", "data": ' + "[" * 100_000 + "]" * 100_000 + "}"
    (item,), _ = find(text(letter(body)))
    assert item.body == body.encode()
    assert item.problem == ""
    (item,), _ = find(body)
    assert (item.body, item.problem) == (body.encode(), "")


@pytest.mark.parametrize("half", [chr(0xD800), chr(0xDCFF)], ids=ascii)
def test_half_a_character_is_kept(half):
    event = EVENT | {"subject": half}
    (item,), _ = find(text(letter(event)))
    assert json.loads(item.body) == event


STOOD = {
    "a webhook": text(EVENT, separators=(",", ":")),
    "a letter": text(letter(EVENT)),
    "pretty-printed": pretty(letter(EVENT)),
    "broken": "{broken}",
    "not whole": text(letter(EVENT))[:-30],
}


@pytest.mark.parametrize("stood", STOOD.values(), ids=STOOD.keys())
def test_an_item_is_kept_as_it_stood_ready_to_be_found_again(stood):
    (item,), _ = find(f"before\n{stood}\nafter\n")
    assert item.text == stood
    (again,), _ = find(item.text + "\n")
    assert (again.body, again.problem) == (item.body, item.problem)


def test_an_item_of_an_array_can_be_found_again_by_itself():
    found, _ = find(pretty([letter(EVENT), OTHER]))
    again, _ = find("".join(item.text + "\n" for item in found))
    assert [item.body for item in again] == [item.body for item in found]


# Parts. ------------------------------------------------------------------------------------------

LONG = EVENT | {"data": {"customer_id": "15", "subject": 'x"\\{' * 1_200}}
LOOKALIKE = {"letter": "0" * 32, "part": 1, "of": 1, "text": text(letter(OTHER))}
LONGER = OTHER | {"data": {"customer_id": "16", "variables": LOOKALIKE, "subject": text(LOOKALIKE) + "y" * 5_000}}


def parts(event, **more):
    return [line.decode().rstrip("\n") for line in log_lines(text(letter(event, **more)), 4096)]


def on_a_node(lines, size):
    """Return lines as a node of Kubernetes keeps them, in pieces of `size` characters."""
    pieces = [[line[start : start + size] for start in range(0, len(line), size)] for line in lines]
    tagged = [(tag, piece) for line in pieces for tag, piece in zip("P" * (len(line) - 1) + "F", line, strict=True)]
    return [f"2026-11-25T00:00:00.123456789+00:00 stderr {tag} {piece}" for tag, piece in tagged]


A, B = parts(LONG), parts(LONGER)
LATER = parts(LONG, at="2026-11-24T00:00:00+00:00")
SEVERAL = {  # lines -> events, or what is wrong with them
    "one after the other": ([*A, *B], [LONG, LONGER]),
    "of two workers": ([part for pair in zip(A, B, strict=False) for part in pair] + A[len(B) :], [LONG, LONGER]),
    "out of order": (A[::-1], [LONG]),
    "twice": ([*A, *A], [LONG]),
    "behind prefixes": (
        [f"2026-11-25T00:00:00+00:00 app[web.{number}]: {part}" for number, part in enumerate(A)],
        [LONG],
    ),
    "with a log's lines between them": ([line for part in A for line in (part, "[INFO] Booting", JSON_LOG)], [LONG]),
    "with letters between them": ([A[0], text(letter(EVENT)), *A[1:]], [LONG, EVENT]),
    "with Windows' line ends": ([f"{part}\r" for part in A], [LONG]),
    "without spaces": ([text(json.loads(part), separators=(",", ":")) for part in B], [LONGER]),
    "in Docker's json-file": ([text({"log": part + "\n", "stream": "stderr", "time": ""}) for part in A], [LONG]),
    "on a node of Kubernetes": (on_a_node(A, 5_000), [LONG]),
    "in pieces there": (on_a_node([*A, *B], 700), [LONG, LONGER]),
    "in pieces, with others of another stream between them": (
        [line for piece in on_a_node(A, 1_500) for line in (piece, "2026-11-25T00:00:00.1Z stdout P x")],
        [LONG],
    ),
    "a piece is missing": (on_a_node(A, 700)[1:], [MISSING]),
    "one is missing": (A[1:], [MISSING]),
    "one is torn": ([A[0][:500], *A[1:]], [MISSING]),
    "one is torn, and the next letter stands behind it": ([*A[1:], A[0][:500] + text(letter(EVENT))], [MISSING, EVENT]),
    "one is torn, and its next part stands behind it": ([A[0], A[1][:500] + A[1], *A[2:]], [LONG]),
    "a torn letter, and a part behind it": ([text(letter(EVENT))[:-30] + A[0], *A[1:]], [TORN, LONG]),
    "one attempt left out what the next one has": ([*A[:-1], *LATER], [LONG]),
    "only a part's beginning": ([A[0][:100]], [MISSING]),
    "a part number below one": ([A[0].replace('"part": 1,', '"part": 0,'), *A[1:]], [MISSING]),
    "parts that make up no dead letter": ([text(LOOKALIKE | {"text": "{}"})], [MISSING]),
}


@pytest.mark.parametrize(("lines", "expected"), SEVERAL.values(), ids=SEVERAL.keys())
def test_parts_are_put_together(lines, expected):
    found, _ = find("\n".join(lines) + "\n")
    assert [item.problem.partition(":")[0] or json.loads(item.body) for item in found] == expected


def test_what_is_left_of_a_letter_in_parts_is_kept_and_found_again():
    (item,), _ = find("\n".join(["app: " + part for part in A[1:]]))
    assert (item.line, item.problem) == (1, f"{MISSING}: 1 of its {len(A)} parts are missing")
    (whole,), _ = find(f"{item.text}\n{A[0]}\n")
    assert json.loads(whole.body) == LONG


def test_any_cut_in_a_log_takes_no_other_letter_with_it():
    log = "\n".join([*A, text(letter(EVENT)), *B])
    for cut in range(0, len(log), 41):
        for end in ("", "\n"):
            found, _ = find(log[:cut] + end + text(letter(OTHER)) + "\n")
            bodies = [json.loads(item.body) for item in found if not item.problem]
            assert bodies.count(OTHER) == 1, cut
            assert all(body in (LONG, EVENT, OTHER, LONGER) for body in bodies)


ON_ONE_LINE = {
    "a blank between them": f"{text(EVENT)} {text(OTHER)}\n",
    "nothing between them": f"{text(EVENT)}{text(OTHER)}\n",
    "a comma between them": f"{text(EVENT)}, {text(OTHER)}\n",
    "a comma between letters": f"{text(letter(EVENT))},{text(letter(OTHER))},\n",
    "files without a line break at their end": f"{pretty(EVENT)}{pretty(OTHER)}\n",
    "letters": f"{text(letter(EVENT))}{text(letter(OTHER))}\n",
}


@pytest.mark.parametrize("file", ON_ONE_LINE.values(), ids=ON_ONE_LINE.keys())
def test_two_on_one_line_are_both_found(file):
    found, _ = find(file)
    assert [json.loads(item.body) for item in found] == [EVENT, OTHER]


LARGE = {  # a file, of which quadratic work takes a quarter of an hour instead of seconds -> how much is in it
    "a log's lines in square brackets": ("[2026-11-25 23:00:00 +0000] [7] [INFO] answered 503: x\n" * 400_000, 0),
    "webhooks on one line": (text(EVENT) * 100_000, 100_000),
    "letters on one line": (text(letter(EVENT)) * 100_000, 100_000),
    "torn letters on one line": (text(letter(EVENT))[:-30] * 50_000, 1),
    "torn parts": (f"{A[0][:1500]}\n" * 20_000, 1),
}


@pytest.mark.parametrize(("file", "number"), LARGE.values(), ids=LARGE.keys())
def test_the_work_is_in_proportion_to_the_file(file, number):
    count = "import sys; from ops.found import find; print(len(find(sys.stdin.read())[0]))"
    command = [sys.executable, "-c", count]
    done = subprocess.run(command, input=file, cwd=ROOT, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout == f"{number}\n"


PLACES = {  # an item's file -> how it is named
    "a line": (f"\n{text(EVENT)}", ["line 2"]),
    "an array": (text([1, EVENT, letter(OTHER)]), ["line 1, item 2", "line 1, item 3"]),
    "a pretty-printed array": (f"\n{pretty([EVENT, OTHER])}", ["line 2, item 1", "line 2, item 2"]),
    "two on one line": (f"{text(EVENT)} {text(OTHER)}", ["line 1", "line 1"]),
}


@pytest.mark.parametrize(("file", "places"), PLACES.values(), ids=PLACES.keys())
def test_the_place_of_an_item(file, places):
    found, _ = find(file)
    assert [item.place for item in found] == places
