"""Uploads: what is sent is what the official client sends, and what each answer of Segment means."""

import contextlib
import gzip
import inspect
import json
import re
import socket
import threading
import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import requests
from conftest import ROOT, WRITE_KEY, make_event, until
from fake_segment import ENDLESS, FAULTS
from segment.analytics import request as official
from segment.analytics.client import Client

from relay.answers import interpret
from relay.message import Message, to_message
from relay.outcomes import RateLimited, Rejected, RetryLater, TransientError
from relay.segment import IDLE_SECONDS, MAX_IDLE, RECONNECT_AFTER, SegmentClient
from translate import translate

SUCCESS = b'{"success": true}'


class Recorder:
    """An HTTP server that keeps what it is sent, and answers what it is told to: (status, headers, body)."""

    def __init__(self):
        self.requests = []
        self.answers = []  # for the next requests; then 200
        recorder = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                recorder.requests.append((self.client_address, self.path, dict(self.headers), body))
                status, headers, content = recorder.answers.pop(0) if recorder.answers else (200, {}, SUCCESS)
                self.send_response(status)
                for name, value in (headers | {"Content-Length": str(len(content))}).items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.001,), daemon=True).start()

    def connections(self):
        """Return the connection of each request, as numbers from 0."""
        addresses = [address for address, *_ in self.requests]
        return [list(dict.fromkeys(addresses)).index(address) for address in addresses]


@pytest.fixture
def recorder():
    recorder = Recorder()
    yield recorder
    recorder.server.shutdown()
    recorder.server.server_close()


@pytest.fixture
def uploader(recorder):
    return SegmentClient(WRITE_KEY, recorder.url)


MESSAGE = Message("1", '{"messageId": "1"}')


def message(event):
    return to_message(translate(event, received=datetime.now(UTC)))


# The same bytes as the official client. ----------------------------------------------------------

UPLOADS = {
    "one event": [json.loads((ROOT / "tests/events/legacy.json").read_text())],
    "three events": [make_event(1), make_event(2), make_event(3)],
    "a hundred events": [make_event(number) for number in range(100)],
    "another script": [make_event(data={"customer_id": "é", "subject": "開封 😀 </script>\u2028"})],
    "all kinds of values": [make_event(data={"customer_id": "1", "x": [1, 2.5, None, True, {}, 10**40, "\\", '"']})],
    "a large event": [make_event(data={"customer_id": "1", "content": "x" * 31_000})],
    "an event that lost its bulk": [make_event(data={"customer_id": "1", "content": "x" * 50_000})],
}


@pytest.mark.parametrize("events", UPLOADS.values(), ids=UPLOADS.keys())
def test_an_upload_is_what_the_official_client_sends(recorder, uploader, events):
    messages = [message(event) for event in events]
    uploader.upload(messages, 5)
    official.post(WRITE_KEY, recorder.url, batch=[json.loads(message.json) for message in messages])
    (_, path, headers, body), (_, expected_path, expected_headers, expected_body) = recorder.requests
    sent_at = rb'"sentAt": "\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?\+00:00"'
    assert re.sub(sent_at, b"", body) == re.sub(sent_at, b"", expected_body)
    assert len(re.findall(sent_at, body)) == len(re.findall(sent_at, expected_body)) == 1
    assert path == expected_path == "/v1/batch"
    for name in ("Content-Type", "User-Agent", "Authorization"):
        assert headers[name] == expected_headers[name]
    # A fraction that is zero is left out of sentAt, so that lengths may differ; nothing else does.
    del headers["Content-Length"], expected_headers["Content-Length"]
    # The relay asks for no compression.
    assert headers | {"Accept-Encoding": ""} == expected_headers | {"Accept-Encoding": ""}
    assert headers["Accept-Encoding"] == "identity"
    assert list(headers) == list(expected_headers)


@pytest.mark.parametrize("write_key", [WRITE_KEY, "short", 'a"b\\', "clé", "ключ"])
def test_the_write_key_is_sent_as_the_official_client_sends_it(recorder, write_key):
    SegmentClient(write_key, recorder.url).upload([MESSAGE], 5)
    official.post(write_key, recorder.url, batch=[{}])
    (_, _, headers, body), (_, _, expected_headers, expected_body) = recorder.requests
    assert headers["Authorization"] == expected_headers["Authorization"]
    assert json.loads(body)["writeKey"] == json.loads(expected_body)["writeKey"] == write_key


def test_what_the_official_client_makes_of_an_event_is_what_is_uploaded(recorder, uploader):
    event = json.loads((ROOT / "tests/events/legacy.json").read_text())
    uploader.upload([message(event)], 5)
    upload = json.loads(recorder.requests[0][3])
    assert set(upload) == {"batch", "sentAt", "writeKey"}
    assert upload["writeKey"] == WRITE_KEY
    (sent,) = upload["batch"]
    call = translate(event, received=datetime.now(UTC))
    _, expected = Client(WRITE_KEY, send=False).track(**call)
    assert sent == json.loads(json.dumps(expected))
    assert sent["event"] == "customerio:email_delivered"


def test_the_library_still_is_what_the_code_relies_on():
    assert {"write_key", "host", "timeout", "kwargs"} <= set(inspect.signature(official.post).parameters)
    context = {}
    done, message = Client(WRITE_KEY, send=False).track(user_id="1", event="e", context=context, message_id="m")
    assert done is True
    assert (message["type"], message["userId"], message["messageId"]) == ("track", "1", "m")
    assert "library" in message["context"]
    with pytest.raises(RuntimeError, match="limit"):
        Client(WRITE_KEY, send=False).track(user_id="1", event="e", properties={"x": "x" * 33_000})


# Connections. ------------------------------------------------------------------------------------


def test_a_connection_is_used_again_after_a_success(recorder, uploader):
    for _ in range(5):
        uploader.upload([MESSAGE], 5)
    assert recorder.connections() == [0, 0, 0, 0, 0]


@contextlib.contextmanager
def uploads_at_one_time(uploader, segment, number):
    """Have so many uploads wait for Segment's answer together; they get it at the end."""
    segment.hold()
    threads = [threading.Thread(target=uploader.upload, args=([MESSAGE], 5)) for _ in range(number)]
    for thread in threads:
        thread.start()
    until(lambda: segment.busy == number)
    yield
    segment.release()
    for thread in threads:
        thread.join(5)


def test_no_two_uploads_share_a_connection(segment):
    uploader = SegmentClient(WRITE_KEY, segment.url)
    with uploads_at_one_time(uploader, segment, 4):
        assert segment.open_connections == 4
    uploader.upload([MESSAGE], 5)
    assert segment.open_connections == 4


@pytest.fixture
def four_idle(segment):
    """A client that has four idle connections."""
    uploader = SegmentClient(WRITE_KEY, segment.url)
    with uploads_at_one_time(uploader, segment, 4):
        pass
    return uploader


def test_one_failed_connection_closes_the_idle_ones(four_idle, segment):
    """They go to the same machine, and may be as dead."""
    segment.faults.append("reset")
    with pytest.raises(TransientError):
        four_idle.upload([MESSAGE], 5)
    until(lambda: segment.open_connections == 0)
    four_idle.upload([MESSAGE], 5)


def test_a_timeout_on_a_connection_that_was_used_before_closes_the_idle_ones(four_idle, segment):
    segment.set_fault("forget")
    with pytest.raises(RetryLater, match="in time"):
        four_idle.upload([MESSAGE], 0.2)
    four_idle.upload([MESSAGE], 5)


def test_a_timeout_on_a_new_connection_says_nothing_about_the_others(segment):
    uploader = SegmentClient(WRITE_KEY, segment.url)
    with uploads_at_one_time(uploader, segment, 1):
        segment.faults.append("hang")
        with pytest.raises(RetryLater, match="in time"):
            uploader.upload([MESSAGE], 0.2)
    uploader.upload([MESSAGE], 5)
    assert segment.open_connections == 2  # the one that hangs, and the first


def set_clock(monkeypatch, clock):
    monkeypatch.setattr("relay.segment.monotonic", clock)
    monkeypatch.setattr("relay.exchange.monotonic", clock)


AGES = {  # at these seconds an upload -> the connection that each takes
    "often": (range(0, 600, 59), [0] * 11),
    "quiet for just under a minute": ([0, IDLE_SECONDS - 1], [0, 0]),
    "quiet for a minute": ([0, IDLE_SECONDS, IDLE_SECONDS + 1], [0, 1, 1]),
    "busy for an hour": (range(0, RECONNECT_AFTER + 60, 30), [0] * 120 + [1] * 2),
}


@pytest.mark.parametrize(("times", "connections"), AGES.values(), ids=AGES.keys())
def test_a_connection_is_used_for_an_hour_and_while_it_is_not_quiet_for_a_minute(
    recorder, uploader, monkeypatch, times, connections
):
    for now in times:
        set_clock(monkeypatch, lambda now=now: 1_000_000.0 + now)
        uploader.upload([MESSAGE], 5)
    assert recorder.connections() == connections


def test_connections_that_nobody_needs_any_more_are_closed(four_idle, segment, monkeypatch):
    now = time.monotonic() + IDLE_SECONDS - 1
    set_clock(monkeypatch, lambda: now)
    four_idle.upload([MESSAGE], 5)
    assert segment.open_connections == 4
    now += 2
    four_idle.upload([MESSAGE], 5)
    until(lambda: segment.open_connections == 1)


def test_no_more_connections_are_kept_than_may_be_in_use(segment):
    uploader = SegmentClient(WRITE_KEY, segment.url)
    with uploads_at_one_time(uploader, segment, 64):
        pass
    until(lambda: segment.open_connections == MAX_IDLE)


def test_an_upload_without_an_answer_ends_in_time(segment):
    segment.fault = "hang"
    with pytest.raises(RetryLater, match="Segment did not answer in time") as error:
        SegmentClient(WRITE_KEY, segment.url).upload([MESSAGE], 0.2)
    assert (type(error.value), error.value.reason) == (RetryLater, "timeout")


@pytest.mark.parametrize("seconds", [0.001, 1e-9])
def test_an_upload_with_hardly_any_time_is_a_timeout_or_a_failed_connection(seconds):
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(RetryLater) as error:
        SegmentClient(WRITE_KEY, f"http://127.0.0.1:{silent.getsockname()[1]}").upload([MESSAGE], seconds)
    assert error.value.reason in ("timeout", "connection")


# What the environment may say. -------------------------------------------------------------------


def test_netrc_is_not_used(segment, tmp_path, monkeypatch):
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login someone password else\ndefault login a password b\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / ".netrc"))
    assert requests.utils.get_netrc_auth(segment.url) == ("someone", "else")
    SegmentClient(WRITE_KEY, segment.url).upload([message(make_event("a"))], 5)
    assert segment.events() == ["event-a"]  # the fake checks the key in the Authorization header


# What each answer means. -------------------------------------------------------------------------


def in_a_minute():
    return format_datetime(datetime.now(UTC) + timedelta(seconds=60), usegmt=True)


KEY = "Segment refuses the write key ({}): check SEGMENT_WRITE_KEY"
ELSEWHERE = "Segment's address redirects elsewhere: check SEGMENT_HOST"
NOT_SEGMENT = "what answered is not Segment: check SEGMENT_HOST and proxies"
PAGE = b"<!doctype html>"
COMPRESSED = gzip.compress(SUCCESS)
LIMITED = "Segment is limiting the rate"
ON_THE_WAY = "it is refused on the way to Segment ({})"
ANSWERS = {  # status, headers, body -> exception, what it says, its code, its Retry-After
    "400": (400, {}, b"{}", Rejected, "Segment refuses it (400)", "segment_rejects", None),
    "413": (413, {}, b"{}", Rejected, "Segment refuses it (413)", "segment_rejects", None),
    "400 and a page": (400, {}, PAGE, Rejected, ON_THE_WAY.format(400), "segment_rejects.on_the_way", None),
    "413 and a page": (413, {}, PAGE, Rejected, ON_THE_WAY.format(413), "segment_rejects.on_the_way", None),
    "413 and nothing": (413, {}, b"", Rejected, ON_THE_WAY.format(413), "segment_rejects.on_the_way", None),
    "400 and a list": (400, {}, b"[]", Rejected, ON_THE_WAY.format(400), "segment_rejects.on_the_way", None),
    "429": (429, {}, b"{}", RateLimited, LIMITED, "rate_limited", 1),
    "429 for 3 s": (429, {"Retry-After": "3"}, b"", RateLimited, LIMITED, "rate_limited", 3),
    "429 for 0 s": (429, {"Retry-After": "0"}, b"", RateLimited, LIMITED, "rate_limited", 1),
    "429 for -1 s": (429, {"Retry-After": "-1"}, b"", RateLimited, LIMITED, "rate_limited", 1),
    "429 for junk": (429, {"Retry-After": "soon"}, b"", RateLimited, LIMITED, "rate_limited", 1),
    "429 for long": (429, {"Retry-After": "9999"}, b"", RateLimited, LIMITED, "rate_limited", 300),
    "429 until the past": (
        *(429, {"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}, b""),
        *(RateLimited, LIMITED, "rate_limited", 1),
    ),
    "401": (401, {}, b"{}", RetryLater, KEY.format(401), "write_key", 1),
    "403": (403, {}, b"{}", RetryLater, KEY.format(403), "write_key", 1),
    "404": (404, {}, b"{}", RetryLater, "Segment answered 404", "segment_404", 1),
    "405": (405, {}, b"{}", RetryLater, "Segment answered 405", "segment_405", 1),
    "415": (415, {}, b"{}", RetryLater, "Segment answered 415", "segment_415", 1),
    "401 and a page": (401, {}, PAGE, RetryLater, NOT_SEGMENT, "not_segment", 1),
    "403 and a page": (403, {}, PAGE, RetryLater, NOT_SEGMENT, "not_segment", 1),
    "403 and nothing": (403, {}, b"", RetryLater, NOT_SEGMENT, "not_segment", 1),
    "404 and a page": (404, {}, PAGE, RetryLater, NOT_SEGMENT, "not_segment", 1),
    "407 and a page": (407, {}, PAGE, RetryLater, NOT_SEGMENT, "not_segment", 1),
    "407 in JSON": (407, {}, b"{}", RetryLater, NOT_SEGMENT, "not_segment", 1),  # a proxy's, in whatever form
    "408 and a page": (408, {}, PAGE, TransientError, "Segment answered 408", "segment_408", 1),
    "429 and a page": (429, {}, PAGE, RateLimited, LIMITED, "rate_limited", 1),
    "502 and a page": (502, {}, PAGE, TransientError, "Segment answered 502", "segment_502", 1),
    "502 and too much": (502, {}, None, TransientError, "Segment answered 502", "segment_502", 1),
    "403 and too much": (403, {}, None, RetryLater, NOT_SEGMENT, "not_segment", 1),
    "200 and too much": (200, {}, None, RetryLater, NOT_SEGMENT, "not_segment", 1),
    "408": (408, {}, b"{}", TransientError, "Segment answered 408", "segment_408", 1),
    "500": (500, {}, b"{}", TransientError, "Segment answered 500", "segment_500", 1),
    "503 with Retry-After": (503, {"Retry-After": "60"}, b"", TransientError, "Segment answered 503", "segment_503", 1),
    "599": (599, {}, b"{}", TransientError, "Segment answered 599", "segment_599", 1),
    "301": (301, {"Location": "/x"}, b"", RetryLater, ELSEWHERE, "redirect", 1),
    "307": (307, {"Location": "/x"}, b"", RetryLater, ELSEWHERE, "redirect", 1),
    "308": (308, {"Location": "/x"}, b"", RetryLater, ELSEWHERE, "redirect", 1),
    "600": (600, {}, b"{}", RetryLater, NOT_SEGMENT, "not_segment", 1),
    "999": (999, {}, b"", RetryLater, NOT_SEGMENT, "not_segment", 1),
    "300 to nowhere": (300, {}, b"", RetryLater, "Segment answered 300", "segment_300", 1),
    "304": (304, {}, b"", RetryLater, "Segment answered 304", "segment_304", 1),
    "200 and nothing": (200, {}, b"", TransientError, "the connection to Segment failed", "connection", 1),
    "200 and a page": (200, {}, b"<!doctype html>", RetryLater, NOT_SEGMENT, "not_segment", 1),
    "200 and a list": (200, {}, b"[true]", RetryLater, NOT_SEGMENT, "not_segment", 1),
    "200 and a word": (200, {}, b"true", RetryLater, NOT_SEGMENT, "not_segment", 1),
    "200 and what is compressed": (200, {}, COMPRESSED, RetryLater, NOT_SEGMENT, "not_segment", 1),
    "200 and a BOM and a page": (200, {}, b"\xef\xbb\xbf" + PAGE, RetryLater, NOT_SEGMENT, "not_segment", 1),
    "200 and two objects": (200, {}, SUCCESS * 2, RetryLater, NOT_SEGMENT, "not_segment", 1),
    "200 and half an object": (200, {}, SUCCESS[:-1], RetryLater, NOT_SEGMENT, "not_segment", 1),
    "200 and OK": (200, {}, b"OK", RetryLater, NOT_SEGMENT, "not_segment", 1),
    "200 and brackets": (200, {}, b"[" * 60_000, RetryLater, NOT_SEGMENT, "not_segment", 1),
    "200 and a long number": (200, {}, b"1" * 60_000, RetryLater, NOT_SEGMENT, "not_segment", 1),
    "204": (204, {}, b"", TransientError, "the connection to Segment failed", "connection", 1),
    "103": (103, {}, b"", TransientError, "Segment answered 103", "segment_103", 1),
    "200 and not UTF-8": (200, {}, b"\xff\xfe\xff", RetryLater, NOT_SEGMENT, "not_segment", 1),
    "200 and false": (
        *(200, {}, b'{"success": false}'),
        *(TransientError, "Segment answered that it failed", "not_success", 1),
    ),
    "200 and false, on two lines": (
        *(200, {}, b'{\n  "success":\n false}'),
        *(TransientError, "Segment answered that it failed", "not_success", 1),
    ),
    "200 and success in words": (
        *(200, {}, b'{"success": "true"}'),
        *(TransientError, "Segment answered that it failed", "not_success", 1),
    ),
    "200 and 1": (
        *(200, {}, b'{"success": 1}'),
        *(TransientError, "Segment answered that it failed", "not_success", 1),
    ),
    "200 and no word of success": (
        *(200, {}, b"{}"),
        *(TransientError, "Segment answered that it failed", "not_success", 1),
    ),
}


@pytest.mark.parametrize(
    ("status", "headers", "body", "kind", "words", "label", "retry_after"), ANSWERS.values(), ids=ANSWERS.keys()
)
def test_interpret(status, headers, body, kind, words, label, retry_after):
    with pytest.raises(kind) as error:
        interpret(status, headers, body)
    assert type(error.value) is kind
    assert str(error.value) == words
    assert error.value.reason == label
    assert getattr(error.value, "retry_after", None) == retry_after


def test_interpret_says_who_refused():
    for body, by_segment in ((b"{}", True), (PAGE, False)):
        with pytest.raises(Rejected) as error:
            interpret(400, {}, body)
        assert error.value.by_segment is by_segment


SENT = {name: case[:3] for name, case in ANSWERS.items() if case[0] >= 200 and case[2] is not None}


@pytest.mark.parametrize(("name", "answer"), SENT.items(), ids=SENT.keys())
def test_a_connection_is_used_again_only_after_an_answer_that_was_understood(recorder, uploader, name, answer):
    uploader.upload([MESSAGE], 5)
    recorder.answers.append(answer)
    with pytest.raises((RetryLater, Rejected)):
        uploader.upload([MESSAGE], 5)
    uploader.upload([MESSAGE], 5)
    assert recorder.connections() == [0, 0, 0 if name in ("400", "413") else 1]


def test_a_connection_that_is_to_be_closed_is_not_used_again(recorder, uploader):
    recorder.answers.append((200, {"Connection": "close"}, SUCCESS))
    recorder.answers.append((400, {"Connection": "close"}, b"{}"))
    uploader.upload([MESSAGE], 5)
    with pytest.raises(Rejected):
        uploader.upload([MESSAGE], 5)
    uploader.upload([MESSAGE], 5)
    assert recorder.connections() == [0, 1, 2]


# It ends whatever is sent, though nothing is patched here. ----------------------------------------


@pytest.mark.parametrize("fault", ["hang", "drip"])
def test_an_answer_ends_at_the_deadline(segment, fault):
    segment.fault = fault
    with pytest.raises(RetryLater, match="in time"):
        SegmentClient(WRITE_KEY, segment.url).upload([MESSAGE], 0.3)


@pytest.mark.parametrize("fault", [*ENDLESS, "bomb"])
def test_an_answer_is_read_up_to_a_bound(segment, fault):
    segment.fault = fault
    with pytest.raises(RetryLater) as error:
        SegmentClient(WRITE_KEY, segment.url).upload([MESSAGE], 60)
    assert str(error.value).startswith(FAULTS[fault])


def test_the_bound_is_far_above_segments_answers(recorder, uploader):
    recorder.answers.append((200, {"X": "x" * 30_000}, b'{"success": true, "more": "' + b"x" * 30_000 + b'"}'))
    uploader.upload([MESSAGE], 5)
    recorder.answers.append((200, {}, b'{"success": true}' + b" " * 66_000))
    with pytest.raises(RetryLater, match="not Segment"):
        uploader.upload([MESSAGE], 5)


def test_an_upload_that_nobody_reads_ends_at_the_deadline():
    batch = [Message(str(number), '"' + "x" * 30_000 + '"') for number in range(300)]
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(RetryLater, match="in time"):
        SegmentClient(WRITE_KEY, f"http://127.0.0.1:{silent.getsockname()[1]}").upload(batch, 0.3)


def test_interpret_a_date():
    with pytest.raises(RateLimited) as error:
        interpret(429, {"Retry-After": in_a_minute()}, b"")
    assert 50 < error.value.retry_after <= 60


@pytest.mark.parametrize("status", [200, 201, 202])
def test_interpret_a_success(status):
    interpret(status, {}, b'{\n  "success": true\n}')


@pytest.mark.parametrize("host", [f"http://{'x' * 70}.example", "http://127.0.0.1:9", "https://127.0.0.1:9"])
def test_what_keeps_an_upload_from_starting_is_a_failed_connection(host):
    with pytest.raises(TransientError, match="the connection to Segment failed"):
        SegmentClient(WRITE_KEY, host).upload([Message("1", "{}")], 3)
