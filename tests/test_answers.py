"""Every row of the table of answers."""

import contextlib
import errno
import json
import os
import stat
import time

import pytest
from conftest import SIGNING_KEY, InProcess, make_event, sign
from fake_segment import FAULTS, LATE

from config import ConfigError
from ops.found import find
from ops.monitor.metrics import Metrics
from translate import Ignored, kind, translate


def letters(text):
    """Return the dead letters in a log."""
    return [json.loads(item.text) for item in find(text)[0]]


def test_200_segment_has_it(anywhere, segment):
    answer = anywhere.post(make_event("a"))
    assert answer.status_code == 200
    (message_id,) = segment.kept
    assert answer.json() == {"status": "delivered", "message_id": message_id}
    assert answer.headers["Content-Type"] == "application/json"
    assert segment.events() == ["event-a"]


def test_a_retry_is_the_same_message(client, segment):
    first, second = client.post(make_event("a")), client.post(make_event("a"))
    assert first.json() == second.json()
    assert (segment.events(), segment.duplicates) == (["event-a"], 1)


def test_relays_of_two_sources_do_not_swallow_each_others_events(client, segment):
    other = InProcess(segment, SEGMENT_WRITE_KEY="another0123456789another01234567")
    assert client.post(make_event("a")).status_code == other.post(make_event("a")).status_code == 200
    assert (segment.events(), segment.duplicates) == (["event-a", "event-a"], 0)


UNDELIVERABLE = {
    "no name": (make_event(metric=None), "it has no name"),
    "nobody": (make_event(data={"customer_id": ""}), "it names nobody"),
    "cannot fit": (make_event(data={"customer_id": "x" * 40_000}), "it cannot be made to fit"),
}


@pytest.mark.parametrize(("event", "reason"), UNDELIVERABLE.values(), ids=UNDELIVERABLE.keys())
def test_202_undeliverable(client, segment, capfd, event, reason):
    answer = client.post(event)
    assert answer.status_code == 202
    assert answer.json()["status"] == "dead-lettered"
    assert answer.json()["reason"].startswith(reason)
    assert segment.requests == []
    (letter,) = letters(capfd.readouterr().err)
    assert letter["event"] == event
    assert letter["reason"] == answer.json()["reason"]
    assert letter["at"].endswith("+00:00")


@pytest.fixture
def without_drafts(monkeypatch):
    """A mapping that leaves out drafts, as CONTRIBUTING.md says how."""

    def mapping(event, **settings):
        if kind(event).metric == "drafted":
            raise Ignored("drafts")
        return translate(event, **settings)

    monkeypatch.setattr("app.translate", mapping)


@pytest.mark.parametrize(
    "settings", [{}, {"DRY_RUN": "force"}, {"CUSTOMERIO_SIGNING_KEY": None, "ALLOW_UNSIGNED": "1"}], ids=str
)
@pytest.mark.parametrize(
    "form", [{"metric": "drafted"}, {"event_type": "email_drafted", "object_type": None}], ids=["today", "legacy"]
)
def test_202_the_mapping_leaves_it_out(segment, capfd, without_drafts, form, settings):
    client = InProcess(segment, **settings)
    answer = client.post(make_event("a", **form))
    assert (answer.status_code, answer.json()) == (
        202,
        {"status": "ignored", "reason": "the mapping leaves it out: drafts"},
    )
    assert segment.requests == []
    assert capfd.readouterr().err == ""  # neither a dead letter nor a line
    metrics = client.get("/metrics").text
    assert 'relay_webhooks_total{outcome="ignored",reason="mapping"} 1.0' in metrics
    assert 'relay_events_total{metric="drafted",object_type="email"} 1.0' in metrics
    assert client.post(make_event("b")).status_code == 200


def test_what_is_ignored_must_be_signed_too(client, without_drafts):
    assert client.post(make_event(metric="drafted"), headers={}).status_code == 422


@pytest.mark.parametrize("status", [400, 413])
def test_202_segment_refuses_this_one_event(anywhere, segment, status):
    segment.faults.append(str(status))
    answer = anywhere.post(make_event("a"))
    assert (answer.status_code, answer.json()["reason"]) == (202, f"Segment refuses it ({status})")
    assert len(segment.requests) == 1


def test_202_even_what_cannot_be_parsed_is_kept_whole(client, capfd):
    body = b'{"metric": "m", "data": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    assert client.post(body).status_code == 202
    (letter,) = letters(capfd.readouterr().err)
    assert letter["event"] == body.decode()


def test_202_in_a_file(start, segment, tmp_path):
    path = tmp_path / "dead-letters.jsonl"
    relay = start(segment, DEAD_LETTER_FILE=str(path))
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    events = [make_event(number, metric=None) for number in range(20)]
    assert {answer.status_code for answer in relay.post_all(events)} == {202}
    kept = [json.loads(line)["event"] for line in path.read_text().splitlines()]
    assert sorted(kept, key=str) == sorted(events, key=str)
    assert "person-1" not in relay.log
    assert f"answered 202: dead letter kept in {path}: it has no name" in relay.log


def test_503_while_the_file_cannot_be_written(segment, tmp_path, capfd):
    folder = tmp_path / "letters"
    folder.mkdir()
    client = InProcess(segment, DEAD_LETTER_FILE=str(folder / "file"))
    folder.rename(tmp_path / "away")
    answer = client.post(make_event(metric=None))
    assert (answer.status_code, answer.json()["status"]) == (503, "retry")
    assert answer.json()["reason"] == "the dead letter could not be kept: No such file or directory"
    assert "Traceback" not in capfd.readouterr().err  # a full disk must not fill the log as well
    (tmp_path / "away").rename(folder)
    assert client.post(make_event(metric=None)).status_code == 202
    assert len(letters((folder / "file").read_text())) == 1


def test_503_when_the_disk_is_full(segment, tmp_path, monkeypatch):
    def is_full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path = tmp_path / "letters"
    client = InProcess(segment, DEAD_LETTER_FILE=str(path))
    monkeypatch.setattr("relay.letter_file.os.fsync", is_full)
    assert client.post(make_event(metric=None)).status_code == 503
    assert client.post(make_event("a")).status_code == 200
    assert path.read_bytes() == b""


NOT_OBJECTS = [b"", b"hello", b"[]", b'"x"', b"{", b"\xff\xfe", b"null", b'{"metric": "\xe9']


@pytest.mark.parametrize("body", NOT_OBJECTS, ids=repr)
def test_202_signed_but_not_a_json_object(client, segment, capfd, body):
    """Whatever the key has signed is genuine: refusing it would hold up every later event."""
    answer = client.post(body)
    assert (answer.status_code, answer.json()["status"]) == (202, "dead-lettered")
    assert segment.requests == []
    (item,), _ = find(capfd.readouterr().err)
    assert (item.body, json.loads(item.text)["reason"]) == (body, answer.json()["reason"])


@pytest.mark.parametrize("body", NOT_OBJECTS, ids=repr)
def test_422_unsigned_and_not_a_json_object(segment, capfd, body):
    answer = InProcess(segment, CUSTOMERIO_SIGNING_KEY=None, ALLOW_UNSIGNED="1").post(body, headers={})
    assert (answer.status_code, answer.json()["status"]) == (422, "rejected")
    assert segment.requests == []
    assert letters(capfd.readouterr().err) == []


@pytest.mark.parametrize("character", ["\t", "\n", "\r", "\x00", "\x1f"], ids=repr)
def test_200_a_raw_control_character(client, segment, character):
    body = json.dumps(make_event("a", data={"customer_id": "1", "subject": "a_b"})).replace("a_b", f"a{character}b")
    assert client.post(body.encode()).status_code == 200
    (message,) = segment.kept.values()
    assert message["properties"]["subject"] == f"a{character}b"


def test_422_without_signature(anywhere, segment):
    answer = anywhere.post(make_event(), headers={})
    assert answer.status_code == 422
    assert answer.json()["status"] == "unauthorized"
    assert segment.requests == []


@pytest.mark.parametrize("host", ["a..b", ".a", "a" * 64], ids=len)
def test_200_whatever_the_host_and_the_protocol_it_asks_for(client, host):
    body = json.dumps(make_event()).encode()
    more = {"Host": host, "Connection": "Upgrade", "Upgrade": "websocket"}
    assert client.post(body, sign(body) | more).status_code == 200


BODY = json.dumps(make_event()).encode()
NINE_DAYS = 9 * 24 * 3600
JUNK = {
    "another body's": sign(b"{}"),
    "another key's": sign(BODY, key="another"),
    "nine days old": sign(BODY, str(int(time.time()) - NINE_DAYS)),
    "nine days ahead": sign(BODY, str(int(time.time()) + NINE_DAYS)),
    "no number": sign(BODY, "soon"),
    "latin-1": {"X-CIO-Timestamp": "é", "X-CIO-Signature": "é" * 64},
    "long": {"X-CIO-Timestamp": "1" * 4000, "X-CIO-Signature": "0" * 8000},
}


@pytest.mark.parametrize("headers", JUNK.values(), ids=JUNK.keys())
def test_422_whatever_the_headers(relay, segment, headers):
    logged = relay.log_of(lambda: None)
    answer = relay.post(BODY, headers={name: value.encode("latin-1") for name, value in headers.items()})
    assert answer.status_code == 422
    assert InProcess(segment).post(BODY, headers).json() == answer.json()
    stamp = headers["X-CIO-Timestamp"]
    right = sign(BODY, stamp)["X-CIO-Signature"]
    assert right not in answer.text
    assert right not in logged()
    assert segment.requests == []


def test_the_signature_is_checked_before_the_body_is_parsed(client):
    assert client.post(b"not json", headers={}).status_code == 422


SPELLINGS = {
    "spaces and escapes": b'{"metric":"m",\n "data" : {"customer_id": 15, "identifiers": {"id": "\\u0061"}}}\n',
    "a key twice": b'{"metric": "m", "metric": "n", "data": {"customer_id": 1, "x": 1.50e1}}',
}


@pytest.mark.parametrize("body", SPELLINGS.values(), ids=SPELLINGS.keys())
def test_the_signature_is_of_the_bytes_as_they_came(anywhere, body):
    assert anywhere.post(body).status_code == 200


def test_a_second_key_is_for_rotation(segment):
    client = InProcess(segment, CUSTOMERIO_SIGNING_KEY=f"new, {SIGNING_KEY}")
    assert client.post(BODY).status_code == 200
    assert client.post(BODY, headers=sign(BODY, key="new")).status_code == 200
    assert client.post(BODY, headers=sign(BODY, key="old")).status_code == 422


def test_unsigned_webhooks_where_they_are_allowed(segment):
    client = InProcess(segment, CUSTOMERIO_SIGNING_KEY=None, ALLOW_UNSIGNED="1")
    assert client.post(make_event(), headers={}).status_code == 200


NOT_SET_UP = {  # what comes before there is a signing key -> its headers
    "signed with the word that stands in its place": (BODY, sign(BODY, key="unknown-yet")),
    "signed with another key": (BODY, sign(BODY)),
    "not signed": (BODY, {}),
    "not JSON": (b"hello", {}),
    "nobody's event": (b'{"metric": "m", "data": {}}', {}),
}


@pytest.mark.parametrize("settings", [{}, {"ALLOW_UNSIGNED": "1"}], ids=["", "unsigned"])
@pytest.mark.parametrize(("body", "headers"), NOT_SET_UP.values(), ids=NOT_SET_UP.keys())
def test_503_for_all_until_there_is_a_signing_key(segment, body, headers, settings):
    client = InProcess(segment, CUSTOMERIO_SIGNING_KEY="unknown-yet", **settings)
    answer = client.post(body, headers=headers)
    assert (answer.status_code, answer.json()["status"]) == (503, "retry")
    assert answer.json()["reason"] == "the relay has no signing key yet: set CUSTOMERIO_SIGNING_KEY"
    assert "Retry-After" in answer.headers
    assert 'relay_webhooks_total{outcome="retried",reason="not_set_up"} 1.0' in client.get("/metrics").text
    assert segment.requests == []


def test_a_dry_run_takes_webhooks_without_a_signing_key(segment):
    client = InProcess(segment, CUSTOMERIO_SIGNING_KEY="unknown-yet", DRY_RUN="1")
    assert client.post(BODY, headers={}).json()["status"] == "dry-run"


LARGEST = 8 * 1024 * 1024


@pytest.mark.parametrize("more", [{}, {"Connection": "close"}], ids=["kept alive", "closed"])
def test_413_above_8_mib(anywhere, more):
    body = b"x" * (LARGEST + 1)
    answer = anywhere.post(body, headers=sign(body) | more)
    assert (answer.status_code, answer.json()["status"]) == (413, "rejected")


@pytest.mark.parametrize(("size", "status"), [(8_192, 200), (8_193, 503)])
def test_a_usual_webhook_fits_however_many_bodies_a_worker_holds(client, monkeypatch, size, status):
    monkeypatch.setattr("relay.body.MAX_HELD", 0)
    body = json.dumps(make_event()).encode()
    assert client.post(body + b" " * (size - len(body))).status_code == status


def test_8_mib_are_read(anywhere, segment):
    event = make_event(data={"customer_id": "1", "content": "x" * (LARGEST - 1000)})
    assert anywhere.post(event).status_code == 200
    (message,) = segment.kept.values()
    assert message["context"]["omitted_properties"] == ["content"]


# What Segment does -> what the reason says. The others take long, or keep the event: test_gunicorn.py has them.
RETRIED = {
    fault: reason
    for fault, reason in FAULTS.items()
    if reason not in ("", LATE, FAULTS["429:1"]) and "after" not in fault
}


def check_503(answer, reason):
    assert answer.status_code == 503
    assert answer.json()["status"] == "retry"
    assert answer.json()["reason"].startswith(reason)
    assert 1 <= int(answer.headers["Retry-After"]) <= 5
    assert answer.seconds < 4  # Customer.io hangs up then


@pytest.mark.parametrize(("fault", "reason"), RETRIED.items(), ids=RETRIED.keys())
def test_503_everything_else(anywhere, segment, fault, reason):
    segment.fault = fault
    check_503(anywhere.post(make_event("a")), reason)
    assert segment.events() == []
    assert {request["path"] for request in segment.requests} == {"/v1/batch"}  # no redirect was followed


def test_503_when_segment_limits_the_rate(client, segment):
    segment.fault = "429:1"
    check_503(client.post(make_event("a")), "Segment is limiting the rate")
    assert (segment.events(), len(segment.requests)) == ([], 1)


@pytest.mark.parametrize("fault", ["hang", "hang-after"])
def test_503_when_segment_does_not_answer(client, segment, monkeypatch, fault):
    """With a shorter deadline; test_gunicorn.py has the real one."""
    monkeypatch.setattr("app.DEADLINE", 0.3)
    segment.fault = fault
    check_503(client.post(make_event("a")), "Segment did not answer in time")
    assert len(segment.requests) == 1


def test_503_when_nothing_listens():
    answer = InProcess(SEGMENT_HOST="http://127.0.0.1:9").post(make_event())
    assert (answer.status_code, answer.json()["reason"]) == (503, "the connection to Segment failed")


def test_503_when_the_body_does_not_arrive_whole(client, segment):
    answer = client.request("POST", "/webhook", BODY, sign(BODY), CONTENT_LENGTH=str(len(BODY) + 10))
    assert (answer.status_code, answer.json()["reason"]) == (503, "the body did not arrive whole")
    assert segment.requests == []


def test_503_for_what_nobody_thought_of_and_the_log_says_where_but_not_what(client, segment, monkeypatch, caplog):
    def fails(event, **settings):
        raise KeyError(event["data"]["subject"])

    monkeypatch.setattr("app.translate", fails)
    answer = client.post(make_event(data={"subject": "secret"}))
    assert (answer.status_code, answer.json()) == (503, {"status": "retry", "reason": "the relay failed on it"})
    assert answer.headers["Retry-After"] == "1"
    assert "unexpected KeyError, answered 503\n" in caplog.text
    assert "in fails" in caplog.text
    assert "secret" not in caplog.text
    assert segment.requests == []


PATHS = ["/x", "/webhook/", "/x//webhook", "/webhook/x", "/health/"]
METHODS = ["GET", "HEAD", "PUT", "DELETE", "PATCH", "OPTIONS", "PROPFIND"]


@pytest.mark.parametrize("path", PATHS)
def test_404_other_paths(anywhere, path):
    answer = anywhere.request("POST", path, b"{}")
    assert (answer.status_code, answer.json()["status"]) == (404, "rejected")


@pytest.mark.parametrize("method", METHODS)
def test_405_other_methods(anywhere, method):
    answer = anywhere.request(method, "/webhook")
    assert (answer.status_code, answer.headers["Allow"]) == (405, "POST")
    assert answer.text == "" if method == "HEAD" else answer.json()["status"] == "rejected"


def test_405_health_is_not_posted_to(anywhere):
    assert anywhere.request("POST", "/health").status_code == 405


def test_health_does_not_ask_segment():
    answer = InProcess(SEGMENT_HOST="http://127.0.0.1:9").get("/health")
    assert (answer.status_code, answer.json()) == (200, {"status": "ok"})


# What must not change an answer. -----------------------------------------------------------------

OUTCOMES = {  # event, fault of Segment, status
    "delivered": (make_event("a"), None, 200),
    "dead-lettered": (make_event(metric=None), None, 202),
    "dead-lettered as text": (b"[]", None, 202),
    "retry": (make_event("a"), "500", 503),
}


@pytest.mark.parametrize(("event", "fault", "status"), OUTCOMES.values(), ids=OUTCOMES.keys())
def test_an_answer_stands_whatever_becomes_of_the_counts(client, segment, monkeypatch, event, fault, status):
    def fails(*args):
        counted.append(args)
        raise IndexError("no such column")

    counted = []
    monkeypatch.setattr(Metrics, "count_answer", fails)
    segment.fault = fault
    answer = client.post(event)
    assert answer.status_code == status
    assert answer.json()["status"] == {503: "retry", 202: "dead-lettered", 200: "delivered"}[status]
    assert len(counted) == 1


def test_hooks_of_the_app_see_webhooks(client):
    seen = []
    client.app.before_request(lambda: seen.append("before"))

    @client.app.after_request
    def after(response):
        seen.append(response.status_code)
        response.headers["X-Middleware"] = "was here"
        return response

    assert client.post(make_event("a")).headers["X-Middleware"] == "was here"
    assert client.post(make_event("a"), headers={}).headers["X-Middleware"] == "was here"
    assert seen == ["before", 200, "before", 422]


@pytest.mark.parametrize("name", ["X-CIO-Signature", "X-CIO-Timestamp"])
def test_422_for_a_header_that_comes_twice(anywhere, segment, name):
    given = sign(BODY)
    twice = [*given.items(), (name, given[name])]
    assert post_with_repeated_headers(anywhere, twice) == 422
    assert segment.requests == []


def post_with_repeated_headers(client, headers):
    if isinstance(client, InProcess):
        return client.post(BODY, headers).status_code
    import http.client  # requests sends each header once

    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", client.port, timeout=10)) as connection:
        connection.putrequest("POST", "/webhook")
        for header in [*headers, ("Content-Length", str(len(BODY)))]:
            connection.putheader(*header)
        connection.endheaders(BODY)
        return connection.getresponse().status


def test_200_of_a_dry_run_does_not_say_delivered(segment):
    """It answers as a live relay does, but nobody who reads the answer is to believe that Segment has the event."""
    client = InProcess(segment, DRY_RUN="force")
    answer = client.post(make_event("a"))
    assert (answer.status_code, answer.json()["status"]) == (200, "dry-run")
    assert answer.json()["message_id"].endswith("-event-a")
    assert client.post(make_event(metric=None)).json()["status"] == "dead-lettered"
    assert client.post(make_event("a"), headers={}).status_code == 422
    assert client.post(b"[]").json()["status"] == "dead-lettered"
    assert segment.requests == []


def test_without_settings_nothing_is_acknowledged(monkeypatch):
    for name in ("SEGMENT_WRITE_KEY", "CUSTOMERIO_SIGNING_KEY", "DRY_RUN", "ALLOW_UNSIGNED"):
        monkeypatch.delenv(name, raising=False)
    from app import create_app

    with pytest.raises(ConfigError, match="SEGMENT_WRITE_KEY is not set"):
        create_app()
