"""Starting: from the Procfile's command to serving, or to one readable message."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys

import pytest
from conftest import KEYS, ROOT, InProcess, answers, free_port, make_event, until

from config import VERSION


def test_procfile():
    assert (ROOT / "Procfile").read_text() == 'web: gunicorn "app:create_app()"\n'


def test_every_problem_in_one_message_and_no_worker(start, tmp_path):
    relay = start(
        wait=False,
        SEGMENT_WRITE_KEY=None,
        SEGMENT_HOST="segment",
        DRY_RUN="maybe",
        LOG_LEVEL="loud",
        DEAD_LETTER_FILE=str(tmp_path),
    )
    assert relay.process.wait(10) == 1
    log = relay.whole_log()
    message = log[log.index("The relay cannot start") :].splitlines()
    assert sorted(line.split()[1] for line in message[1:]) == [
        "DEAD_LETTER_FILE",
        "DRY_RUN",
        "LOG_LEVEL",
        "SEGMENT_HOST",
        "SEGMENT_WRITE_KEY",
    ]
    assert "Is a directory" in log
    assert "Traceback" not in log
    assert "Booting worker" not in log


def test_the_log_begins_with_the_version(start):
    relay = start()
    assert relay.log.count(f"[INFO] Route to Segment {VERSION}\n") == 1


def test_warnings_are_logged_once_and_no_secret_with_them(start, segment):
    relay = start(segment, SEGMENT_WRITE_KEY="hidden-key", CUSTOMERIO_SIGNING_KEY=None, ALLOW_UNSIGNED="1")
    assert relay.log.count("[WARNING] SEGMENT_WRITE_KEY does not look like a write key") == 1
    assert relay.log.count("[WARNING] ALLOW_UNSIGNED is on") == 1
    assert "DRY_RUN" not in relay.log
    assert "hidden" not in relay.log


def test_dry_run_prints_the_track_call_and_sends_nothing(start, segment):
    relay = start(segment, SEGMENT_WRITE_KEY=None, CUSTOMERIO_SIGNING_KEY=None, DRY_RUN="1")
    assert relay.log.count("[WARNING] DRY_RUN is on: nothing is sent to Segment") == 1
    event = json.loads((ROOT / "tests/events/legacy.json").read_text())
    assert relay.post(event, headers={}).json()["status"] == "dry-run"
    until(lambda: "messageId" in relay.log and "\n}\n" in relay.log)
    assert '  "event": "customerio:email_delivered",\n' in relay.log
    printed = relay.log[relay.log.index("track call:\n") + len("track call:\n") :]
    message, _ = json.JSONDecoder().raw_decode(printed)
    assert message["properties"] == event["data"]
    assert relay.post({"metric": 5}, headers={}).status_code == 202
    assert segment.requests == []


# A setting that is wrong -> what is said instead of starting.
REFUSED = {
    "a dry run in production": ({"DRY_RUN": "1"}, "DRY_RUN is on while both keys are set"),
    "quotes": ({"OMIT_PROPERTIES": '"subject"'}, "OMIT_PROPERTIES has quotes in it"),
    "a placeholder": ({"SEGMENT_WRITE_KEY": "..."}, "SEGMENT_WRITE_KEY is still the placeholder of an example"),
    "a log format": ({"LOG_FORMAT": "xml"}, "LOG_FORMAT is one of text, json"),
}


def test_a_wrong_value_is_never_a_default(start):
    relays = {start(wait=False, **settings): words for settings, words in REFUSED.values()}
    for relay, words in relays.items():
        assert relay.process.wait(10) == 1
        assert f"The relay cannot start:\n  - {words}" in relay.whole_log()
        assert "Booting worker" not in relay.log


def test_a_log_of_json_says_in_json_why_the_relay_cannot_start(start):
    relay = start(wait=False, LOG_FORMAT="json", LOG_LEVEL="critical", EVENT_PREFIX="''", SEGMENT_WRITE_KEY="...")
    assert relay.process.wait(10) == 1
    (line,) = map(json.loads, relay.whole_log().splitlines())  # at this level, nothing else
    assert line["level"] == "critical"
    assert re.fullmatch(r"The relay cannot start:\n  - SEGMENT_WRITE_KEY .+\n  - EVENT_PREFIX .+", line["message"])


def test_a_taken_port_is_one_sentence(start):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        relay = start(wait=False, PORT=str(port))
        assert relay.process.wait(10) == 1
        log = relay.whole_log()
    assert f"  - Port {port} is taken by another program: set PORT= to another one.\n" in log
    assert "Traceback" not in log
    assert "Booting worker" not in log


# `make run` --------------------------------------------------------------------------------------


@contextlib.contextmanager
def trying_out(**settings):
    """What `make run` runs: python -m ops.try_out."""
    port = settings.setdefault("PORT", str(free_port()))
    process = subprocess.Popen(
        [sys.executable, "-m", "ops.try_out"],
        cwd=ROOT,
        env={"PATH": os.environ["PATH"], **settings},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        yield process, f"http://localhost:{port}"
    finally:
        process.kill()
        process.communicate()


@pytest.mark.gunicorn
def test_make_run_is_a_dry_run_on_this_machine_only_whatever_keys_are_set():
    with trying_out(**KEYS) as (process, url):
        until(lambda: answers(f"{url}/health"))
        # All of 127.0.0.0/8 is this machine, so who listens everywhere listens there too.
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.2", int(url.rsplit(":", 1)[1])))
        process.terminate()
        log, _ = process.communicate(timeout=10)
    assert f"Trying out the relay at {url}. DRY_RUN is on: nothing is sent to Segment." in log
    assert f"curl -d @tests/events/legacy.json {url}/webhook" in log


def test_make_run_invites_nobody_to_another_programs_port():
    with socket.create_server(("127.0.0.1", 0)) as other, trying_out(PORT=str(other.getsockname()[1])) as (process, _):
        said, _ = process.communicate(timeout=10)
    assert process.returncode == 1
    assert "is taken by another program: set PORT= to another one." in said
    assert "http://localhost" not in said


@pytest.mark.parametrize("workers", ["", "abc"], ids=["blank", "abc"])
def test_make_run_says_in_one_sentence_what_would_end_gunicorn_before_anything_of_ours_runs(workers):
    with trying_out(WEB_CONCURRENCY=workers) as (process, _):
        said, _ = process.communicate(timeout=10)
    assert process.returncode == 1
    assert said.startswith("The relay cannot start:\n  - WEB_CONCURRENCY is ")
    assert "Traceback" not in said


def test_settings_reach_the_track_call(segment):
    client = InProcess(segment, EVENT_PREFIX="cio_", OMIT_PROPERTIES="subject", ECHO_TO_CUSTOMERIO="yes")
    assert client.post(make_event("a", data={"customer_id": "1", "subject": "s", "x": 1})).status_code == 200
    (message,) = segment.kept.values()
    assert message["event"] == "cio_email_opened"
    assert message["properties"] == {"customer_id": "1", "x": 1}
    assert message["integrations"] == {}


def test_ctrl_c_ends_it_at_once(start):
    relay = start()
    relay.process.send_signal(signal.SIGINT)
    assert relay.process.wait(8) == 0  # gunicorn kills after ten seconds what has not left by itself
    assert "Traceback" not in relay.whole_log()


def test_make_finds_a_python_whatever_python3_is(tmp_path):
    (tmp_path / "python3").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "python3").chmod(0o755)
    found = subprocess.run(
        ["make", "-n", "-B", ".venv/bin/python", "-f", str(ROOT / "Makefile")],
        cwd=tmp_path,
        env={"PATH": f"{tmp_path}:/usr/local/bin:/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "-m venv .venv" in found.stdout
    assert not found.stdout.splitlines()[-1].startswith("python3 ")
