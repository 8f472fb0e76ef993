"""What anybody can send to the address: junk in every place, slowly, in masses. Only documented answers come back."""

import contextlib
import http.client
import json
import random
import socket

import pytest
from conftest import make_event, sign

DOCUMENTED = {200, 202, 400, 401, 404, 405, 413, 422, 503}
SEED = 20261123


@pytest.fixture(scope="module")
def rng():
    return random.Random(SEED)


def ask(relay, request, half_close=True):
    """Send raw bytes; return (status, body), or None where the connection is closed without an answer."""
    with socket.create_connection(("127.0.0.1", relay.port), timeout=15) as client:
        with contextlib.suppress(OSError):
            client.sendall(request)
            if half_close:
                client.shutdown(socket.SHUT_WR)
        answer = http.client.HTTPResponse(client, method="HEAD" if request.startswith(b"HEAD") else None)
        try:
            answer.begin()
            return answer.status, answer.read()
        except (http.client.HTTPException, ConnectionError):
            return None


def check_all(relay, requests):
    """Send each request; only documented answers may come back, and most get one."""
    answered = 0
    for request in requests:
        if answer := ask(relay, request):
            answered += 1
            status, body = answer
            assert status in DOCUMENTED, request[:200]
            assert not body or set(json.loads(body)) & {"status"}, request[:200]
    assert answered > len(requests) / 2


def junk(rng, length):
    return rng.randbytes(rng.randrange(length))


def test_bytes_that_are_not_http(relay, rng):
    check_all(relay, [junk(rng, 300) + rng.choice([b"", b"\r\n\r\n"]) for _ in range(150)])
    assert relay.post(make_event()).status_code == 200


def test_methods_targets_and_versions(relay, rng):
    methods = [b"POST", b"GET", b"PRI", b"CONNECT", b"TRACE", b"post", b"P", b"\xc3\x89", b"OPTIONS", b"HEAD"]
    targets = [
        b"/webhook",
        b"*",
        b"//",
        b"/%00",
        b"/%ff",
        b"http://x/webhook",
        b"/webhook?x=\xff",
        b"/" + b"a" * 5000,
        b"",
    ]
    versions = [b"HTTP/1.1", b"HTTP/1.0", b"HTTP/2.0", b"HTTP/9", b"", b"SSH-2.0"]
    requests = []
    for _ in range(150):
        request = b" ".join([rng.choice(methods), rng.choice(targets), rng.choice(versions)])
        requests.append(request + b"\r\nHost: x\r\n\r\n" + rng.choice([b"", b"SM\r\n\r\n", junk(rng, 50)]))
    check_all(relay, requests)
    assert relay.post(make_event()).status_code == 200


def test_headers(relay, rng):
    values = [
        b"",
        b"0",
        b"-1",
        b"+5",
        b"1e3",
        b"99999999999999999999",
        b"chunked",
        b"gzip, chunked",
        b"\xff",
        b"x" * 9000,
    ]
    names = [
        b"Content-Length", b"Transfer-Encoding", b"Expect", b"Connection", b"Upgrade", b"Host",
        b"SCRIPT_NAME", b"PATH_INFO",         b"X-Forwarded-Proto", b"X-Forwarded-For",
        b"X-CIO-Timestamp", b"X-CIO-Signature", b"Content-Type", b"Cookie",
        b"Content-Encoding", b"Range", b"bad name", b":", b"HTTP2-Settings",
    ]  # fmt: skip
    requests = []
    for _ in range(250):
        lines = [rng.choice(names) + b": " + rng.choice([*values, junk(rng, 30)]) for _ in range(rng.randrange(1, 5))]
        requests.append(b"POST /webhook HTTP/1.1\r\n" + b"\r\n".join(lines) + b"\r\n\r\n" + junk(rng, 60))
    requests.append(b"POST /webhook HTTP/1.1\r\n" + b"".join(b"X-%d: y\r\n" % n for n in range(500)) + b"\r\n")
    check_all(relay, requests)
    assert relay.post(make_event()).status_code == 200


def test_bodies_that_are_cut_or_in_odd_chunks(relay, rng):
    body = json.dumps(make_event("a")).encode()
    head = b"POST /webhook HTTP/1.1\r\nHost: x\r\n"
    head += b"".join(f"{name}: {value}\r\n".encode() for name, value in sign(body).items())
    for _ in range(60):
        cut = rng.randrange(len(body))
        request = head + b"Content-Length: %d\r\n\r\n" % len(body) + body[:cut]
        status, _ = ask(relay, request)
        assert status == 503  # genuine, but not whole: to be sent again
        chunks = b"%x\r\n" % cut + body[:cut] + b"\r\n"
        request = (
            head + b"Transfer-Encoding: chunked\r\n\r\n" + chunks + rng.choice([b"", b"\r\n", b"-1\r\n", b"zz\r\n"])
        )
        if cut:
            status, _ = ask(relay, request)
            assert status == 503
    whole = head + b"Transfer-Encoding: chunked\r\n\r\n"
    whole += b"".join(b"1\r\n" + bytes([byte]) + b"\r\n" for byte in body) + b"0\r\n\r\n"
    assert ask(relay, whole)[0] == 200


def test_signed_bodies_of_any_kind(relay, rng):
    for _ in range(150):
        body = rng.choice([junk(rng, 200), json.dumps(rng.choice([[], 1, {}, {"metric": "m"}, {"data": []}])).encode()])
        answer = relay.post(body)
        assert answer.status_code in {200, 202, 400}, body
        assert answer.json()["status"] in {"delivered", "dead-lettered", "rejected"}


@pytest.mark.parametrize("body", [b"[" * 4_000_000, b'{"a":' * 1_000_000, b'{"x":' + b"9" * 1_000_000 + b"}"], ids=len)
def test_bodies_made_to_break_a_parser(relay, body):
    assert relay.post(body).status_code in {202, 400}
    assert relay.post(make_event()).status_code == 200


def test_hundreds_of_slow_clients_stop_nobody(relay):
    """Some send their headers a byte at a time, some their body, some nothing at all."""
    beginnings = [b"", b"P", b"POST /webhook HTTP/1.1\r\nHost: x\r\nContent-Length: 500\r\n\r\n"]
    with contextlib.ExitStack() as stack:
        slow = []
        for number in range(600):
            client = stack.enter_context(socket.create_connection(("127.0.0.1", relay.port), timeout=10))
            client.sendall(beginnings[number % 3])
            slow.append(client)
        for turn in range(3):
            for client in slow:
                with contextlib.suppress(OSError):
                    client.sendall(b"x")
            answers = relay.post_all([make_event(f"{turn}-{number}") for number in range(20)])
            assert {answer.status_code for answer in answers} == {200}
