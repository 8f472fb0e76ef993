"""Starting: from the Procfile's command to serving, or to one readable message."""

import json
import signal
import subprocess

from conftest import ROOT, InProcess, make_event, until


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


def test_warnings_are_logged_once_and_no_secret_with_them(start, segment):
    relay = start(segment, SEGMENT_WRITE_KEY="hidden-key", CUSTOMERIO_SIGNING_KEY=None, ALLOW_UNSIGNED="1")
    assert relay.log.count("[WARNING] SEGMENT_WRITE_KEY does not look like a write key") == 1
    assert relay.log.count("[WARNING] ALLOW_UNSIGNED is on") == 1
    assert "hidden" not in relay.log


def test_dry_run_prints_the_track_call_and_sends_nothing(start, segment):
    relay = start(segment, SEGMENT_WRITE_KEY=None, CUSTOMERIO_SIGNING_KEY=None, DRY_RUN="1")
    event = json.loads((ROOT / "tests/events/legacy.json").read_text())
    assert relay.post(event, headers={}).status_code == 200
    until(lambda: "messageId" in relay.log)
    assert '  "event": "customerio:email_delivered",\n' in relay.log
    printed = relay.log[relay.log.index("track call:\n") + len("track call:\n") :]
    message, _ = json.JSONDecoder().raw_decode(printed)
    assert message["properties"] == event["data"]
    assert relay.post({"metric": 5}, headers={}).status_code == 202
    assert segment.requests == []


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
