"""`python -m ops ...`: check, sample, replay, translate, as an operator calls them."""

import json
import os
import subprocess
import sys

import pytest
from click.testing import CliRunner
from conftest import KEYS, ROOT, free_port, make_event

from ops.__main__ import main

NO_SETTINGS = dict.fromkeys(KEYS)


def run(*words, stdin=None, **settings):
    env = {**KEYS, "SEGMENT_HOST": None, "DRY_RUN": None, **settings}
    return CliRunner().invoke(main, words, input=stdin, env=env, prog_name="python -m ops")


@pytest.fixture
def slept(monkeypatch):
    """The seconds that a command would have slept."""
    slept = []
    monkeypatch.setattr("ops.__main__.time.sleep", slept.append)
    return slept


@pytest.mark.parametrize("command", ["check", "sample", "replay", "translate"])
def test_help_needs_no_settings(command):
    done = run(command, "--help", **NO_SETTINGS)
    assert done.exit_code == 0
    assert done.stdout.startswith(f"Usage: python -m ops {command}")


def test_they_are_run_as_a_module():
    command = [sys.executable, "-m", "ops", "--help"]
    done = subprocess.run(command, cwd=ROOT, env={"PATH": os.environ["PATH"]}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Usage: python -m ops [OPTIONS] COMMAND")
    for name in ("check", "sample", "replay", "translate"):
        assert f"\n  {name} " in done.stdout


def test_check(segment):
    done = run("check", SEGMENT_HOST=segment.url)
    assert done.exit_code == 0, done.stderr
    assert f"{segment.url} took the event in" in done.stdout
    assert "look for customerio:relay_check in Segment" in done.stdout
    assert [message["event"] for message in segment.kept.values()] == ["customerio:relay_check"]


def test_check_of_a_dry_run_sends_nothing(segment):
    done = run("check", SEGMENT_HOST=segment.url, DRY_RUN="1")
    assert (done.exit_code, segment.requests) == (0, [])
    assert "customerio:relay_check was not sent" in done.stdout


def test_check_says_what_is_wrong(segment):
    done = run("check", **NO_SETTINGS)
    assert done.exit_code == 1
    assert "SEGMENT_WRITE_KEY is not set" in done.stderr
    assert "Traceback" not in done.stderr
    segment.fault = "401"
    done = run("check", SEGMENT_HOST=segment.url)
    assert (done.exit_code, "refuses the write key" in done.stderr) == (1, True)
    done = run("check", SEGMENT_HOST=f"http://127.0.0.1:{free_port()}")
    assert (done.exit_code, "the connection to Segment failed" in done.stderr) == (1, True)


def test_sample(relay, segment):
    done = run("sample", "--url", relay.url, "--event", "sms_replied")
    assert (done.exit_code, done.stdout[:3]) == (0, "200"), done.stderr
    (message,) = segment.kept.values()
    assert message["event"] == "customerio:sms_replied"
    done = run("sample", "--url", relay.url, CUSTOMERIO_SIGNING_KEY="another")
    assert (done.exit_code, done.stdout[:3]) == (1, "401")


@pytest.mark.parametrize("end", ["", "/", "/webhook"])
def test_sample_finds_the_webhook(relay, end):
    assert run("sample", "--url", relay.url + end).stdout[:3] == "200"


def test_sample_says_what_is_wrong():
    done = run("sample", "--event", "email_eaten")
    assert (done.exit_code, "not one of customer_subscribed" in done.stderr) == (2, True)
    done = run("sample", "--url", f"http://127.0.0.1:{free_port()}")
    assert (done.exit_code, "Is the relay running?" in done.stderr) == (1, True)


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
    assert done.exit_code == 0, done.stderr
    assert done.stdout == "4 sent, 0 not sent, 3 other lines.\n"
    assert segment.events() == ["event-letter", "event-prefixed", "event-compact", "event-plain"]
    assert len(segment.requests) == 1
    again = run("replay", "-", stdin=LOG, SEGMENT_HOST=segment.url)
    assert again.exit_code == 0
    assert segment.duplicates == 4


def test_replay_gives_an_event_the_message_id_that_the_relay_gives_it(client, segment):
    event = make_event("same")
    assert client.post(event).status_code == 200
    assert run("replay", "-", stdin=json.dumps(event) + "\n", SEGMENT_HOST=segment.url).exit_code == 0
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
    assert done.exit_code == 1
    assert done.stdout == "2 sent, 4 not sent, 0 other lines.\n"
    for number, reason in {2: "it has no name", 3: "not whole", 4: "Segment refuses it (400)", 5: "not JSON"}.items():
        assert any(line.startswith(f"line {number}: ") and reason in line for line in done.stderr.splitlines()), (
            done.stderr
        )
    assert segment.events() == ["event-a", "event-d"]


def test_replay_keeps_trying_and_sends_batches(segment, slept):
    segment.faults.extend(["500", "429:3", "reset"])
    lines = "\n".join(json.dumps(make_event(number)) for number in range(250))
    done = run("replay", "--rate", "1000000", "-", stdin=lines, SEGMENT_HOST=segment.url)
    assert done.exit_code == 0, done.stderr
    assert len(segment.kept) == 250
    assert [len(upload) for upload in segment.uploads] == [100, 100, 50]
    # A second, what Segment asks for, and four seconds.
    assert [seconds for seconds in slept if seconds >= 1] == [1, 3, 4]


def test_replay_gives_up_in_the_end_and_says_so(segment, slept):
    segment.fault = "500"
    lines = "\n".join(json.dumps(make_event(number)) for number in range(2))
    done = run("replay", "-", stdin=lines, SEGMENT_HOST=segment.url)
    assert (done.exit_code, done.stdout) == (1, "0 sent, 2 not sent, 0 other lines.\n")
    assert "line 1: Segment answered 500\nline 2: Segment answered 500\n" in done.stderr
    assert len(segment.requests) == 6
    assert [seconds for seconds in slept if seconds >= 1] == [1, 2, 4, 8, 16]


def test_replay_keeps_to_the_rate(segment, slept):
    lines = "\n".join(json.dumps(make_event(number)) for number in range(200))
    assert run("replay", "--rate", "100", "-", stdin=lines, SEGMENT_HOST=segment.url).exit_code == 0
    assert [len(upload) for upload in segment.uploads] == [100, 100]
    first, second = slept
    assert 0.9 < first <= 1
    assert 0.9 < second <= 1


def test_replay_sends_nothing_in_a_dry_run(segment):
    done = run("replay", "-", stdin=LOG, SEGMENT_HOST=segment.url, DRY_RUN="1")
    assert (done.exit_code, "nothing would be sent" in done.stderr, segment.requests) == (1, True, [])


def test_translate_prints_and_sends_nothing(segment):
    path = ROOT / "tests/events/slack_clicked.json"
    done = run("translate", str(path), **NO_SETTINGS)
    assert json.loads(done.stdout)["event"] == "customerio:slack_clicked"
    event = json.dumps(json.loads(path.read_text()))
    done = run("translate", "-", stdin=event, SEGMENT_HOST=segment.url)
    assert done.exit_code == 0
    assert json.loads(done.stdout)["event"] == "customerio:slack_clicked"
    done = run("translate", "-", stdin='{"metric": 5, "data": {}}')
    assert (done.exit_code, done.stderr.startswith("line 1: it has no name")) == (1, True)
    assert segment.requests == []
