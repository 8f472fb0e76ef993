"""Dead letters: kept whole, in a file and on the log, however many come at once, and found again by `replay`."""

import contextlib
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import harness
import pytest
from conftest import ROOT, Client, InProcess, Relay, answers, environment, free_port, make_event, until

from ops.found import find
from relay import dead_letters
from relay.dead_letters import log_lines
from relay.letter_file import append
from relay.outcomes import RetryLater
from server import log as logs

CROWD = 64


def nameless(number, size=0):
    """Return an event that is undeliverable: it has no name."""
    return make_event(number, metric=None, pad="x" * size)


def kept(text):
    """Return the ids of the events whose letters are in a text; none may be torn."""
    found, _ = find(text)
    assert [item.problem for item in found if item.problem] == []
    return sorted(json.loads(item.body)["event_id"] for item in found)


# Many at once. -----------------------------------------------------------------------------------


class FlaskRun(Relay):
    """The relay as `flask --app app run` serves it: with a real thread for each connection."""

    def __init__(self, env):
        port = str(free_port())
        command = ["-m", "flask", "--app", "app", "run", "--port", port]
        harness.Relay.__init__(self, env | {"PORT": port}, command, program=[sys.executable])


SERVERS = {"gunicorn": Relay, "flask run": FlaskRun}


@pytest.fixture(params=SERVERS.values(), ids=SERVERS.keys())
def serve(request):
    """Start a relay with two workers, or with real threads."""
    with contextlib.ExitStack() as stack:
        yield lambda segment, **settings: stack.enter_context(request.param(environment(segment, settings)))


@pytest.mark.gunicorn
@pytest.mark.parametrize("where", ["file", "log"])
def test_sixty_four_at_once_are_all_kept_and_then_one_alone(serve, segment, tmp_path, where):
    path = tmp_path / "letters.jsonl"
    relay = serve(segment, DEAD_LETTER_FILE=str(path) if where == "file" else None)
    numbers = iter(range(10_000))
    posted = []
    for size in (10, 40_000, 10, 3_800):
        events = [nameless(next(numbers), size) for _ in range(CROWD)]
        posted += events
        assert {answer.status_code for answer in relay.post_all(events)} == {202}
    posted.append(nameless(next(numbers)))
    assert relay.post(posted[-1]).status_code == 202
    relay.stop()
    assert kept(path.read_text() if where == "file" else relay.log) == sorted(event["event_id"] for event in posted)


@pytest.mark.gunicorn
def test_a_hung_disk_holds_up_only_letters_and_they_go_on_after_it(serve, segment, tmp_path):
    path = tmp_path / "letters.jsonl"
    relay = serve(segment, DEAD_LETTER_FILE=str(path))
    assert relay.post(nameless("first")).status_code == 202
    with path.open() as file, ThreadPoolExecutor(CROWD) as pool:
        fcntl.flock(file, fcntl.LOCK_EX)  # as a disk that does not answer
        letters = [pool.submit(relay.post, nameless(number)) for number in range(CROWD)]
        assert relay.post(make_event("meanwhile")).status_code == 200
        answered = [letter.result() for letter in letters]
        assert {(answer.status_code, answer.json()["reason"]) for answer in answered} == {(503, "the disk is too slow")}
    for attempt in range(2):
        events = [nameless(f"{attempt}-{number}") for number in range(CROWD)]
        assert {answer.status_code for answer in relay.post_all(events)} == {202}
    assert relay.post(nameless("last")).status_code == 202
    assert len(set(kept(path.read_text()))) == 2 + 2 * CROWD  # none of those that nobody waited for


@pytest.mark.gunicorn
def test_a_named_pipe_in_the_files_place_hangs_nobody_for_good(serve, segment, tmp_path):
    path = tmp_path / "letters.jsonl"
    relay = serve(segment, DEAD_LETTER_FILE=str(path))
    path.unlink(missing_ok=True)  # only gunicorn's start creates it
    os.mkfifo(path)
    answered = relay.post_all([nameless(number) for number in range(CROWD)])
    reason = "the dead letter could not be kept: it is not a regular file"
    assert {(answer.status_code, answer.json()["reason"]) for answer in answered} == {(503, reason)}
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # nor is it kept if somebody reads
    assert relay.post(nameless(1)).status_code == 503
    os.close(reader)
    path.unlink()
    assert {answer.status_code for answer in relay.post_all([nameless(number) for number in range(CROWD)])} == {202}
    assert len(kept(path.read_text())) == CROWD


# The file. ---------------------------------------------------------------------------------------


def test_after_the_deadline_nothing_is_written_and_it_is_no_success(tmp_path):
    path = tmp_path / "letters"
    with pytest.raises(RetryLater, match="too slow"):
        append(str(path), b"x\n", time.monotonic())
    assert path.read_bytes() == b""


def test_a_letter_never_counts_as_kept_before_it_is(segment, tmp_path, monkeypatch):
    """Deadlines end at all moments of an append."""
    path = tmp_path / "letters"
    client = InProcess(segment, DEAD_LETTER_FILE=str(path))
    statuses = {}
    for number in range(300):
        monkeypatch.setattr("app.DEADLINE", 0.11 + number * 1e-6)
        statuses[f"event-{number}"] = client.post(nameless(number)).status_code
    assert set(statuses.values()) <= {202, 503}
    assert {identity for identity, status in statuses.items() if status == 202} <= set(kept(path.read_text()))


@pytest.mark.parametrize("before", ["", "whole\n", '{"event": {"metr'], ids=repr)
def test_a_letter_in_a_file_begins_a_line_of_its_own(tmp_path, before):
    path = tmp_path / "letters"
    path.write_text(before)
    append(str(path), b"next\n", time.monotonic() + 5)
    assert path.read_text().splitlines() == [*before.splitlines(), "next"]


def test_a_letter_that_finds_no_room_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "letters"
    path.write_text("before")
    write = os.write
    monkeypatch.setattr("relay.letter_file.os.write", lambda file, content: write(file, content[:3]))
    with pytest.raises(OSError, match="No space left"):
        append(str(path), b"next\n", time.monotonic() + 5)
    assert path.read_text() == "before"


def test_a_letter_in_a_file_that_is_removed_meanwhile_is_not_kept(tmp_path, monkeypatch):
    path = tmp_path / "letters"
    flock = fcntl.flock
    monkeypatch.setattr("relay.letter_file.fcntl.flock", lambda file, how: (flock(file, how), path.unlink()))
    with pytest.raises(OSError, match="removed meanwhile"):
        append(str(path), b"next\n", time.monotonic() + 5)


def test_what_fails_in_the_thread_fails_in_the_request(segment, tmp_path, monkeypatch):
    client = InProcess(segment, DEAD_LETTER_FILE=str(tmp_path / "letters"))

    def fails(*_):
        raise KeyError

    for _ in range(2 * dead_letters.WRITERS):
        with monkeypatch.context() as patch:
            patch.setattr("relay.dead_letters.append", fails)
            assert client.post(nameless(1)).json()["reason"] == "the relay failed on it"
        with monkeypatch.context() as patch:
            patch.setattr("relay.dead_letters.get_original", fails)  # no thread can be started
            assert client.post(nameless(1)).json()["reason"] == "the relay failed on it"
    assert client.post(nameless(1)).status_code == 202


# The log. ----------------------------------------------------------------------------------------

LETTERS = {  # an event -> how many lines its letter has
    "small": (nameless(1), 1),
    "just one line": (nameless(1, 4095 - 1 - len(dead_letters.line(nameless(1), "why"))), 1),
    "just two": (nameless(1, 4096 - 1 - len(dead_letters.line(nameless(1), "why"))), 3),
    "quotes": (nameless(1) | {"pad": '"\\' * 5_000}, 11),
    "a text": ("{" * 5_000, 3),
}


@pytest.mark.parametrize(("event", "number"), LETTERS.values(), ids=LETTERS.keys())
def test_a_line_on_the_log_has_at_most_4096_bytes(event, number):
    letter = dead_letters.line(event, "why")
    lines = list(log_lines(letter, 4096))
    assert len(lines) == number
    assert max(map(len, lines)) <= 4096
    assert all(line.endswith(b"\n") and line.count(b"\n") == 1 and json.loads(line) for line in lines)
    (item,), others = find(b"".join(lines).decode())
    assert (item.text, item.problem, others) == (letter, "", 0)


@pytest.mark.gunicorn
def test_no_line_of_the_log_is_above_4096_bytes(start, segment):
    relay = start(segment)
    relay.post(nameless(1, 40_000))
    relay.post(b"[" * 10_000)
    relay.stop()
    assert max(len(line.encode()) for line in relay.whole_log().splitlines(keepends=True)) <= 4096


def fill(relay, size=10_000):
    """Have a relay's log full: nobody reads it. Return the statuses of the letters that were sent, by event."""
    relay.reading.clear()
    statuses = {}
    while 503 not in statuses.values():
        number = len(statuses)
        statuses[f"event-{number}"] = relay.post(nameless(number, size)).status_code
    return statuses


def test_a_log_that_nobody_reads_holds_up_only_letters(start, segment):
    relay = start(segment)
    statuses = fill(relay)
    crowd = [nameless(f"crowd-{number}") for number in range(CROWD)]
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(relay.post_all, crowd)
        for number in range(20):
            assert relay.get("/health").status_code == 200
            assert relay.post(make_event(f"good-{number}")).status_code == 200
            assert relay.post(make_event(number), headers={}).status_code == 422
        answered = waiting.result()
    statuses |= {event["event_id"]: answer.status_code for event, answer in zip(crowd, answered, strict=True)}
    assert set(statuses.values()) == {202, 503}
    relay.reading.set()
    again = [nameless(f"again-{number}") for number in range(CROWD)]
    assert {answer.status_code for answer in relay.post_all(again)} == {202}
    assert relay.post(nameless("last")).status_code == 202
    relay.stop()
    found, _ = find(relay.log)
    identities = {json.loads(item.body)["event_id"] for item in found if not item.problem}
    acknowledged = {identity for identity, status in statuses.items() if status == 202}
    assert acknowledged | {event["event_id"] for event in again} | {"event-last"} <= identities


def test_lines_that_were_dropped_are_counted_and_said_once_the_log_is_read_again(start, segment):
    relay = start(segment, LOG_FORMAT="json")
    fill(relay)
    for _ in range(2):
        relay.post_all([make_event(1)] * 8 + [b"\xff"] * 8)
        segment.fault = "500"
        relay.post_all([make_event(number) for number in range(16)])
    before = len(relay.log)
    relay.reading.set()
    until(lambda: "log lines were dropped: nobody read the log" in relay.log[before:])
    (line, *_) = [line for line in relay.log.splitlines() if "were dropped" in line]
    assert json.loads(line)["level"] == "warning"


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP"])
def test_signals_are_obeyed_while_nobody_reads_the_log(start, segment, name):
    relay = start(segment)
    fill(relay)
    workers = set(relay.workers())
    relay.process.send_signal(getattr(signal, name))
    if name == "SIGHUP":
        until(lambda: len(relay.workers()) == 2 and not workers & set(relay.workers()), 20)
        assert relay.post(make_event(1)).status_code == 200
    else:
        assert relay.process.wait(20) == 0


@pytest.mark.gunicorn
@pytest.mark.parametrize("change", ["", "SIGHUP", "SIGUSR2"])
def test_a_daemon_logs_where_it_was_started(segment, tmp_path, change):
    log, pid, port = tmp_path / "log", tmp_path / "pid", free_port()
    env = environment(segment, {"PATH": os.environ["PATH"], "PORT": str(port)})
    with log.open("wb") as stderr:
        command = [harness.GUNICORN, "-D", "--pid", str(pid), "app:create_app()"]
        subprocess.run(command, cwd=ROOT, env=env, stderr=stderr, check=True, timeout=30)
    client = Url(port)
    processes = []
    try:
        until(lambda: answers(client.url + "/health"), 20)
        processes.append(int(pid.read_text()))
        if change:
            os.kill(processes[0], getattr(signal, change))
            until(lambda: log.read_text().count("Booting worker") == 4, 20)
        if change == "SIGUSR2":
            processes.append(int((tmp_path / "pid.2").read_text()))
            os.kill(processes[0], signal.SIGTERM)
            until(lambda: not os.path.exists(f"/proc/{processes[0]}"), 20)
        assert client.post(nameless(1)).status_code == 202
        assert client.post(nameless(2, 40_000)).status_code == 202
        assert kept(log.read_text()) == ["event-1", "event-2"]
        assert "answered 202: it has no name" in log.read_text()
    finally:
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGTERM)
        until(lambda: not answers(client.url + "/health"), 20)


class Url(Client):
    def __init__(self, port):
        self.url = f"http://127.0.0.1:{port}"

    def request(self, method, path, body=b"", headers=()):
        return Relay.request(self, method, path, body, headers)


# Streams of every kind. --------------------------------------------------------------------------


def sockets():
    reader, writer = socket.socketpair()
    return reader.detach(), writer.detach()


STREAMS = {"a pipe": os.pipe, "a socket": sockets, "a terminal": os.openpty}


@pytest.fixture(params=STREAMS.values(), ids=STREAMS.keys())
def ends(request):
    reader, writer = request.param()
    yield reader, writer
    os.close(reader)
    os.close(writer)


@pytest.mark.parametrize("reopen", [True, False], ids=["", "that can't be reopened"])
def test_a_stream_never_waits_and_its_descriptor_stays_as_it_was(ends, monkeypatch, reopen):
    reader, writer = ends
    if not reopen:

        def refuse(path, *how, open_=os.open):
            if path.startswith("/proc"):
                raise PermissionError
            return open_(path, *how)

        with monkeypatch.context() as patch:
            patch.setattr("server.log.os.open", refuse)
            write = logs.never_waiting(writer)
    else:
        write = logs.never_waiting(writer)
    written = 0
    with contextlib.suppress(BlockingIOError):
        while written < 10_000_000:
            written += write(b"x" * 1000)
    assert 0 < written < 10_000_000
    assert os.get_blocking(writer)
    while written > 0:
        written -= len(os.read(reader, 65_536).replace(b"\r", b""))
    assert write(b"y") == 1


def test_a_line_of_which_only_a_part_found_room_does_not_take_the_next_one_with_it(monkeypatch):
    stream, out = logs.Stream(), []
    monkeypatch.setattr(stream, "_write", lambda data: out.append(data[:5]) or len(data[:5]))
    stream.write("a long line\n")
    stream.write("next\n")
    assert b"".join(out).startswith(b"a lon\n")
