"""The log: a line for every kind of answer that is not 200, each at most every ten seconds, as text or as JSON."""

import json
import logging
import os
import re
import select
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime

import pytest
from conftest import SIGNING_KEY, WRITE_KEY, InProcess, Relay, environment, make_event, sign, until
from fake_segment import FakeSegment

from server import log as logs
from server.log import REPEAT_AFTER, Json, Repeats


@pytest.fixture
def clock(monkeypatch):
    """Timers go off when told to: clock() lets ten seconds pass, and returns how many did."""
    timers = []

    class Timer:
        daemon = False

        def __init__(self, seconds, action, args):
            self.seconds, self.action, self.args = seconds, action, args

        def start(self):
            assert self.daemon  # or it would hold up the end of the process
            timers.append(self)

    def pass_time():
        due, timers[:] = timers[:], []
        for timer in due:
            assert timer.seconds == REPEAT_AFTER == 10
            timer.action(*timer.args)
        return len(due)

    monkeypatch.setattr(logs, "Timer", Timer)
    return pass_time


@pytest.fixture
def lines(caplog):
    """The lines that were logged: (level, message, reason, count)."""
    caplog.set_level(logging.INFO, "relay")
    return lambda: [(record.levelname, record.message, record.reason, record.count) for record in caplog.records]


# One line a reason. ------------------------------------------------------------------------------

DOWN = ("retried", "segment_500")


def log_down(repeats):
    repeats.log(logging.WARNING, "answered 503: Segment answered 500", *DOWN)


def test_a_reason_is_logged_at_once(clock, lines):
    log_down(Repeats(logging.getLogger("relay")))
    assert lines() == [("WARNING", "answered 503: Segment answered 500", "segment_500", 1)]


def test_an_outage_is_a_line_every_ten_seconds_with_the_number_of_times(clock, lines):
    repeats = Repeats(logging.getLogger("relay"))
    for number in (24_294, 3, 1, 0, 2):
        for _ in range(number):
            log_down(repeats)
        clock()
    words = "answered 503: Segment answered 500"
    assert [(message, count) for _, message, _, count in lines()] == [
        (words, 1),
        (f"{words} (24293 times in 10 s)", 24_293),
        (f"{words} (3 times in 10 s)", 3),
        (words, 1),
        (words, 1),  # after ten seconds without one, at once again
        (words, 1),
    ]


def test_reasons_do_not_hide_each_other(clock, lines):
    repeats = Repeats(logging.getLogger("relay"))
    for _ in range(3):
        log_down(repeats)
        repeats.log(logging.WARNING, "answered 503: another", "retried", "timeout")
        repeats.log(logging.WARNING, "answered 422: another", "rejected", "timeout")
    assert [message for _, message, _, _ in lines()] == [
        "answered 503: Segment answered 500",
        "answered 503: another",
        "answered 422: another",
    ]


def test_every_words_of_a_reason_have_their_own_number(clock, lines):
    repeats = Repeats(logging.getLogger("relay"))
    for status in (400, 413, 400, 413, 413):
        repeats.log(logging.WARNING, f"Segment refuses it ({status})", "dead_lettered", "segment_rejects")
    clock()
    assert [(message, count) for _, message, _, count in lines()] == [
        ("Segment refuses it (400)", 1),
        ("Segment refuses it (413) (3 times in 10 s)", 3),
        ("Segment refuses it (400)", 1),
    ]


def test_the_words_of_a_reason_are_bounded(clock, lines):
    repeats = Repeats(logging.getLogger("relay"))
    for number in range(1000):
        repeats.log(logging.WARNING, f"at character {number}", "rejected", "not_json")
    clock()
    assert sum(count for *_, count in lines()) == 1000
    assert lines()[-1][1:] == ("rejected, in other words (989 times in 10 s)", "not_json", 989)


def test_what_is_over_is_forgotten(clock):
    repeats = Repeats(logging.getLogger("relay"))
    for number in range(1000):
        repeats.log(logging.WARNING, "x", "retried", f"code_{number}")
    assert [clock(), clock()] == [1000, 0]


# Every kind of answer. ---------------------------------------------------------------------------

BODY = json.dumps(make_event("secret", data={"customer_id": "secret", "subject": "secret"})).encode()
LINES = {  # what comes, what Segment does -> the line, and the code of its reason
    "unsigned": (
        b"{}",
        {},
        None,
        "answered 422: the X-CIO-Timestamp and X-CIO-Signature headers are required",
        "missing",
    ),
    "unauthorized, another key": (
        *(BODY, sign(BODY, key="another"), None),
        *("answered 422: no configured key made this signature", "mismatch"),
    ),
    "unauthorized, too old": (
        *(BODY, sign(BODY, "1585250199"), None),
        *("answered 422: X-CIO-Timestamp is more than eight days away from now", "expired"),
    ),
    "unauthorized, no time": (
        *(BODY, sign(BODY, "secret"), None),
        *("answered 422: X-CIO-Timestamp is not a number of seconds", "bad_timestamp"),
    ),
    "202, not JSON": (
        *(b"secret", None, None),
        *("answered 202: the body is not JSON: Expecting value at character 0", "not_json"),
    ),
    "202, no object": (b'["secret"]', None, None, "answered 202: the body is not a JSON object", "not_object"),
    "413": (
        *(b"x" * (8 * 1024 * 1024 + 1), None, None),
        *("answered 413: the body is larger than 8,388,608 bytes", "too_large"),
    ),
    "202": (
        *(b'{"metric": 5, "secret": 1}', None, None),
        *("answered 202: it has no name: neither event_type nor metric is a text", "no_name"),
    ),
    "202, Segment refuses it": (BODY, None, "400", "answered 202: Segment refuses it (400)", "segment_rejects"),
    "503": (BODY, None, "500", "answered 503: Segment answered 500", "segment_500"),
    "503, a limit": (BODY, None, "429", "answered 503: Segment is limiting the rate", "rate_limited"),
    "503, the key": (
        *(BODY, None, "401"),
        *("answered 503: Segment refuses the write key (401): check SEGMENT_WRITE_KEY", "write_key"),
    ),
}


@pytest.mark.usefixtures("clock")
@pytest.mark.parametrize(("body", "headers", "fault", "words", "code"), LINES.values(), ids=LINES.keys())
def test_every_answer_that_is_not_200_has_a_line(client, segment, lines, body, headers, fault, words, code):
    segment.fault = fault
    for _ in range(3):
        client.post(body, headers)
    assert lines() == [("WARNING", words, code, 1)]


@pytest.mark.usefixtures("clock")
def test_a_200_has_no_line(client, lines):
    assert client.post(make_event("a")).status_code == 200
    assert InProcess(DRY_RUN="force").post(make_event("a")).status_code == 200
    assert lines() == []


ELSEWHERE = {  # a request that no route takes -> the line, and the code of its reason
    "another path": ("POST", "/webhooks/secret?secret=1", "answered 404: not found", "not_found"),
    "another page": ("GET", "/secret", "answered 404: not found", "not_found"),
    "another method": ("GET", "/webhook", "answered 405: method not allowed", "method"),
    "a webhook to the page": ("POST", "/", "answered 405: method not allowed", "method"),
}


@pytest.mark.usefixtures("clock", "always_fresh")
@pytest.mark.parametrize(("method", "path", "words", "code"), ELSEWHERE.values(), ids=ELSEWHERE.keys())
def test_a_webhook_that_goes_elsewhere_has_a_line(client, lines, method, path, words, code):
    """Nothing else would say that Customer.io has a wrong address."""
    for _ in range(3):
        client.request(method, path, BODY, sign(BODY))
    assert lines() == [("WARNING", words, code, 1)]
    assert not re.search(r"^relay_webhooks_total\{.*[1-9]$", client.get("/metrics").text, re.MULTILINE)


@pytest.mark.usefixtures("clock")
def test_an_error_of_ours_is_logged_as_one_once_in_ten_seconds(client, lines, monkeypatch):
    def fails(event, **_):
        raise KeyError(event["data"]["subject"])

    monkeypatch.setattr("app.translate", fails)
    for _ in range(3):
        assert client.post(BODY).status_code == 503
    ((level, message, code, count),) = lines()
    assert (level, code, count) == ("ERROR", "internal", 1)
    assert "KeyError" in message
    assert "in fails" in message
    assert "secret" not in message


# JSON. -------------------------------------------------------------------------------------------


def formatted(message, *args, level=logging.WARNING, error=None, **extra):
    record = logging.getLogger("relay").makeRecord("relay", level, "f.py", 1, message, args, error, extra=extra)
    line = Json().format(record)
    assert "\n" not in line
    return json.loads(line)


def test_a_line_of_json():
    line = formatted("%d of them", 5, reason="timeout", count=3)
    assert datetime.fromisoformat(line.pop("time")).utcoffset().total_seconds() == 0
    assert line == {"level": "warning", "message": "5 of them", "reason": "timeout", "count": 3}


def test_a_line_of_json_without_reason_and_count():
    assert set(formatted("Booting", level=logging.INFO)) == {"time", "level", "message"}


def test_a_line_has_at_most_4096_bytes_and_keeps_where_it_begins_and_ends():
    message = formatted("begin" + "\U0001f600" * 10_000 + "end")["message"]
    assert (message[:5], message[-3:], len(json.dumps(message)) < 4096) == ("begin", "end", True)


def test_a_traceback_is_within_its_line():
    try:
        raise KeyError("x")
    except KeyError:
        line = formatted("it failed", level=logging.ERROR, error=sys.exc_info())
    assert line["message"].startswith("it failed\nTraceback")


@pytest.mark.parametrize("text", ["two\nlines", '"quoted"', "\ud800", "\x00", "é"], ids=ascii)
def test_any_message_is_one_line(text):
    assert formatted("%s", text)["message"] == text


# What gunicorn itself and its workers write.


@pytest.fixture(scope="module")
def logs_of():
    """The whole logs of two relays, one for each format, through the same trouble."""

    def log_of(form):
        with FakeSegment() as segment:
            settings = {"LOG_FORMAT": form, "WEB_CONCURRENCY": "1", "SEGMENT_WRITE_KEY": "a-short-key"}
            with Relay(environment(segment, settings)) as relay:
                relay.post(make_event("letter", metric=None))
                relay.post(BODY, headers={})
                relay.post(b"secret")
                segment.fault = "500"
                for _ in range(20):
                    assert relay.post(BODY).status_code == 503
                until(lambda: "Segment answered 500" in relay.log)
                relay.stop()
                return relay.whole_log()

    with ThreadPoolExecutor() as pool:
        return dict(zip(("json", "text"), pool.map(log_of, ("json", "text")), strict=True))


@pytest.mark.gunicorn
def test_with_log_format_json_every_line_is_an_object_gunicorns_own_included(logs_of):
    found = [json.loads(line) for line in logs_of["json"].splitlines()]
    letters = [line for line in found if "event" in line]
    assert [set(letter) for letter in letters] == [{"event", "reason", "at"}] * 2
    rest = [line for line in found if "event" not in line]
    assert all({"time", "level", "message"} <= set(line) for line in rest)
    messages = [line["message"] for line in rest]
    assert any(message.startswith("Starting gunicorn") for message in messages)
    assert any(message.startswith("Booting worker") for message in messages)
    assert any("does not look like a write key" in message for message in messages)
    assert [(line["message"], line["count"]) for line in rest if line.get("reason") == "segment_500"] == [
        ("answered 503: Segment answered 500", 1)
    ]
    assert {line["reason"] for line in rest if "reason" in line} == {"no_name", "missing", "not_json", "segment_500"}


@pytest.mark.gunicorn
def test_with_log_format_text_lines_are_as_gunicorns(logs_of):
    letters = [line for line in logs_of["text"].splitlines() if not line.startswith("[")]
    assert [set(json.loads(letter)) for letter in letters] == [{"event", "reason", "at"}] * 2
    lines = [line for line in logs_of["text"].splitlines() if line not in letters]
    form = r"\[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d [+-]\d{4}\] \[\d+\] \[(INFO|WARNING)\] .+"
    assert [line for line in lines if not re.fullmatch(form, line)] == []
    assert logs_of["text"].count("answered 503: Segment answered 500") == 1


@pytest.mark.gunicorn
@pytest.mark.parametrize("form", ["json", "text"])
def test_nothing_personal_is_in_either(logs_of, form):
    lines = [line for line in logs_of[form].splitlines() if not line.startswith('{"event"')]
    for secret in ("secret", SIGNING_KEY, WRITE_KEY, "a-short-key"):
        assert secret not in "".join(lines)


def test_gunicorns_own_log_may_be_a_file_and_its_access_log_switched_on(start, segment, tmp_path):
    file = tmp_path / "gunicorn.log"
    relay = start(segment, ["--error-logfile", str(file), "--access-logfile", "-"], LOG_FORMAT="json")
    relay.post(b"secret")
    relay.stop()
    messages = [json.loads(line)["message"] for line in file.read_text().splitlines()]
    assert any(message.startswith("Booting worker") for message in messages)
    messages = [json.loads(line).get("message", "") for line in relay.whole_log().splitlines()]
    assert any('"POST /webhook HTTP/1.1" 202' in message for message in messages)
    assert any(message.startswith("answered 202") for message in messages)


@pytest.mark.parametrize("size", [30_000, 150_000])
@pytest.mark.parametrize("make", [os.pipe, os.openpty], ids=["a pipe", "a terminal"])
def test_what_a_dry_run_prints_is_whole_though_its_reader_is_slow(monkeypatch, make, size):
    reader, writer = make()
    monkeypatch.setattr("server.log.STDOUT", writer)
    output = logs.Output()
    for _ in range(3):
        output.write(f"{'x' * size}end\n")  # nobody reads yet
    read = b""
    while read.count(b"end") < 3:
        read += os.read(reader, 4096)
        output.flush()
    assert read.split() == [b"x" * size + b"end"] * 3
    os.close(writer)
    os.close(reader)


def test_what_a_dry_run_keeps_of_its_output_is_bounded(monkeypatch):
    reader, writer = os.pipe()
    monkeypatch.setattr("server.log.STDOUT", writer)
    monkeypatch.setattr("server.log.UNREAD", 100_000)
    output = logs.Output()
    for number in range(9):
        output.write(f"{number}{'x' * 50_000}\n")
    read = b""
    while select.select([reader], [], [], 0)[0]:
        read += os.read(reader, 4096)
        output.flush()
    assert [line[:1] for line in read.split()] == [b"0", b"1", b"2", b"3"]
    assert {len(line) for line in read.split()} == {50_001}
    output.write("again\n")
    assert os.read(reader, 4096) == b"again\n"
    os.close(writer)
    os.close(reader)
