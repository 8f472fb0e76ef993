"""What only a real gunicorn can show: sockets, signals, several workers, and many webhooks at the same time."""

import contextlib
import gc
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import gevent
import gunicorn.errors
import gunicorn.glogging
import gunicorn.http.errors
import pytest
import requests
from conftest import (
    IN_TIME,
    ROOT,
    SEGMENT_PORT,
    SIGNING_KEY,
    WRITE_KEY,
    Client,
    InProcess,
    Relay,
    answers,
    free_port,
    make_event,
    sign,
    until,
)
from fake_segment import FakeSegment
from gevent.server import StreamServer
from gunicorn.arbiter import Arbiter
from gunicorn.http.body import ChunkedReader
from gunicorn.workers.ggevent import GeventWorker

from relay.delivery import MAX_UPLOADS
from server.shared import Pause, Shared
from server.worker import Worker


def statuses(answers):
    return [answer.status_code for answer in answers]


def open_files(pid):
    return len(os.listdir(f"/proc/{pid}/fd"))


def stopped_listening(relay):
    return not answers(relay.url + "/health")


# The same webhook in all its spellings, and under other servers. ---------------------------------

WAYS = {
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


# What a proxy may add or change: a webhook all the same.
ADDED = {
    "two schemes": b"X-Forwarded-Proto: https\r\nX-Forwarded-Ssl: off\r\n",
    "two schemes, one name": b"X-Forwarded-Proto: https\r\nX-Forwarded-Proto: http\r\n",
    "forwarded hosts": b"X-Forwarded-Host: a..b\r\nForwarded: for=[::1\r\nX-Forwarded-Port: x\r\n",
    "a path": b"SCRIPT_NAME: /x\r\nPATH_INFO: /y\r\nScript-Name: /z\r\n",
    "a name with an underscore": b"X_Trace: 1\r\n",
    "HTTP/2": b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA\r\n",
    "WebSocket": b"Connection: Upgrade\r\nUpgrade: websocket\r\n",
    "a long cookie": b"Cookie: " + b"x" * 40_000 + b"\r\n",
    "150 fields": b"".join(b"X-%d: y\r\n" % number for number in range(150)),
    "no ASCII": b"Cookie: \xff=;;\x80\r\nAccept-Language: \xff\r\nAuthorization: Basic \xff\r\n",
    "conditions": b'If-None-Match: "\r\nRange: bytes=-\r\nIf-Modified-Since: x\r\nDate: x\r\nAccept: ;;q=x\r\n',
    "another method": b"X-HTTP-Method-Override: GET\r\n",
}
# What contradicts itself, or can't be understood.
NOT_UNDERSTOOD = {
    "two hosts": b"Host: x\r\n",
    "two types": b"Content-Type: text/plain\r\n",
    "two lengths": b"Content-Length: 5\r\n",
    "a length and chunks": b"Transfer-Encoding: chunked\r\n",
    "an unknown coding": b"Transfer-Encoding: foo\r\n",
    "a coding without a length": b"Transfer-Encoding: gzip\r\n",
    "another expectation": b"Expect: something\r\n",
    "a folded line": b"X: a\r\n b\r\n",
    "a control character": b"X: \x01\r\n",
    "a blank in a name": b"X : a\r\n",
    "too many fields": b"".join(b"X-%d: y\r\n" % number for number in range(250)),
    "a head of 90 KB": (b"X: " + b"y" * 30_000 + b"\r\n") * 3,
}


def answer_to(relay, more, line=b"POST /webhook HTTP/1.1", host=b"relay.example"):
    """Send a signed webhook whose head has `more`; return the answer."""
    body = json.dumps(make_event("a")).encode()
    headers = sign(body) | {"Content-Length": str(len(body))}
    head = b"".join(f"{name}: {value}\r\n".encode() for name, value in headers.items())
    with socket.create_connection(("127.0.0.1", relay.port), timeout=10) as client:
        client.sendall(line + b"\r\nHost: " + host + b"\r\n" + head + more + b"\r\n" + body)
        return answer_on(client)


@pytest.mark.parametrize("more", ADDED.values(), ids=ADDED.keys())
def test_200_whatever_a_proxy_adds(relay, more):
    status, answer = answer_to(relay, more)
    assert (status, answer["status"]) == (200, "delivered")


HOSTS = [
    b"a" * 64 + b".b",
    b"a..b",
    b".a",
    b"",
    b"\xc3\xa9.fr",
    b"\xe9",
    b"a b<c>",
    b"[::1]:80",
    b"[",
    b"a:b",
    b"xn--\xff",
]


@pytest.mark.parametrize("host", HOSTS, ids=repr)
def test_200_whatever_the_host(relay, host):
    status, answer = answer_to(relay, b"", host=host)
    assert (status, answer["status"]) == (200, "delivered")
    for path in (b"/health", b"/"):
        with socket.create_connection(("127.0.0.1", relay.port), timeout=10) as client:
            client.sendall(b"GET " + path + b" HTTP/1.0\r\nHost: " + host + b"\r\n\r\n")
            assert b" 200 OK\r\n" in client.recv(100)


@pytest.mark.parametrize("more", NOT_UNDERSTOOD.values(), ids=NOT_UNDERSTOOD.keys())
def test_422_what_cannot_be_understood_and_the_answer_arrives(relay, more):
    before = relay.counted("rejected", "not_http")
    assert answer_to(relay, more) == (422, {"status": "rejected", "reason": "not an HTTP request"})
    until(lambda: relay.counted("rejected", "not_http") > before)


@pytest.mark.parametrize("line", [b"POST //webhook HTTP/1.1", b"POST http://a..b/webhook HTTP/1.1"], ids=repr)
def test_200_whatever_stands_before_the_path(relay, line):
    assert answer_to(relay, b"", line=line)[0] == 200


class FlaskRun(Client):
    """The relay as `flask --app app run` serves it: with a real thread for each connection."""

    def __init__(self, segment):
        self.port = free_port()
        env = {"SEGMENT_WRITE_KEY": WRITE_KEY, "CUSTOMERIO_SIGNING_KEY": SIGNING_KEY, "SEGMENT_HOST": segment.url}
        command = [sys.executable, "-m", "flask", "--app", "app", "run", "--port", str(self.port)]
        quiet = subprocess.DEVNULL
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=env | {"PATH": os.environ["PATH"]}, stdout=quiet, stderr=quiet
        )

    def request(self, method, path, body=b"", headers=()):
        return Relay.request(self, method, path, body, headers)

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}"


@pytest.fixture
def flask_run(segment):
    server = FlaskRun(segment)
    try:
        until(lambda: answers(server.url + "/health"))
        yield server
    finally:
        server.process.kill()
        server.process.wait()


SERVERS = {
    "test_client": lambda request, segment: InProcess(segment),
    "gunicorn": lambda request, segment: request.getfixturevalue("relay"),
    "flask run": lambda request, segment: request.getfixturevalue("flask_run"),
}


@pytest.mark.gunicorn
@pytest.mark.parametrize("server", SERVERS.values(), ids=SERVERS.keys())
def test_200_under_another_server(request, segment, server):
    client = server(request, segment)
    segment.latency = 0.1
    events = [make_event(number) for number in range(3 * MAX_UPLOADS)]
    assert statuses(client.post_all(events)) == [200] * len(events)
    assert sorted(segment.events()) == sorted(event["event_id"] for event in events)
    assert segment.most_busy > 1
    assert client.post(events[0], headers={}).status_code == 422
    assert client.post(make_event(metric=None)).status_code == 202
    assert client.post(b"[]").status_code == 202
    segment.faults.extend(["500", "reset"])
    assert client.post(events[0]).status_code == 503
    assert client.post(events[0]).status_code == 200
    assert client.get("/metrics").status_code == client.get("/").status_code == 200


# Sharing uploads. --------------------------------------------------------------------------------


def test_a_lone_event_is_sent_at_once_and_alone(relay, segment):
    for number in range(3):
        assert relay.post(make_event(number)).status_code == 200
    assert [len(upload) for upload in segment.uploads] == [1, 1, 1]


def post_while_all_uploads_are_out(relay, segment, events):
    """Post webhooks that share the next uploads, since Segment holds as many as there may be; return their answers.

    All must have come before the first one's time is up: a busy machine has three attempts.
    """
    for _ in range(3):
        for seen in (segment.requests, segment.uploads, segment.kept):
            seen.clear()
        fillers, answered = post_behind_fillers(relay, segment, events)
        if 503 not in statuses(fillers + answered):
            break
    assert statuses(fillers) == [200] * MAX_UPLOADS
    assert [len(upload) for upload in segment.uploads[:MAX_UPLOADS]] == [1] * MAX_UPLOADS
    return answered


def post_behind_fillers(relay, segment, events):
    (worker,) = relay.workers()
    segment.hold()
    with ThreadPoolExecutor(MAX_UPLOADS + len(events)) as pool:
        fillers = []
        for number in range(MAX_UPLOADS):
            fillers.append(pool.submit(relay.post, make_event(f"filler-{number}")))
            until(lambda: segment.busy == len(fillers))
        before = open_files(worker)
        posted = [pool.submit(relay.post, event) for event in events]
        until(lambda: open_files(worker) >= before + len(events) or fillers[0].done())
        assert relay.get("/health").status_code == 200  # in line behind all of them
        segment.release()
        return [future.result() for future in fillers], [future.result() for future in posted]


def test_concurrent_webhooks_share_uploads(one_worker, segment):
    events = [make_event(number) for number in range(85)]
    assert statuses(post_while_all_uploads_are_out(one_worker, segment, events)) == [200] * 85
    assert {event["event_id"] for event in events} <= set(segment.events())
    assert len(segment.events()) == MAX_UPLOADS + 85
    assert len(segment.uploads) <= 30
    assert max(len(upload) for upload in segment.uploads) > 5


def test_no_upload_is_above_100_events(one_worker, segment):
    events = [make_event(number) for number in range(245)]
    assert statuses(post_while_all_uploads_are_out(one_worker, segment, events)) == [200] * 245
    assert max(len(upload) for upload in segment.uploads) == 100


def test_no_upload_is_above_475_000_bytes(one_worker, segment):
    events = [make_event(number, data={"customer_id": "1", "pad": "x" * 30_000}) for number in range(60)]
    assert statuses(post_while_all_uploads_are_out(one_worker, segment, events)) == [200] * 60
    assert max(request["size"] for request in segment.requests) <= 475_000
    assert 10 < max(len(upload) for upload in segment.uploads) <= 15


@pytest.mark.parametrize("poisoned", [1, 3], ids=["one", "three"])
def test_a_refused_batch_is_split_until_the_event_at_fault_stands_alone(one_worker, segment, poisoned):
    segment.poison = {"customerio:email_poison"}
    events = [make_event(number, metric="poison" if number % 20 < poisoned else "opened") for number in range(40)]
    answered = post_while_all_uploads_are_out(one_worker, segment, events)
    for event, answer in zip(events, answered, strict=True):
        assert answer.status_code == (202 if event["metric"] == "poison" else 200), answer.text
    good = {event["event_id"] for event in events if event["metric"] == "opened"}
    ours = [identity for identity in segment.events() if identity]  # the relay's own check of the key has none
    assert {identity for identity in ours if "filler" not in identity} == good
    assert any(len(upload) > 1 and "customerio:email_poison" in upload for upload in segment.uploads)


def test_connections_to_segment_are_kept(relay, segment):
    for number in range(6):
        assert relay.post(make_event(number)).status_code == 200
    assert segment.open_connections <= 2  # one for each worker


# Second attempts, and no answer at all. ----------------------------------------------------------


@pytest.mark.parametrize("fault", ["500", "503", "408", "reset", "close", "cut", "garbage", "reset-after"])
def test_a_first_failure_is_retried_once(anywhere, segment, fault):
    segment.faults.append(fault)
    answer = anywhere.post(make_event("a"))
    assert answer.status_code == 200
    assert answer.seconds < 4
    assert segment.events() == ["event-a"]
    assert len(segment.requests) == 2


@pytest.mark.parametrize("fault", ["500", "reset"])
def test_it_is_retried_no_more_than_once(anywhere, segment, fault):
    segment.fault = fault
    assert anywhere.post(make_event("a")).status_code == 503
    assert len(segment.requests) == 2


@pytest.mark.parametrize("fault", ["401", "404", "redirect", "html"])
def test_what_a_retry_cannot_fix_is_not_retried(anywhere, segment, fault):
    segment.fault = fault
    assert anywhere.post(make_event("a")).status_code == 503
    assert len(segment.requests) == 1


ENDLESS = {"hang": [], "hang-after": ["event-hang-after"], "drip": []}  # what Segment does -> what it keeps


@pytest.fixture(scope="module")
def waited_for(shared_relay, shared_relay_of_one_worker):
    """Webhooks that wait long for Segment, all at the same time: their answers, by what Segment does.

    "late" is a good answer after 2.2 s, "crowd" the answers to 150 webhooks of which Segment answers none.
    With them the faults of all uploads, and the events that Segment kept.
    """
    posted = {}
    with FakeSegment(SEGMENT_PORT) as segment, ThreadPoolExecutor() as pool:
        for fault in ENDLESS:
            segment.faults.append(fault)
            posted[fault] = pool.submit(shared_relay.post, make_event(fault))
            until(lambda: len(segment.requests) == len(posted))
        segment.hold()
        threading.Timer(2.2, segment.release).start()
        posted["late"] = pool.submit(shared_relay.post, make_event("late"))
        until(lambda: len(segment.requests) == len(posted))
        segment.fault = "hang"
        crowd = [make_event(number) for number in range(150)]
        answered = {"crowd": shared_relay_of_one_worker.post_all(crowd)}
        answered |= {fault: future.result() for fault, future in posted.items()}
        # No upload outlives its deadline. Of the connections that ended early, the fake notices the one that drips.
        until(lambda: segment.open_connections < len(segment.requests))
        return answered, [request["fault"] for request in segment.requests[: len(posted)]], segment.events()


@pytest.mark.parametrize(("fault", "kept"), ENDLESS.items(), ids=ENDLESS.keys())
def test_503_in_time_when_segment_does_not_answer(waited_for, fault, kept):
    """Only gevent can end an answer that drips."""
    answered, faults, events = waited_for
    answer = answered[fault]
    assert (answer.status_code, answer.json()["status"]) == (503, "retry")
    assert answer.json()["reason"] == "Segment did not answer in time"
    assert answer.headers["Retry-After"] == "1"
    assert answer.seconds < 4  # Customer.io hangs up then
    assert faults.count(fault) == 1  # a timeout is not retried
    assert [event for event in events if event == f"event-{fault}"] == kept


def test_an_answer_that_takes_most_of_the_time_still_counts(waited_for):
    answered, faults, events = waited_for
    assert answered["late"].status_code == 200
    assert answered["late"].seconds > 2.1
    assert "event-late" in events
    assert faults == [*ENDLESS, None]


def test_waiting_for_an_upload_is_within_the_deadline(waited_for, one_worker):
    answered, _, _ = waited_for
    assert statuses(answered["crowd"]) == [503] * 150
    assert max(answer.seconds for answer in answered["crowd"]) < IN_TIME
    until(lambda: one_worker.post(make_event("after")).status_code == 200)


# The rate limit. ---------------------------------------------------------------------------------


def test_a_rate_limit_is_kept_by_all_workers(start, segment):
    relay = start(segment, WEB_CONCURRENCY="3")
    segment.faults.append("429:5")
    assert relay.post(make_event("a")).status_code == 503
    answered = relay.post_all([make_event(number) for number in range(12)])
    assert statuses(answered) == [503] * 12
    assert {answer.json()["reason"] for answer in answered} == {"Segment is limiting the rate"}
    assert {answer.headers["Retry-After"] for answer in answered} <= set("12345")
    until(lambda: relay.post(make_event("a")).status_code == 200)
    first, second = segment.requests[:2]
    assert second["at"] - first["at"] >= 5


def test_a_rate_limit_is_kept_for_five_seconds_at_most(segment):
    now = 1_000.0
    memory = Shared()
    memory.pause = Pause(clock=lambda: now)
    client = InProcess(segment, memory)
    segment.faults.append("429:300")
    answer = client.post(make_event("a"))
    assert (answer.status_code, answer.headers["Retry-After"]) == (503, "5")
    now += 4.9
    answer = client.post(make_event("a"))
    assert (answer.status_code, answer.headers["Retry-After"]) == (503, "1")
    assert len(segment.requests) == 1
    now += 0.2
    assert client.post(make_event("a")).status_code == 200
    assert len(segment.requests) == 2


# Signals, restarts and workers that die. ---------------------------------------------------------


def in_flight(relay, segment, number):
    """Post webhooks that Segment holds; return their futures once all have arrived there."""
    segment.hold()
    pool = ThreadPoolExecutor(number)
    posted = [pool.submit(relay.post, make_event(n)) for n in range(number)]
    until(lambda: sum(len(upload) for upload in segment.uploads) == number)
    return posted


def test_sigterm_answers_what_is_in_flight(start, segment):
    relay = start(segment)
    posted = in_flight(relay, segment, 5)
    relay.process.send_signal(signal.SIGTERM)
    until(lambda: stopped_listening(relay))
    segment.release()
    assert statuses(future.result() for future in posted) == [200] * 5
    assert relay.process.wait(10) == 0


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR2], ids=["HUP", "USR2"])
def test_a_signal_for_the_arbiter_that_its_workers_get_too_ends_nobody(start, segment, number):
    """As from `pkill -HUP gunicorn`, or a terminal that is closed."""
    relay = start(segment)
    posted = in_flight(relay, segment, 5)
    workers = relay.workers()
    for worker in workers:
        os.kill(worker, number)
    assert relay.get("/health").status_code == 200
    segment.release()
    assert statuses(future.result() for future in posted) == [200] * 5
    assert relay.workers() == workers


def test_a_worker_that_is_told_to_stop_as_soon_as_it_is_forked_stops(start, segment):
    relay = start(segment, WEB_CONCURRENCY="1")
    for _ in range(10):
        before = relay.workers()
        for worker in before:
            os.kill(worker, signal.SIGKILL)
        found = []
        while not found:  # without a pause: the moment is short
            found = [worker for worker in relay.workers() if worker not in before]
        os.kill(found[0], signal.SIGTERM)
        until(lambda: found[0] not in relay.workers())  # noqa: B023
    assert relay.post(make_event()).status_code == 200


def test_sigterm_does_not_wait_for_idle_connections_nor_hang_up_on_them(start, segment):
    relay = start(segment)
    body = json.dumps(make_event("a")).encode()
    with contextlib.ExitStack() as stack:
        idle = [stack.enter_context(requests.Session()) for _ in range(20)]

        def post(session):
            answer = session.post(relay.url + "/webhook", body, headers=sign(body), timeout=5)
            assert answer.status_code == 200
            return answer.headers["Connection"]

        assert [post(session) for session in idle] == ["keep-alive"] * 20
        relay.process.send_signal(signal.SIGTERM)
        for session in idle[:5]:
            until(lambda: post(session) == "close")  # noqa: B023 - once its worker knows, and not by hanging up
        assert relay.process.wait(8) == 0
    assert "Traceback" not in relay.whole_log()


def test_a_worker_that_only_just_started_leaves_too(start):
    relay = start(DRY_RUN="force")
    (first,) = relay.workers()
    os.kill(first, signal.SIGKILL)
    until(lambda: set(relay.workers()) - {first})
    relay.process.send_signal(signal.SIGTERM)
    # gunicorn kills after ten seconds what has not left by itself.
    assert relay.process.wait(8) == 0


def test_a_reload_refuses_nobody(start, segment):
    relay = start(segment)
    segment.latency = 0.05
    stop = threading.Event()
    seen = []

    def keep_posting(number):
        while not stop.is_set():
            seen.append(relay.post(make_event(f"{number}-{len(seen)}")).status_code)

    with ThreadPoolExecutor(4) as pool:
        running = [pool.submit(keep_posting, number) for number in range(4)]
        until(lambda: len(seen) > 20)
        before = set(relay.workers())
        relay.process.send_signal(signal.SIGHUP)
        until(lambda: relay.workers() and not before & set(relay.workers()), 20)
        after = len(seen)
        until(lambda: len(seen) > after + 20)
        stop.set()
        for job in running:
            job.result()
    assert set(seen) == {200}
    assert f'relay_webhooks_total{{outcome="delivered",reason=""}} {len(seen)}.0' in relay.get("/metrics").text


def test_a_killed_worker_told_nobody_200(start, segment):
    relay = start(segment)
    posted = in_flight(relay, segment, 4)
    workers = relay.workers()
    assert len(workers) == 2
    for pid in workers:
        os.kill(pid, signal.SIGKILL)
    broken = [future.exception() for future in posted]
    assert [isinstance(error, requests.ConnectionError) for error in broken] == [True] * 4
    segment.release()
    until(lambda: answers(relay.url + "/health"))
    assert relay.post(make_event("after")).status_code == 200


def test_max_requests_and_the_access_log_see_webhooks(start, segment):
    relay = start(segment, ["--max-requests", "5", "--access-logfile", "-"], WEB_CONCURRENCY="1")
    (first,) = relay.workers()
    answered = [relay.post(make_event(number)) for number in range(5)]
    assert statuses(answered) == [200] * 5
    until(lambda: relay.workers() and first not in relay.workers())
    until(lambda: relay.log.count('"POST /webhook HTTP/1.1" 200') == 5)
    assert "Autorestarting worker" in relay.log


def test_nothing_is_written_to_disk(start, segment, tmp_path):
    folder = tmp_path / "tmp"
    folder.mkdir()
    relay = start(segment, TMPDIR=str(folder), HOME=str(folder), PYTHONDONTWRITEBYTECODE="1")
    before = set(ROOT.rglob("*"))
    segment.faults.append("500")
    assert statuses(relay.post_all([make_event(number) for number in range(20)])) == [200] * 20
    assert relay.post(make_event(metric=None)).status_code == 202
    assert relay.get("/metrics").status_code == relay.get("/").status_code == 200
    assert relay.workers()
    for pid in relay.workers():
        targets = [os.readlink(file) for file in Path(f"/proc/{pid}/fd").iterdir() if file.is_symlink()]
        assert not [target for target in targets if str(folder) in target and "(deleted)" not in target]
    assert list(folder.iterdir()) == []
    assert {path for path in ROOT.rglob("*") if path not in before and ".jsonl" in path.name} == set()


# Bodies that are slow, cut, or in chunks. --------------------------------------------------------


def test_413_above_8_mib_in_chunks(relay):
    answer = requests.post(relay.url + "/webhook", data=(b"x" * 1_000_000 for _ in range(9)), timeout=20)
    assert (answer.status_code, answer.json()["status"]) == (413, "rejected")


def half_of_a_webhook(number=1):
    """Return a signed request that promises ten bytes more than it has."""
    body = json.dumps(make_event(number)).encode()
    headers = sign(body) | {"Host": "x", "Content-Length": str(len(body) + 10)}
    head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    return f"POST /webhook HTTP/1.1\r\n{head}\r\n".encode() + body


def answer_on(client, connection=None):
    with contextlib.closing(http.client.HTTPResponse(client)) as answer:
        answer.begin()
        assert connection in (None, answer.headers["Connection"])
        return answer.status, json.loads(answer.read())


def test_a_body_that_stops_half_way_is_to_be_sent_again(relay, segment):
    with socket.create_connection(("127.0.0.1", relay.port), timeout=10) as client:
        client.sendall(half_of_a_webhook())
        client.shutdown(socket.SHUT_WR)
        assert answer_on(client) == (503, {"status": "retry", "reason": "the body did not arrive whole"})
    assert segment.requests == []


def test_a_slow_webhook_is_cut_at_the_deadline_and_stops_nobody(start, segment):
    relay = start(segment)
    with contextlib.ExitStack() as stack:
        slow = [
            stack.enter_context(socket.create_connection(("127.0.0.1", relay.port), timeout=10)) for _ in range(300)
        ]
        for number, client in enumerate(slow):
            client.sendall(half_of_a_webhook(f"slow-{number}"))
        assert statuses(relay.post_all([make_event(number) for number in range(10)])) == [200] * 10
        for client in slow:
            assert answer_on(client, connection="close") == (503, {"status": "retry", "reason": "it took too long"})
            assert client.recv(1) == b""
    assert sorted(segment.events()) == [f"event-{number}" for number in range(10)]


@pytest.mark.parametrize("body", [b"5\r\nabcde\r\n", b"zz\r\n", b"5\r\nabcdefgh\r\n0\r\n\r\n"], ids=repr)
def test_chunks_that_are_cut_or_wrong_are_to_be_sent_again(relay, body):
    with socket.create_connection(("127.0.0.1", relay.port), timeout=10) as client:
        client.sendall(b"POST /webhook HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n" + body)
        client.shutdown(socket.SHUT_WR)
        assert client.recv(100).startswith(b"HTTP/1.1 503")


# The log. ----------------------------------------------------------------------------------------


def test_what_is_not_http_is_answered_in_json_and_not_logged(relay):
    logged = relay.log_of(lambda: None)
    for junk in (
        b"POST /webhook HTTP/1.1\r\nbad header secret\r\n",
        b"GARBAGE secret\r\n",
        b"get /secret HTTP/1.1\r\n",
    ):
        with socket.create_connection(("127.0.0.1", relay.port), timeout=10) as client:
            client.sendall(junk + b"\r\n")
            answer = http.client.HTTPResponse(client)
            answer.begin()
            assert answer.status == 422
            assert json.loads(answer.read()) == {"status": "rejected", "reason": "not an HTTP request"}
    until(lambda: "answered 422: not an HTTP request" in logged())
    assert relay.counted("rejected", "not_http") >= 3
    assert "secret" not in logged()
    assert "127.0.0.1" not in logged()


def test_nothing_personal_in_the_log_of_failures(start, segment):
    relay = start(segment, LOG_LEVEL="debug")
    personal = make_event("secret-id", data={"customer_id": "secret-person", "subject": "secret-subject"})
    for fault in ("500", "reset", "garbage", "html", "401", "redirect", None):
        segment.fault = fault
        relay.post(personal)
    relay.post(personal, headers={})
    relay.post(b"secret-junk", headers={})
    until(lambda: "answered 503: Segment answered 500" in relay.log)
    relay.kill()
    for secret in ("secret", SIGNING_KEY, WRITE_KEY):
        assert secret not in relay.whole_log()


class Request:
    """A request as gunicorn parses it, read to its end."""

    path = "/webhook"
    headers = ()
    body = SimpleNamespace(failed=False, reader=SimpleNamespace(length=0))

    def should_close(self):
        return False


def test_a_request_is_freed_once_it_is_answered(monkeypatch):
    """Kept alive by itself it would stay, with its body, until the garbage collector comes by: 13 MB under load."""
    monkeypatch.setattr("server.worker.GeventWorker.handle_request", lambda *_: None)
    connection = SimpleNamespace(
        yield_if_pipelined=lambda: None, flush=lambda: None, count_fields=lambda _: None, worth_keeping=True, ended=0
    )
    request = Request()
    gone = weakref.ref(request)
    object.__new__(Worker).handle_request("", request, connection, "")
    assert request.should_close() is False
    gc.disable()
    try:
        del request
        assert gone() is None
    finally:
        gc.enable()


def test_a_request_that_hangs_is_ended(monkeypatch):
    monkeypatch.setattr("server.worker.GeventWorker.handle_request", lambda *_: gevent.sleep(60))
    monkeypatch.setattr("server.worker.LONGEST", 0.01)
    connection = SimpleNamespace(
        yield_if_pipelined=lambda: None, flush=lambda: None, count_fields=lambda _: None, worth_keeping=True, ended=0
    )
    with pytest.raises(RuntimeError, match="it hangs"):  # which gets a 503
        object.__new__(Worker).handle_request("", Request(), connection, "")


AFTER_A_BODY = {  # the end of a body in chunks -> the answer
    "a field of 5 KB": (b"0\r\nX: " + b"y" * 5_000 + b"\r\n\r\n", 422),
    "fields of 40 KB": (b"0\r\n" + b"".join(b"X-%d: %s\r\n" % (n, b"y" * 5_000) for n in range(8)) + b"\r\n", 503),
    "words of 5 KB beside a length": (b"0;x=" + b"y" * 5_000 + b"\r\n\r\n", 422),
    "words of 40 KB beside a length": (b"0;x=" + b"y" * 40_000, 503),  # before more of them comes
}


@pytest.mark.parametrize(("end", "status"), AFTER_A_BODY.values(), ids=AFTER_A_BODY.keys())
def test_what_comes_with_chunks_is_bounded(relay, end, status):
    with socket.create_connection(("127.0.0.1", relay.port), timeout=10) as client:
        client.sendall(b"POST /webhook HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n" + end)
        answered, answer = answer_on(client)
        assert answered == status
        assert answer["reason"] != "it took too long"


# What server/worker.py and gunicorn.conf.py lean on, besides documented settings and hooks. An upper bound in
# requirements.in keeps other versions out.
INTERNALS = {
    "the worker's steps": (
        GeventWorker,
        "init_process init_signals notify handle timeout_ctx handle_request handle_error handle_exit".split(),
    ),
    "the parser's errors": (gunicorn.http.errors, ["ParseException", "LimitRequestHeaders"]),
    "a body in chunks": (ChunkedReader, ["parse_chunk_size", "parse_trailers"]),
    "what ends the arbiter": (gunicorn.errors, ["AppImportError"]),
    "the arbiter's workers": (Arbiter, ["WORKERS"]),
    "how many connections are accepted at a time": (StreamServer, ["max_accept"]),
    "the log": (gunicorn.glogging.Logger, ["setup"]),
}


@pytest.mark.parametrize(("owner", "names"), INTERNALS.values(), ids=INTERNALS.keys())
def test_gunicorn_still_is_what_the_worker_leans_on(owner, names):
    assert [name for name in names if not hasattr(owner, name)] == []
