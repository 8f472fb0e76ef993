"""Delivery as seen from both ends of a real relay: sharing, splitting, retries, one deadline, shutdown, pauses."""

import contextlib
import http.client
import inspect
import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import requests
from conftest import ROOT, WRITE_KEY, make_event, sign, until
from fake_segment import FakeSegment
from segment.analytics import request as segment_request
from segment.analytics.client import Client


def statuses(answers):
    return [answer.status_code for answer in answers]


def test_a_lone_event_is_sent_at_once_and_alone(relay, segment):
    for number in range(3):
        assert relay.post(make_event(number)).status_code == 200
    assert [len(upload) for upload in segment.uploads] == [1, 1, 1]


def test_concurrent_webhooks_share_uploads(start, segment):
    segment.latency = 0.3
    relay = start(segment, WEB_CONCURRENCY="1")
    events = [make_event(number) for number in range(100)]
    assert statuses(relay.post_all(events)) == [200] * 100
    assert sorted(segment.events()) == sorted(event["event_id"] for event in events)
    assert len(segment.uploads) <= 30
    assert max(len(upload) for upload in segment.uploads) > 5


def test_no_upload_is_above_100_events(start, segment):
    relay = start(segment, WEB_CONCURRENCY="1")
    segment.hold()
    with ThreadPoolExecutor(260) as pool:
        answers = [pool.submit(relay.post, make_event(number)) for number in range(260)]
        time.sleep(1.5)
        segment.release()
        assert {answer.result().status_code for answer in answers} <= {200, 503}
    assert max(len(upload) for upload in segment.uploads) <= 100


def test_no_upload_is_above_475_000_bytes(start, segment):
    relay = start(segment, WEB_CONCURRENCY="1")
    segment.latency = 0.3
    events = [make_event(number, data={"customer_id": "1", "pad": "x" * 30_000}) for number in range(60)]
    assert set(statuses(relay.post_all(events))) <= {200, 503}
    assert max(request["size"] for request in segment.requests) <= 475_000
    assert max(len(upload) for upload in segment.uploads) <= 15


@pytest.mark.parametrize("poisoned", [1, 3], ids=["one", "three"])
def test_a_refused_batch_is_split_until_the_event_at_fault_stands_alone(start, segment, poisoned):
    relay = start(segment, WEB_CONCURRENCY="1")
    segment.latency = 0.1
    segment.poison = {"customerio:email_poison"}
    events = [make_event(number, metric="poison" if number % 20 < poisoned else "opened") for number in range(40)]
    answers = relay.post_all(events)
    for event, answer in zip(events, answers, strict=True):
        assert answer.status_code == (202 if event["metric"] == "poison" else 200), answer.text
    good = [event["event_id"] for event in events if event["metric"] == "opened"]
    assert sorted(segment.events()) == sorted(good)
    assert any(len(upload) > 1 and "customerio:email_poison" in upload for upload in segment.uploads)


@pytest.mark.parametrize(
    "fault", ["500", "503", "408", "reset", "close", "cut", "garbage", "hang", "drip", "hang-after", "reset-after"]
)
def test_a_first_failure_is_retried_once(relay, segment, fault):
    segment.faults.append(fault)
    answer = relay.post(make_event("a"))
    assert answer.status_code == 200
    assert answer.elapsed.total_seconds() < 4
    assert segment.events() == ["event-a"]
    assert len(segment.requests) == 2


@pytest.mark.parametrize("fault", ["500", "reset"])
def test_it_is_retried_no_more_than_once(relay, segment, fault):
    segment.fault = fault
    assert relay.post(make_event("a")).status_code == 503
    assert len(segment.requests) == 2


@pytest.mark.parametrize("fault", ["401", "404", "redirect", "html"])
def test_what_a_retry_cannot_mend_is_not_retried(relay, segment, fault):
    segment.fault = fault
    assert relay.post(make_event("a")).status_code == 503
    assert len(segment.requests) == 1


def test_an_answer_that_takes_most_of_the_time_still_counts(relay, segment):
    segment.latency = 2.9
    assert relay.post(make_event("a")).status_code == 200


def test_waiting_for_a_turn_is_within_the_deadline(start, segment):
    relay = start(segment, WEB_CONCURRENCY="1")
    segment.fault = "hang"
    started = time.monotonic()
    with ThreadPoolExecutor(150) as pool:
        answers = [pool.submit(relay.post, make_event(number)) for number in range(150)]
        assert {answer.result().status_code for answer in answers} == {503}
    assert all(answer.result().elapsed.total_seconds() < 4 for answer in answers), time.monotonic() - started
    segment.fault = None
    until(lambda: relay.post(make_event("after")).status_code == 200)


def test_a_rate_limit_is_kept_by_all_workers(start, segment):
    relay = start(segment, WEB_CONCURRENCY="3")
    segment.faults.append("429:2")
    assert relay.post(make_event("a")).status_code == 503
    limited = time.monotonic()
    answers = [relay.post(make_event(number)) for number in range(12)]
    assert set(statuses(answers)) == {503}
    assert {answer.json()["reason"] for answer in answers} == {"Segment is limiting the rate"}
    assert all(1 <= int(answer.headers["Retry-After"]) <= 2 for answer in answers)
    until(lambda: relay.post(make_event("a")).status_code == 200)
    first, second = segment.requests[:2]
    assert second["at"] - first["at"] >= 2
    assert time.monotonic() - limited < 5


def test_a_rate_limit_is_kept_for_five_seconds_at_most(relay, segment):
    segment.faults.append("429:300")
    answer = relay.post(make_event("a"))
    assert (answer.status_code, answer.headers["Retry-After"]) == (503, "5")
    until(lambda: relay.post(make_event("a")).status_code == 200)
    first, second = segment.requests
    assert 5 <= second["at"] - first["at"] < 7


def test_proxies_of_the_environment_are_used(start, segment):
    relay = start(None, SEGMENT_HOST="http://segment.invalid", HTTP_PROXY=segment.url, http_proxy=segment.url)
    assert relay.post(make_event("a")).status_code == 503  # our fake is no proxy; but it was asked
    assert segment.requests[0]["path"] == "http://segment.invalid/v1/batch"


def test_netrc_is_not_used(start, segment, tmp_path):
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login someone password else\ndefault login a password b\n")
    relay = start(segment, HOME=str(tmp_path), NETRC=str(tmp_path / ".netrc"))
    assert relay.post(make_event("a")).status_code == 200  # the fake checks the key in the Authorization header


@pytest.mark.skipif(not shutil.which("openssl"), reason="no openssl to make a certificate with")
def test_segment_needs_a_certificate_that_is_trusted(start, tmp_path):
    key, certificate, folder = tmp_path / "key.pem", tmp_path / "certificate.pem", tmp_path / "trusted"
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=127.0.0.1"
    more = ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", certificate]
    subprocess.run([*command.split(), *more], check=True, capture_output=True)
    folder.mkdir()
    shutil.copy(certificate, folder)
    subprocess.run(["openssl", "rehash", folder], check=True, capture_output=True)
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificate, key)
    with FakeSegment(tls=tls) as segment:
        answer = start(segment).post(make_event("a"))
        assert (answer.status_code, answer.json()["reason"]) == (503, "the connection to Segment failed")
        assert segment.requests == []
        for trusted in (certificate, folder):
            relay = start(segment, REQUESTS_CA_BUNDLE=str(trusted))
            assert statuses(relay.post(make_event(number)) for number in range(3)) == [200] * 3
    assert sorted(segment.events()) == ["event-0", "event-1", "event-2"]


def test_connections_to_segment_are_kept(relay, segment):
    for number in range(6):
        assert relay.post(make_event(number)).status_code == 200
    assert segment.open_connections <= 2  # one for each worker


def in_flight(relay, segment, number):
    """Post webhooks that Segment holds; return their futures once all have arrived there."""
    segment.hold()
    pool = ThreadPoolExecutor(number)
    answers = [pool.submit(relay.post, make_event(n)) for n in range(number)]
    until(lambda: sum(len(upload) for upload in segment.uploads) == number)
    return answers


def test_sigterm_answers_what_is_in_flight(relay, segment):
    answers = in_flight(relay, segment, 5)
    relay.process.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    segment.release()
    assert statuses(answer.result() for answer in answers) == [200] * 5
    assert relay.process.wait(10) == 0


def test_sigterm_does_not_wait_for_idle_connections_nor_hang_up_on_them(relay, segment):
    body = json.dumps(make_event("a")).encode()
    with contextlib.ExitStack() as stack:
        idle = [stack.enter_context(requests.Session()) for _ in range(20)]
        for session in idle:
            assert session.post(relay.url + "/webhook", body, headers=sign(body), timeout=5).status_code == 200
        relay.process.send_signal(signal.SIGTERM)
        time.sleep(1.2)  # no new connections now, but the old ones are still answered
        answer = idle[0].post(relay.url + "/webhook", body, headers=sign(body), timeout=5)
        assert (answer.status_code, answer.headers["Connection"]) == (200, "close")
        assert relay.process.wait(8) == 0
    assert "Traceback" not in relay.log


def test_a_worker_that_only_just_started_leaves_too(start):
    relay = start(DRY_RUN="1")
    (first,) = relay.workers()
    os.kill(first, signal.SIGKILL)
    until(lambda: set(relay.workers()) - {first})
    relay.process.send_signal(signal.SIGTERM)
    # gunicorn kills after ten seconds what has not left by itself.
    assert relay.process.wait(8) == 0


def test_a_reload_refuses_nobody(relay, segment):
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
        time.sleep(0.3)
        stop.set()
        for job in running:
            job.result()
    assert set(seen) == {200}


def test_a_killed_worker_told_nobody_200(relay, segment):
    answers = in_flight(relay, segment, 4)
    for pid in relay.workers():
        os.kill(pid, signal.SIGKILL)
    for answer in answers:
        with pytest.raises(requests.ConnectionError):
            answer.result()
    segment.release()
    until(lambda: relay.post(make_event("after")).status_code == 200)


def test_a_slow_webhook_is_cut_at_the_deadline_and_stops_nobody(relay, segment):
    slow = [socket.create_connection(("127.0.0.1", relay.port)) for _ in range(300)]
    for client in slow:
        client.sendall(b"POST /webhook HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{")
    assert statuses(relay.post_all([make_event(number) for number in range(10)])) == [200] * 10
    for client in slow:
        client.settimeout(10)
        assert client.recv(100).startswith(b"HTTP/1.1 503")
        client.close()


def test_what_is_not_http_is_answered_in_json_and_not_logged(relay):
    for junk in (b"GARBAGE\r\n\r\n", b"POST /webhook HTTP/1.1\r\nbad header secret\r\n\r\n", b"get / HTTP/1.1\r\n\r\n"):
        with socket.create_connection(("127.0.0.1", relay.port), timeout=10) as client:
            client.sendall(junk)
            answer = http.client.HTTPResponse(client)
            answer.begin()
            assert answer.status == 400
            assert json.loads(answer.read())["status"] == "rejected"
    assert "not an HTTP request" in relay.log
    assert "secret" not in relay.log
    assert "127.0.0.1:" not in relay.log.replace("http://127.0.0.1", "")


def test_the_library_still_is_what_the_code_relies_on():
    post = inspect.signature(segment_request.post).parameters
    assert {"write_key", "host", "timeout", "kwargs"} <= set(post)
    assert callable(segment_request._session.post)
    assert segment_request.APIError(429, "code", "text", "response").response == "response"
    context = {}
    done, message = Client(WRITE_KEY, send=False).track(user_id="1", event="e", context=context, message_id="m")
    assert done is True
    assert (message["type"], message["userId"], message["messageId"]) == ("track", "1", "m")
    assert "library" in message["context"]
    with pytest.raises(RuntimeError, match="limit"):
        Client(WRITE_KEY, send=False).track(user_id="1", event="e", properties={"x": "x" * 33_000})


def test_what_the_library_sends(relay, segment):
    body = []
    take = segment._take

    def spy(headers, content):
        body.append(json.loads(content))
        return take(headers, content)

    segment._take = spy
    relay.post(json.loads((ROOT / "tests/events/legacy.json").read_text()))
    ((upload),) = body
    assert set(upload) == {"batch", "sentAt", "writeKey"}
    assert upload["writeKey"] == WRITE_KEY
    assert [message["event"] for message in upload["batch"]] == ["customerio:email_delivered"]
