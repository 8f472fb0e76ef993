"""`flask --app app ...`: check, sample, replay, translate, as an operator calls them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, SIGNING_KEY, WRITE_KEY, free_port, make_event


def run(*words, stdin=None, **settings):
    env = {"SEGMENT_WRITE_KEY": WRITE_KEY, "CUSTOMERIO_SIGNING_KEY": SIGNING_KEY} | settings
    env = {name: value for name, value in env.items() if value is not None} | {"PATH": os.environ["PATH"]}
    flask = str(Path(sys.executable).parent / "flask")
    return subprocess.run(
        [flask, "--app", "app", *words],
        cwd=ROOT,
        env=env,
        input=stdin,
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )


NO_SETTINGS = {"SEGMENT_WRITE_KEY": None, "CUSTOMERIO_SIGNING_KEY": None}


@pytest.mark.parametrize("command", ["check", "sample", "replay", "translate"])
def test_help_needs_no_settings(command):
    done = run(command, "--help", **NO_SETTINGS)
    assert done.returncode == 0
    assert done.stdout.startswith(f"Usage: flask {command}")


def test_check(segment):
    done = run("check", SEGMENT_HOST=segment.url)
    assert done.returncode == 0, done.stderr
    assert f"{segment.url} took the event in" in done.stdout
    assert "look for customerio:relay_check in Segment" in done.stdout
    assert [message["event"] for message in segment.kept.values()] == ["customerio:relay_check"]


def test_check_says_what_is_wrong(segment):
    done = run("check", **NO_SETTINGS)
    assert done.returncode == 1
    assert "SEGMENT_WRITE_KEY is not set" in done.stderr
    assert "Traceback" not in done.stderr
    segment.fault = "401"
    done = run("check", SEGMENT_HOST=segment.url)
    assert (done.returncode, "refuses the write key" in done.stderr) == (1, True)
    done = run("check", SEGMENT_HOST=f"http://127.0.0.1:{free_port()}")
    assert (done.returncode, "the connection to Segment failed" in done.stderr) == (1, True)


def test_sample(relay, segment):
    done = run("sample", "--url", relay.url, "--event", "sms_replied")
    assert (done.returncode, done.stdout[:3]) == (0, "200"), done.stderr
    (message,) = segment.kept.values()
    assert message["event"] == "customerio:sms_replied"
    done = run("sample", "--url", relay.url, CUSTOMERIO_SIGNING_KEY="another")
    assert (done.returncode, done.stdout[:3]) == (1, "401")


def test_sample_says_what_is_wrong():
    done = run("sample", "--event", "email_eaten")
    assert (done.returncode, "not one of customer_subscribed" in done.stderr) == (2, True)
    done = run("sample", "--url", f"http://127.0.0.1:{free_port()}")
    assert (done.returncode, "Is the relay running?" in done.stderr) == (1, True)


LETTER = json.dumps(
    {"event": make_event("letter"), "reason": "Segment refuses it (400)", "at": "2026-11-23T00:00:00+00:00"}
)
LOG = f"""[2026-11-23 12:00:00 +0000] [1] [INFO] Booting worker with pid: 1
{LETTER}
2026-11-23T12:00:00.000000+00:00 app[web.1]: {LETTER.replace("event-letter", "event-prefixed")}
{LETTER.replace("event-letter", "event-compact").replace(": ", ":")}
{json.dumps(make_event("plain"))}

{{"level": "info", "message": "another program's line"}}
"""


def test_replay_understands_letters_webhooks_and_logs(segment, tmp_path):
    (tmp_path / "log").write_text(LOG)
    done = run("replay", str(tmp_path / "log"), SEGMENT_HOST=segment.url)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "4 sent, 0 not sent, 3 other lines.\n"
    assert segment.events() == ["event-letter", "event-prefixed", "event-compact", "event-plain"]
    assert len(segment.requests) == 1
    again = run("replay", "-", stdin=LOG, SEGMENT_HOST=segment.url)
    assert again.returncode == 0
    assert segment.duplicates == 4


def test_replay_gives_an_event_the_message_id_that_the_relay_gives_it(relay, segment):
    event = make_event("same")
    relay.post(event)
    run("replay", "-", stdin=json.dumps(event) + "\n", SEGMENT_HOST=segment.url)
    assert (len(segment.kept), segment.duplicates) == (1, 1)


def test_replay_names_each_line_that_cannot_be_sent(segment):
    segment.poison = {"customerio:email_poison"}
    lines = [
        json.dumps(make_event("a")),
        json.dumps(make_event("b", metric=None)),
        '{"event": {"metric": "x"',
        json.dumps(make_event("c", metric="poison")),
        "{broken}",
        json.dumps(make_event("d")),
    ]
    done = run("replay", "-", stdin="\n".join(lines), SEGMENT_HOST=segment.url)
    assert done.returncode == 1
    assert done.stdout == "2 sent, 4 not sent, 0 other lines.\n"
    for number, reason in {2: "it has no name", 3: "not whole", 4: "Segment refuses it (400)", 5: "not JSON"}.items():
        assert any(line.startswith(f"line {number}: ") and reason in line for line in done.stderr.splitlines()), (
            done.stderr
        )
    assert segment.events() == ["event-a", "event-d"]


def test_replay_keeps_trying_and_sends_batches(segment):
    segment.faults.extend(["500", "429:1", "reset"])
    lines = "\n".join(json.dumps(make_event(number)) for number in range(250))
    done = run("replay", "--rate", "1000", "-", stdin=lines, SEGMENT_HOST=segment.url)
    assert done.returncode == 0, done.stderr
    assert len(segment.kept) == 250
    assert [len(upload) for upload in segment.uploads] == [100, 100, 50]


def test_replay_keeps_to_the_rate(segment):
    lines = "\n".join(json.dumps(make_event(number)) for number in range(200))
    assert run("replay", "--rate", "100", "-", stdin=lines, SEGMENT_HOST=segment.url).returncode == 0
    first, second = [request["at"] for request in segment.requests]
    assert second - first > 0.9


def test_translate_prints_and_sends_nothing(segment):
    done = run("translate", "tests/events/slack_clicked.json", **NO_SETTINGS)
    assert json.loads(done.stdout)["event"] == "customerio:slack_clicked"
    event = json.dumps(json.loads((ROOT / "tests/events/slack_clicked.json").read_text()))
    done = run("translate", "-", stdin=event, SEGMENT_HOST=segment.url)
    assert done.returncode == 0
    assert json.loads(done.stdout)["event"] == "customerio:slack_clicked"
    done = run("translate", "-", stdin='{"metric": 5, "data": {}}')
    assert (done.returncode, done.stderr.startswith("line 1: it has no name")) == (1, True)
    assert segment.requests == []


def test_without_settings_nothing_is_acknowledged():
    code = "from app import app; print(app.test_client().post('/webhook', json={}).status_code)"
    env = {"PATH": os.environ["PATH"], "FLASK_RUN_FROM_CLI": "true"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "503"
    del env["FLASK_RUN_FROM_CLI"]
    assert (
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, check=False).returncode
        != 0
    )
