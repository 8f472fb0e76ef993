"""segment_client.py: what it sends is what the official client sends, and what each answer of Segment means."""

import inspect
import io
import json
import re
import socket
import threading
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import requests
from conftest import ROOT, WRITE_KEY, make_event, until
from segment.analytics import request as official
from segment.analytics.client import Client

from delivery import Message
from outcomes import RateLimited, Rejected, RetryLater, TransientError
from segment_client import RECONNECT_AFTER, SegmentClient, check
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
    return SegmentClient(WRITE_KEY, "http://unused.example").to_message(translate(event, received=datetime.now(UTC)))


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
    assert headers == expected_headers


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

FAILURES = {  # an answer -> what upload raises
    "500": (500, {}, b"{}"),
    "429": (429, {"Retry-After": "1"}, b"{}"),
    "400": (400, {}, b"{}"),
    "401": (401, {}, b"{}"),
    "404": (404, {}, b"{}"),
    "a redirect": (302, {"Location": "/elsewhere"}, b""),
    "a web page": (200, {}, b"<html>"),
    "nothing": (200, {}, b""),
    "no success": (200, {}, b'{"success": false}'),
}


def test_a_connection_is_used_again_after_a_success(recorder, uploader):
    for _ in range(5):
        uploader.upload([MESSAGE], 5)
    assert recorder.connections() == [0, 0, 0, 0, 0]


@pytest.mark.parametrize("answer", FAILURES.values(), ids=FAILURES.keys())
def test_a_connection_is_not_used_again_after_a_failure(recorder, uploader, answer):
    uploader.upload([MESSAGE], 5)
    recorder.answers.append(answer)
    with pytest.raises((RetryLater, Rejected)):
        uploader.upload([MESSAGE], 5)
    uploader.upload([MESSAGE], 5)
    assert recorder.connections() == [0, 0, 1]


def test_no_two_uploads_share_a_connection(segment):
    uploader = SegmentClient(WRITE_KEY, segment.url)
    segment.hold()
    threads = [threading.Thread(target=uploader.upload, args=([MESSAGE], 5)) for _ in range(4)]
    for thread in threads:
        thread.start()
    until(lambda: segment.busy == 4)
    assert segment.open_connections == 4
    segment.release()
    for thread in threads:
        thread.join(5)
    uploader.upload([MESSAGE], 5)
    assert segment.open_connections == 4


def test_one_failed_connection_closes_the_idle_ones(segment):
    """They go to the same machine, and may be as dead."""
    uploader = SegmentClient(WRITE_KEY, segment.url)
    segment.hold()
    threads = [threading.Thread(target=uploader.upload, args=([MESSAGE], 5)) for _ in range(4)]
    for thread in threads:
        thread.start()
    until(lambda: segment.busy == 4)
    segment.release()
    for thread in threads:
        thread.join(5)
    segment.faults.append("reset")
    with pytest.raises(TransientError):
        uploader.upload([MESSAGE], 5)
    until(lambda: segment.open_connections == 0)
    uploader.upload([MESSAGE], 5)


def test_connections_are_opened_anew_every_hour(recorder, uploader, monkeypatch):
    now = 1_000_000.0
    monkeypatch.setattr("segment_client.monotonic", lambda: now)
    uploader.upload([MESSAGE], 5)
    now += RECONNECT_AFTER - 1
    uploader.upload([MESSAGE], 5)
    now += 2
    uploader.upload([MESSAGE], 5)
    assert recorder.connections() == [0, 0, 1]


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


def test_proxies_are_those_of_when_it_was_made(segment, monkeypatch):
    monkeypatch.setenv("http_proxy", segment.url)
    uploader = SegmentClient(WRITE_KEY, "http://segment.invalid")
    monkeypatch.delenv("http_proxy")
    with pytest.raises(RetryLater):  # our fake is no proxy; but it was asked
        uploader.upload([MESSAGE], 5)
    assert segment.requests[0]["path"] == "http://segment.invalid/v1/batch"


# What each answer means. -------------------------------------------------------------------------


def in_a_minute():
    return format_datetime(datetime.now(UTC) + timedelta(seconds=60), usegmt=True)


KEY = "Segment refuses the write key ({}): check SEGMENT_WRITE_KEY"
ELSEWHERE = "Segment's address redirects elsewhere: check SEGMENT_HOST"
NOT_SEGMENT = "what answered is not Segment: check SEGMENT_HOST and proxies"
LIMITED = "Segment is limiting the rate"
ANSWERS = {  # status, headers, body -> exception, what it says, its code, its Retry-After
    "400": (400, {}, b"{}", Rejected, "Segment refuses it (400)", None, None),
    "413": (413, {}, b"{}", Rejected, "Segment refuses it (413)", None, None),
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
    "407": (407, {}, b"{}", RetryLater, "Segment answered 407", "segment_407", 1),
    "408": (408, {}, b"{}", TransientError, "Segment answered 408", "segment_408", 1),
    "500": (500, {}, b"{}", TransientError, "Segment answered 500", "segment_500", 1),
    "503 with Retry-After": (503, {"Retry-After": "60"}, b"", TransientError, "Segment answered 503", "segment_503", 1),
    "599": (599, {}, b"{}", TransientError, "Segment answered 599", "segment_599", 1),
    "301": (301, {"Location": "/x"}, b"", RetryLater, ELSEWHERE, "redirect", 1),
    "307": (307, {"Location": "/x"}, b"", RetryLater, ELSEWHERE, "redirect", 1),
    "308": (308, {"Location": "/x"}, b"", RetryLater, ELSEWHERE, "redirect", 1),
    "300 to nowhere": (300, {}, b"", RetryLater, "Segment answered 300", "segment_300", 1),
    "304": (304, {}, b"", RetryLater, "Segment answered 304", "segment_304", 1),
    "200 and nothing": (200, {}, b"", TransientError, "the connection to Segment failed", "connection", 1),
    "200 and a page": (200, {}, b"<!doctype html>", RetryLater, NOT_SEGMENT, "not_segment", 1),
    "200 and a list": (200, {}, b"[true]", RetryLater, NOT_SEGMENT, "not_segment", 1),
    "200 and a word": (200, {}, b"true", RetryLater, NOT_SEGMENT, "not_segment", 1),
    "200 and not UTF-8": (200, {}, b"\xff\xfe\xff", RetryLater, NOT_SEGMENT, "not_segment", 1),
    "200 and false": (
        *(200, {}, b'{"success": false}'),
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


def response(status, headers, body):
    made = requests.Response()
    made.status_code, made.raw = status, io.BytesIO(body)
    made.headers.update(headers)
    return made


@pytest.mark.parametrize(
    ("status", "headers", "body", "kind", "reason", "code", "retry_after"), ANSWERS.values(), ids=ANSWERS.keys()
)
def test_check(status, headers, body, kind, reason, code, retry_after):
    with pytest.raises(kind) as error:
        check(response(status, headers, body))
    assert type(error.value) is kind
    assert str(error.value) == reason
    assert getattr(error.value, "reason", None) == code
    assert getattr(error.value, "retry_after", None) == retry_after


def test_check_of_a_date():
    with pytest.raises(RateLimited) as error:
        check(response(429, {"Retry-After": in_a_minute()}, b""))
    assert 50 < error.value.retry_after <= 60


@pytest.mark.parametrize("status", [200, 201, 202])
def test_check_of_a_success(status):
    check(response(status, {}, b'{\n  "success": true\n}'))


NEVER_STARTED = {
    "a CA bundle that is not there": ("https://127.0.0.1:9", {"REQUESTS_CA_BUNDLE": "/not/there"}),
    "a name that is none": (f"http://{'x' * 70}.example", {}),
}


@pytest.mark.parametrize(("host", "env"), NEVER_STARTED.values(), ids=NEVER_STARTED.keys())
def test_what_keeps_an_upload_from_starting_is_a_failed_connection(host, env, monkeypatch):
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(TransientError, match="the connection to Segment failed"):
        SegmentClient(WRITE_KEY, host).upload([Message("1", "{}")], 3)
