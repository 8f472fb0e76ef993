"""Every row of the table of answers, from a real gunicorn on a real port."""

import contextlib
import http.client
import json
import os
import socket
import stat
import subprocess
import sys
import time

import pytest
import requests
from conftest import ROOT, SIGNING_KEY, free_port, make_event, sign, until


def test_200_segment_has_it(relay, segment):
    answer = relay.post(make_event("a"))
    assert answer.status_code == 200
    (message_id,) = segment.kept
    assert answer.json() == {"status": "delivered", "message_id": message_id}
    assert answer.headers["Content-Type"] == "application/json"
    assert segment.events() == ["event-a"]


def test_a_retry_is_the_same_message(relay, segment):
    first, second = relay.post(make_event("a")), relay.post(make_event("a"))
    assert first.json() == second.json()
    assert (segment.events(), segment.duplicates) == (["event-a"], 1)


def test_relays_of_two_sources_do_not_swallow_each_others_events(relay, segment, start):
    other = start(segment, SEGMENT_WRITE_KEY="another0123456789another01234567")
    assert relay.post(make_event("a")).status_code == other.post(make_event("a")).status_code == 200
    assert (segment.events(), segment.duplicates) == (["event-a", "event-a"], 0)


WAYS = {  # the same webhook, as requests differ: the first takes the worker's short way, or should
    "usual": (b"POST /webhook HTTP/1.1", b"", b"keep-alive"),
    "with a query": (b"POST /webhook?from=customerio HTTP/1.1", b"", b"keep-alive"),
    "with a whole URL": (b"POST http://relay.example/webhook HTTP/1.1", b"", b"keep-alive"),
    "escaped": (b"POST /%77ebhook HTTP/1.1", b"", b"keep-alive"),
    "to be closed": (b"POST /webhook HTTP/1.1", b"Connection: close\r\n", b"close"),
    "of HTTP/1.0": (b"POST /webhook HTTP/1.0", b"", b"close"),
    "that waits for a go-ahead": (b"POST /webhook HTTP/1.1", b"Expect: 100-continue\r\n", b"keep-alive"),
}


@pytest.mark.parametrize(("line", "more", "connection"), WAYS.values(), ids=WAYS.keys())
def test_200_whichever_way_it_comes(relay, segment, line, more, connection):
    body = json.dumps(make_event("a")).encode()
    headers = sign(body) | {"Host": "relay.example", "Content-Length": str(len(body))}
    head = b"".join(f"{name}: {value}\r\n".encode() for name, value in headers.items())
    with socket.create_connection(("127.0.0.1", relay.port), timeout=10) as client:
        for time_around in range(2 if connection == b"keep-alive" else 1):
            client.sendall(line + b"\r\n" + head + more + b"\r\n")
            if b"Expect" in more:
                assert client.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
            client.sendall(body)
            with contextlib.closing(http.client.HTTPResponse(client)) as answer:
                answer.begin()
                assert (answer.status, json.loads(answer.read())["status"]) == (200, "delivered"), time_around
                assert answer.headers["Connection"].encode() == connection
                assert answer.headers["Content-Type"] == "application/json"
                assert answer.headers["Date"].endswith("GMT")
        if connection == b"close":
            assert client.recv(1) == b""
    assert segment.events() == ["event-a"]


def test_200_under_another_server():
    """The route is Flask's own, too: only our worker goes around it."""
    port = free_port()
    settings = {"PATH": os.environ["PATH"], "DRY_RUN": "1", "CUSTOMERIO_SIGNING_KEY": SIGNING_KEY}
    command = [sys.executable, "-m", "flask", "--app", "app", "run", "--port", str(port)]
    quiet = subprocess.DEVNULL
    with subprocess.Popen(command, cwd=ROOT, env=settings, stdout=quiet, stderr=quiet) as server:
        try:
            body = json.dumps(make_event("a")).encode()
            until(lambda: listens(port))
            for headers, status in ((sign(body), 200), ({}, 401)):
                answer = requests.post(f"http://127.0.0.1:{port}/webhook", data=body, headers=headers, timeout=10)
                assert answer.status_code == status
        finally:
            server.kill()


def listens(port):
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=5):
        return True
    return False


UNDELIVERABLE = {
    "no name": (make_event(metric=None), "it has no name"),
    "nobody": (make_event(data={"customer_id": ""}), "it names nobody"),
    "cannot fit": (make_event(data={"customer_id": "x" * 40_000}), "it cannot be made to fit"),
}


@pytest.mark.parametrize(("event", "reason"), UNDELIVERABLE.values(), ids=UNDELIVERABLE.keys())
def test_202_undeliverable(relay, segment, event, reason):
    answer = relay.post(event)
    assert answer.status_code == 202
    assert answer.json()["status"] == "dead-lettered"
    assert answer.json()["reason"].startswith(reason)
    assert segment.requests == []
    until(lambda: '"reason"' in relay.log)
    (letter,) = [json.loads(line) for line in relay.log.splitlines() if line.startswith("{")]
    assert letter["event"] == event
    assert letter["reason"] == answer.json()["reason"]
    assert letter["at"].endswith("+00:00")


@pytest.mark.parametrize("status", [400, 413])
def test_202_segment_refuses_this_one_event(relay, segment, status):
    segment.faults.append(str(status))
    answer = relay.post(make_event("a"))
    assert (answer.status_code, answer.json()["reason"]) == (202, f"Segment refuses it ({status})")
    assert len(segment.requests) == 1


def test_202_even_what_cannot_be_parsed_is_kept_whole(relay):
    body = b'{"metric": "m", "data": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    assert relay.post(body).status_code == 202
    until(lambda: '"reason"' in relay.log)
    (letter,) = [json.loads(line) for line in relay.log.splitlines() if line.startswith("{")]
    assert letter["event"] == body.decode()


def test_202_in_a_file(start, segment, tmp_path):
    path = tmp_path / "dead-letters.jsonl"
    relay = start(segment, DEAD_LETTER_FILE=str(path))
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    letters = [make_event(number, metric=None) for number in range(20)]
    assert {answer.status_code for answer in relay.post_all(letters)} == {202}
    kept = [json.loads(line)["event"] for line in path.read_text().splitlines()]
    assert sorted(kept, key=str) == sorted(letters, key=str)
    assert "person-1" not in relay.log
    assert f"dead letter kept in {path}: it has no name" in relay.log


def test_503_while_the_file_cannot_be_written(start, segment, tmp_path):
    folder = tmp_path / "letters"
    folder.mkdir()
    relay = start(segment, DEAD_LETTER_FILE=str(folder / "file"))
    (folder / "file").unlink()
    folder.rename(tmp_path / "away")
    assert relay.post(make_event(metric=None)).status_code == 503
    (tmp_path / "away").rename(folder)
    assert relay.post(make_event(metric=None)).status_code == 202


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_503_when_the_disk_is_full(start, segment):
    relay = start(segment, DEAD_LETTER_FILE="/dev/full")
    assert relay.post(make_event(metric=None)).status_code == 503
    assert relay.post(make_event("a")).status_code == 200


@pytest.mark.parametrize("body", [b"", b"hello", b"[]", b'"x"', b"{", b"\xff\xfe", b"null"], ids=repr)
def test_400_not_a_json_object(relay, segment, body):
    answer = relay.post(body)
    assert answer.status_code == 400
    assert answer.json()["status"] == "rejected"
    assert segment.requests == []


def test_401_without_signature(relay, segment):
    answer = relay.post(make_event(), headers={})
    assert answer.status_code == 401
    assert answer.json()["status"] == "unauthorized"
    assert segment.requests == []


JUNK = {
    "another body's": sign(b"{}"),
    "another key's": sign(json.dumps(make_event()).encode(), key="another"),
    "nine days old": sign(json.dumps(make_event()).encode(), str(int(time.time()) - 9 * 24 * 3600)),
    "nine days ahead": sign(json.dumps(make_event()).encode(), str(int(time.time()) + 9 * 24 * 3600)),
    "no number": sign(json.dumps(make_event()).encode(), "soon"),
    "latin-1": {"X-CIO-Timestamp": "é", "X-CIO-Signature": "é" * 64},
    "long": {"X-CIO-Timestamp": "1" * 4000, "X-CIO-Signature": "0" * 8000},
}


@pytest.mark.parametrize("headers", JUNK.values(), ids=JUNK.keys())
def test_401_whatever_the_headers(relay, segment, headers):
    body = json.dumps(make_event()).encode()
    answer = relay.post(body, headers={name: value.encode("latin-1") for name, value in headers.items()})
    assert answer.status_code == 401
    stamp = headers["X-CIO-Timestamp"]
    if stamp.isascii():
        right = sign(body, stamp)["X-CIO-Signature"]
        assert right not in answer.text
        assert right not in relay.log
    assert segment.requests == []


def test_the_signature_is_checked_before_the_body_is_parsed(relay):
    assert relay.post(b"not json", headers={}).status_code == 401


SPELLINGS = [
    b'{"metric":"m",\n "data" : {"customer_id": 15, "identifiers": {"id": "\\u0061"}}}\n',
    b'{"metric": "m", "metric": "n", "data": {"customer_id": 1, "x": 1.50e1}}',
]


@pytest.mark.parametrize("body", SPELLINGS, ids=["spaces and escapes", "a key twice"])
def test_the_signature_is_of_the_bytes_as_they_came(relay, body):
    assert relay.post(body).status_code == 200


def test_a_second_key_is_for_rotation(start, segment):
    relay = start(segment, CUSTOMERIO_SIGNING_KEY=f"new, {SIGNING_KEY}")
    assert relay.post(make_event()).status_code == 200
    body = json.dumps(make_event()).encode()
    assert relay.post(body, headers=sign(body, key="new")).status_code == 200


def test_unsigned_webhooks_where_they_are_allowed(start, segment):
    relay = start(segment, CUSTOMERIO_SIGNING_KEY=None, ALLOW_UNSIGNED="1")
    assert relay.post(make_event(), headers={}).status_code == 200
    assert "WARNING" in relay.log
    assert "ALLOW_UNSIGNED is on" in relay.log


@pytest.mark.parametrize("more", [{}, {"Connection": "close"}], ids=["kept alive", "closed"])
def test_413_above_8_mib(relay, more):
    body = b"x" * (8 * 1024 * 1024 + 1)
    answer = relay.post(body, headers=sign(body) | more)
    assert (answer.status_code, answer.json()["status"]) == (413, "rejected")


def test_413_above_8_mib_in_chunks(relay):
    answer = requests.post(relay.url + "/webhook", data=(b"x" * 1_000_000 for _ in range(9)), timeout=20)
    assert (answer.status_code, answer.json()["status"]) == (413, "rejected")


def test_8_mib_are_read(relay, segment):
    event = make_event(data={"customer_id": "1", "content": "x" * (8 * 1024 * 1024 - 1000)})
    assert relay.post(event).status_code == 200
    (message,) = segment.kept.values()
    assert message["context"]["omitted_properties"] == ["content"]


RETRIED = {  # what Segment does -> what the reason says
    "500": "Segment answered 500",
    "502": "Segment answered 502",
    "401": "Segment refuses the write key (401)",
    "403": "Segment refuses the write key (403)",
    "404": "Segment answered 404",
    "429:1": "Segment is limiting the rate",
    "304": "Segment answered 304",
    "reset": "the connection to Segment failed",
    "close": "the connection to Segment failed",
    "cut": "the connection to Segment failed",
    "garbage": "the connection to Segment failed",
    "html": "what answered is not Segment",
    "redirect": "Segment's address redirects",
    "redirect-307": "Segment's address redirects",
    "false": "Segment answered that it failed",
    "hang": "Segment did not answer in time",
    "drip": "Segment did not answer in time",
}


@pytest.mark.parametrize(("fault", "reason"), RETRIED.items(), ids=RETRIED.keys())
def test_503_everything_else(relay, segment, fault, reason):
    segment.fault = fault
    answer = relay.post(make_event("a"))
    assert answer.status_code == 503
    assert answer.json()["status"] == "retry"
    assert answer.json()["reason"].startswith(reason)
    assert 1 <= int(answer.headers["Retry-After"]) <= 5
    assert answer.elapsed.total_seconds() < 4  # after which Customer.io would not be there to hear it
    assert segment.events() == []
    assert not any(request["path"] == "/elsewhere" for request in segment.requests)


def test_503_when_nothing_listens(start):
    relay = start(SEGMENT_HOST="http://127.0.0.1:9")
    answer = relay.post(make_event())
    assert (answer.status_code, answer.json()["reason"]) == (503, "the connection to Segment failed")


def test_other_routes_and_methods(relay):
    for path in ("/x", "/webhook/", "/x//webhook", "/webhook/x", "/health/"):
        answer = requests.post(relay.url + path, data=b"{}", timeout=5, allow_redirects=False)
        assert (answer.status_code, answer.json()["status"]) == (404, "rejected"), path
    for method in ("GET", "HEAD", "PUT", "DELETE", "PATCH", "OPTIONS", "PROPFIND"):
        answer = requests.request(method, relay.url + "/webhook", timeout=5)
        assert (answer.status_code, answer.headers["Allow"]) == (405, "POST"), method
        if method != "HEAD":
            assert answer.json()["status"] == "rejected"
    assert requests.post(relay.url + "/health", timeout=5).status_code == 405


def test_health_does_not_ask_segment(start):
    relay = start(SEGMENT_HOST="http://127.0.0.1:9")
    answer = requests.get(relay.url + "/health", timeout=5)
    assert (answer.status_code, answer.json()) == (200, {"status": "ok"})


HALF_WAY = {"silent": "it took too long", "closed": "the body did not arrive whole"}


@pytest.mark.parametrize(("ending", "reason"), HALF_WAY.items(), ids=HALF_WAY.keys())
def test_a_body_that_stops_half_way_is_to_be_sent_again(relay, segment, ending, reason):
    body = json.dumps(make_event()).encode()
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", relay.port, timeout=10)) as connection:
        connection.putrequest("POST", "/webhook")
        for name, value in (sign(body) | {"Content-Length": str(len(body) + 10)}).items():
            connection.putheader(name, value)
        connection.endheaders(body)
        if ending == "closed":
            connection.sock.shutdown(socket.SHUT_WR)
        answer = connection.getresponse()
        assert answer.status == 503
        assert json.loads(answer.read())["reason"] == reason
    assert segment.requests == []


@pytest.mark.parametrize("body", [b"5\r\nabcde\r\n", b"zz\r\n", b"5\r\nabcdefgh\r\n0\r\n\r\n"], ids=repr)
def test_chunks_that_are_cut_or_wrong_are_to_be_sent_again(relay, body):
    with socket.create_connection(("127.0.0.1", relay.port), timeout=10) as client:
        client.sendall(b"POST /webhook HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n" + body)
        client.shutdown(socket.SHUT_WR)
        assert client.recv(100).startswith(b"HTTP/1.1 503")


def test_nothing_personal_in_the_log_of_failures(start, segment):
    relay = start(segment, LOG_LEVEL="debug")
    personal = make_event("secret-id", data={"customer_id": "secret-person", "subject": "secret-subject"})
    for fault in ("500", "reset", "garbage", "html", "401", "redirect", None):
        segment.fault = fault
        relay.post(personal)
    relay.post(personal, headers={})
    relay.post(b"secret-junk")
    assert "not accepted: Segment answered 500" in relay.log
    for secret in ("secret", SIGNING_KEY, "0123456789abcdefghijklmnopqrstuv"):
        assert secret not in relay.log
