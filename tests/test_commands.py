"""`python -m ops ...`: check, sample, replay, translate, as an operator calls them."""

import errno
import json
import os
import pwd
import stat
import subprocess
import sys

import pytest
from click.testing import CliRunner
from conftest import KEYS, ROOT, WRITE_KEY, InProcess, free_port, make_event

from ops.__main__ import main
from ops.timing import Timing
from server.preflight import file_problem
from translate import NO_ECHO

NO_SETTINGS = dict.fromkeys(KEYS)


def run(*words, stdin=None, timing=None, **settings):
    env = {**KEYS, "SEGMENT_HOST": None, "DRY_RUN": None, **settings}
    return CliRunner().invoke(main, words, input=stdin, obj=timing, env=env, prog_name="python -m ops")


@pytest.fixture
def slept():
    """The seconds that a command would have slept, with `timing`."""
    return []


@pytest.fixture
def timing(slept):
    """A clock that stands still, so that a command doesn't wait."""
    return Timing(lambda: 0, slept.append)


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
    (message,) = segment.kept.values()
    assert message["event"] == "customerio:relay_check"
    assert message["integrations"] == NO_ECHO  # or Customer.io would get a person named relay_check


def test_check_names_its_event_as_the_relay_does(segment):
    done = run("check", SEGMENT_HOST=segment.url, EVENT_NAMES="segment")
    assert "look for Relay Check in Segment" in done.stdout
    (message,) = segment.kept.values()
    assert (message["event"], message["anonymousId"]) == ("Relay Check", "relay_check")


def test_check_of_a_dry_run_sends_nothing(segment):
    done = run("check", SEGMENT_HOST=segment.url, DRY_RUN="force")
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
    done = run("sample", "--yes", "--url", relay.url, "--event", "sms_replied")
    assert (done.exit_code, done.stdout[:3]) == (0, "200"), done.stderr
    (message,) = segment.kept.values()
    assert message["event"] == "customerio:sms_replied"
    done = run("sample", "--yes", "--url", relay.url, CUSTOMERIO_SIGNING_KEY="another")
    assert (done.exit_code, done.stdout[:3]) == (1, "422")


def test_a_sample_is_plainly_one(relay, segment):
    assert run("sample", "--yes", "--url", relay.url).exit_code == 0
    (message,) = segment.kept.values()
    assert (message["userId"], message["context"]["traits"]) == ("relay-sample", {"email": "relay-sample@example.com"})
    assert message["context"]["event_id"].startswith("relay-sample-")


ASKED = {  # the reply -> exit code, the message
    "yes": ("y\n", 0, ""),
    "no": ("n\n", 1, "Aborted!"),
    "Enter": ("\n", 1, "Aborted!"),
    "nothing, without a terminal": (
        "",
        2,
        "Without a terminal nobody can confirm: nothing was sent. Add --yes to send it.",
    ),
}


@pytest.mark.parametrize(("answer", "code", "words"), ASKED.values(), ids=ASKED.keys())
def test_sample_asks_before_a_live_relay_sends_it(relay, segment, answer, code, words):
    done = run("sample", "--url", relay.url, "--event", "sms_replied", stdin=answer)
    assert (done.exit_code, words in done.stderr, len(segment.requests)) == (code, True, int(code == 0)), done.stderr
    assert f"{relay.url} is live: it will send sms_replied of a person with the id relay-sample" in done.stderr


def test_sample_asks_nobody_about_a_dry_run(start):
    relay = start(DRY_RUN="force")
    done = run("sample", "--url", relay.url, stdin="")
    assert (done.exit_code, json.loads(done.stdout[4:])["status"]) == (0, "dry-run"), done.stderr


def test_sample_asks_where_a_proxy_hides_the_metrics(segment):
    """Segment itself will do: it has none."""
    assert run("sample", "--url", segment.url, stdin="").exit_code == 2
    assert [(request["method"], request["path"]) for request in segment.requests] == [("GET", "/metrics")]


@pytest.mark.parametrize("end", ["", "/", "/webhook"])
def test_sample_finds_the_webhook(relay, end):
    assert run("sample", "--yes", "--url", relay.url + end).stdout[:3] == "200"


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


@pytest.mark.parametrize("command", ["replay", "translate"])
def test_an_item_of_an_array_that_cannot_be_sent_is_named(segment, command):
    text = json.dumps([make_event("a"), make_event("b", metric=None)])
    done = run(command, "-", stdin=text, SEGMENT_HOST=segment.url)
    assert "line 1, item 2: it has no name" in done.stderr


def one_a_line(*events):
    return "".join(json.dumps(event) + "\n" for event in events)


FORMS = {
    "one a line": one_a_line(make_event("a"), make_event("b")),
    "pretty-printed": "".join(json.dumps(make_event(name), indent=2) + "\n" for name in "ab"),
    "an array": json.dumps([make_event("a"), make_event("b")]),
    "a pretty-printed array": json.dumps([make_event("a"), make_event("b")], indent=2),
    "an array of dead letters": f"[{LETTER.replace('event-letter', 'event-a')}, {json.dumps(make_event('b'))}]",
}


@pytest.mark.parametrize("text", FORMS.values(), ids=FORMS.keys())
def test_replay_reads_every_form(segment, text):
    done = run("replay", "-", stdin=text, SEGMENT_HOST=segment.url)
    assert (done.exit_code, done.stdout) == (0, "2 sent, 0 not sent, 0 other lines.\n")
    assert segment.events() == ["event-a", "event-b"]


@pytest.mark.parametrize("form", [json.dumps, lambda event: json.dumps(event, indent=2)], ids=["a line", "pretty"])
def test_replay_sends_a_webhook_that_holds_what_looks_like_a_dead_letter(segment, form):
    """Attributes of a person may have any name."""
    event = make_event("a", data={"customer_id": "1", "variables": {"event": {"metric": "x"}, "reason": "y"}})
    assert run("replay", "-", stdin=form(event), SEGMENT_HOST=segment.url).exit_code == 0
    (message,) = segment.kept.values()
    assert message["properties"] == event["data"]


@pytest.mark.parametrize("command", ["replay", "translate"])
@pytest.mark.parametrize("text", ["", "\n", "[INFO] Booting worker\n", "[]", '{"a": 1}\n'], ids=repr)
def test_a_file_in_which_nothing_is_found_is_a_failure(segment, command, text):
    done = run(command, "-", stdin=text, SEGMENT_HOST=segment.url)
    assert done.exit_code == 1
    assert "There is no webhook and no dead letter in it." in done.stderr
    assert segment.requests == []


# The cycle: move the file, mend, replay, repeat. -------------------------------------------------


def test_replay_writes_what_could_not_be_sent_as_it_stood(segment, tmp_path):
    segment.poison = {"customerio:email_poison"}
    poisoned, nameless = make_event("b", metric="poison"), make_event("c", metric=None)
    letter = json.dumps({"event": nameless, "reason": "it has no name", "at": "2026-11-23T00:00:00+00:00"})
    pretty = json.dumps(poisoned, indent=2)
    file, rest = tmp_path / "letters.jsonl", tmp_path / "rest.jsonl"
    file.write_text(f"{json.dumps(make_event('a'))}\n[INFO] a log's line\n{letter}\n{pretty}\n{{broken}}\n")
    done = run("replay", str(file), "--failed", str(rest), SEGMENT_HOST=segment.url)
    assert (done.exit_code, done.stdout) == (1, "1 sent, 3 not sent, 1 other lines.\n")
    assert rest.read_text() == f"{letter}\n{pretty}\n{{broken}}\n"
    assert stat.S_IMODE(rest.stat().st_mode) == 0o600
    # Mended at Segment, and here.
    segment.poison = set()
    rest.write_text(rest.read_text().replace('"metric": null', '"metric": "opened"').replace("{broken}\n", ""))
    again = run("replay", str(rest), "--failed", str(rest), SEGMENT_HOST=segment.url)
    assert (again.exit_code, again.stdout) == (0, "2 sent, 0 not sent, 0 other lines.\n")
    assert rest.read_text() == ""
    assert sorted(segment.events()) == ["event-a", "event-b", "event-c"]


def test_replay_writes_what_segment_did_not_take_in_the_end(segment, timing, tmp_path):
    segment.fault = "500"
    text = one_a_line(make_event("a"), make_event("b"))
    rest = tmp_path / "rest.jsonl"
    assert run("replay", "-", "--failed", str(rest), stdin=text, SEGMENT_HOST=segment.url, timing=timing).exit_code == 1
    assert rest.read_text() == text


def test_what_could_not_be_sent_is_readable_by_its_owner_only_whatever_was_there_before(segment, tmp_path):
    rest, shown = tmp_path / "rest.jsonl", tmp_path / "shown"
    text = one_a_line(make_event("a", metric=None))
    rest.write_text(one_a_line(make_event("b")) + text)
    rest.chmod(0o666)
    os.link(rest, shown)  # as good as open: its other link shows what is written to it
    run("replay", str(rest), "--failed", str(rest), SEGMENT_HOST=segment.url)
    assert (rest.read_text(), stat.S_IMODE(rest.stat().st_mode)) == (text, 0o600)
    assert shown.read_text() == one_a_line(make_event("b")) + text


def interrupted(error):
    def interrupt(*_):
        raise error

    return interrupt


def test_a_replay_that_is_interrupted_leaves_its_file_as_it_was(segment, tmp_path):
    rest = tmp_path / "rest.jsonl"
    text = one_a_line(make_event("a"), make_event("b", metric=None))
    rest.write_text(text)
    timing = Timing(sleep=interrupted(KeyboardInterrupt()))
    done = run("replay", str(rest), "--failed", str(rest), timing=timing, SEGMENT_HOST=segment.url)
    assert (done.exit_code, isinstance(done.exception, SystemExit)) == (1, True)
    assert rest.read_text() == text
    assert list(tmp_path.iterdir()) == [rest]


def test_a_full_disk_leaves_the_file_as_it_was(segment, tmp_path, monkeypatch):
    rest = tmp_path / "rest.jsonl"
    text = one_a_line(make_event("a"), make_event("b", metric=None))
    rest.write_text(text)
    monkeypatch.setattr("ops.rest.os.fsync", interrupted(OSError(errno.ENOSPC, "No space left on device")))
    done = run("replay", str(rest), "--failed", str(rest), SEGMENT_HOST=segment.url)
    assert (done.exit_code, "No space left on device. It is as it was." in done.stderr) == (1, True)
    assert rest.read_text() == text
    assert list(tmp_path.iterdir()) == [rest]


def test_what_the_relay_appends_during_a_replay_is_not_replaced(segment, tmp_path):
    """Unless the file was moved away first."""
    letters = tmp_path / "letters.jsonl"
    before, later = one_a_line(make_event("a", metric=None), make_event("b")), one_a_line(make_event("c"))
    letters.write_text(before)
    timing = Timing(sleep=lambda _: letters.write_text(before + later))
    done = run("replay", str(letters), "--failed", str(letters), timing=timing, SEGMENT_HOST=segment.url)
    assert (done.exit_code, f"{letters} has changed meanwhile" in done.stderr) == (1, True)
    assert letters.read_text() == before + later
    assert list(tmp_path.iterdir()) == [letters]


NO_PLACE = {  # for what could not be sent
    "a file with something in it": (lambda path: path.write_text("from yesterday"), "replay that one first"),
    "a named pipe": (os.mkfifo, "is not a regular file"),
    "a device": (lambda path: path.symlink_to("/dev/null"), "is not a regular file"),
    "a folder": (os.mkdir, "is a directory"),
}


@pytest.mark.parametrize(("make", "words"), NO_PLACE.values(), ids=NO_PLACE.keys())
def test_replay_replaces_nothing_but_the_file_it_reads(segment, tmp_path, make, words):
    rest = tmp_path / "rest.jsonl"
    make(rest)
    before = rest.stat()
    done = run("replay", "-", "--failed", str(rest), stdin=one_a_line(make_event("a")), SEGMENT_HOST=segment.url)
    assert (done.exit_code != 0, words in done.stderr, segment.requests) == (True, True, [])
    assert (rest.stat().st_ino, rest.stat().st_size) == (before.st_ino, before.st_size)
    assert list(tmp_path.iterdir()) == [rest]


def test_an_empty_file_may_be_replaced(segment, tmp_path):
    rest = tmp_path / "rest.jsonl"
    rest.touch()
    text = one_a_line(make_event("a", metric=None))
    run("replay", "-", "--failed", str(rest), stdin=text, SEGMENT_HOST=segment.url)
    assert rest.read_text() == text


def test_what_the_relay_kept_is_what_replay_brings_back(segment, tmp_path):
    path = tmp_path / "letters.jsonl"
    relay = InProcess(segment, DEAD_LETTER_FILE=str(path))
    segment.poison = {"customerio:email_opened"}
    events = [make_event(number, subject="é\ud800") for number in range(3)]
    assert [relay.post(event).status_code for event in events] == [202] * 3
    segment.poison = set()
    moved = path.rename(tmp_path / "moved.jsonl")
    assert run("replay", str(moved), SEGMENT_HOST=segment.url).exit_code == 0
    assert segment.events() == ["event-0", "event-1", "event-2"]
    assert [relay.post(event).status_code for event in events] == [200] * 3
    assert segment.duplicates == 3  # the same messageIds


# Settings. ---------------------------------------------------------------------------------------


def test_settings_are_read_from_a_file_and_the_environment_wins(segment, tmp_path):
    file = tmp_path / "relay.env"
    file.write_text(
        f"# The relay's settings.\nSEGMENT_WRITE_KEY={WRITE_KEY}\nSEGMENT_HOST='{segment.url}'\n"
        'EVENT_PREFIX="cio "\nOMIT_PROPERTIES=subject\n'
    )
    event = one_a_line(make_event("a", data={"customer_id": "1", "subject": "s"}))
    done = run("--env-file", str(file), "replay", "-", stdin=event, **NO_SETTINGS)
    assert done.exit_code == 0, done.stderr
    (message,) = segment.kept.values()
    assert (message["event"], message["properties"]) == ("cio email_opened", {"customer_id": "1"})
    done = run("--env-file", str(file), "translate", "-", stdin=event, EVENT_PREFIX="env: ", **NO_SETTINGS)
    assert json.loads(done.stdout)["event"] == "env: email_opened"


def test_a_file_of_settings_is_looked_at_as_the_environment_is(tmp_path):
    file = tmp_path / "relay.env"
    file.write_text("SEGMENT_WRITE_KEY=...\nPORT=http\n")
    done = run("--env-file", str(file), "check", **NO_SETTINGS)
    assert done.exit_code == 1
    assert "SEGMENT_WRITE_KEY is still the placeholder of an example" in done.stderr
    assert "PORT is a whole number" in done.stderr


NOT_SETTINGS = {"another encoding": "A=ключ".encode("cp1251"), "a zero byte": b"A=1\0"}


@pytest.mark.parametrize("content", NOT_SETTINGS.values(), ids=NOT_SETTINGS.keys())
def test_a_file_that_is_not_utf_8_is_one_sentence(tmp_path, content):
    file = tmp_path / "relay.env"
    file.write_bytes(content)
    done = run("--env-file", str(file), "check")
    assert (done.exit_code, isinstance(done.exception, SystemExit)) == (2, True)
    assert f"{file} is not a text in UTF-8." in done.stderr


def test_what_else_a_file_sets_counts_as_it_does_for_the_service(segment, tmp_path):
    """The relay honours HTTPS_PROXY, NO_PROXY and REQUESTS_CA_BUNDLE."""
    file = tmp_path / "relay.env"
    file.write_text(f"SEGMENT_HOST=http://segment.example\nhttp_proxy={segment.url}\n")
    run("--env-file", str(file), "check", http_proxy=None, no_proxy=None)
    assert [request["path"] for request in segment.requests] == ["http://segment.example/v1/batch"]
    run("--env-file", str(file), "check", http_proxy=f"http://127.0.0.1:{free_port()}", no_proxy=None)
    assert len(segment.requests) == 1  # a variable that is set wins


def test_a_file_of_settings_that_is_not_there_is_one_sentence(tmp_path):
    done = run("--env-file", str(tmp_path / "none.env"), "check")
    assert (done.exit_code, "No such file or directory" in done.stderr) == (2, True)


def test_translate_keeps_to_the_settings_even_without_keys():
    event = one_a_line(make_event("a", data={"customer_id": "1", "subject": "secret", "recipient": "a@example.org"}))
    done = run("translate", "-", stdin=event, OMIT_PROPERTIES="subject,recipient", **NO_SETTINGS)
    assert json.loads(done.stdout)["properties"] == {"customer_id": "1"}


@pytest.mark.parametrize("command", ["translate", "replay"])
def test_a_command_names_events_as_the_relay_does(segment, command):
    done = run(command, "-", stdin=one_a_line(make_event("a")), SEGMENT_HOST=segment.url, EVENT_NAMES="segment")
    (message,) = [json.loads(done.stdout)] if command == "translate" else segment.kept.values()
    assert message["event"] == "Email Opened"


NOT_NEEDED = {
    "replay": (["replay", "-"], "CUSTOMERIO_SIGNING_KEY"),
    "translate": (["translate", "-"], "SEGMENT_WRITE_KEY"),
}


@pytest.mark.parametrize(("words", "key"), NOT_NEEDED.values(), ids=NOT_NEEDED.keys())
def test_a_command_needs_only_the_keys_that_it_uses(segment, words, key):
    done = run(*words, stdin=one_a_line(make_event("a")), SEGMENT_HOST=segment.url, **{key: None})
    assert done.exit_code == 0, done.stderr


UNUSED = {  # a command, and what it makes no use of
    "translate, a dry run with both keys": (["translate", "-"], {"DRY_RUN": "1"}),
    "translate, a signing key": (["translate", "-"], {"CUSTOMERIO_SIGNING_KEY": "'k'"}),
    "translate, where to send": (["translate", "-"], {"SEGMENT_HOST": "..."}),
    "translate, a port": (["translate", "-"], {"PORT": "http", "LOG_FORMAT": "xml", "WEB_CONCURRENCY": ""}),
    "replay, a signing key": (["replay", "-"], {"CUSTOMERIO_SIGNING_KEY": "'k'"}),
    "replay, a port": (["replay", "-"], {"PORT": "http"}),
}


@pytest.mark.parametrize(("words", "settings"), UNUSED.values(), ids=UNUSED.keys())
def test_a_setting_that_a_command_does_not_use_may_be_wrong(segment, words, settings):
    done = run(*words, stdin=one_a_line(make_event("a")), **{"SEGMENT_HOST": segment.url} | settings)
    assert done.exit_code == 0, done.stderr


def test_sample_uses_the_signing_key_and_the_port_alone(relay):
    unused = {"SEGMENT_WRITE_KEY": "...", "SEGMENT_HOST": "...", "DRY_RUN": "maybe", "OMIT_PROPERTIES": "[]"}
    assert run("sample", "--yes", PORT=str(relay.port), **unused).stdout[:3] == "200"
    assert "CUSTOMERIO_SIGNING_KEY has quotes in it" in run("sample", CUSTOMERIO_SIGNING_KEY="'k'").stderr
    assert "PORT is a whole number" in run("sample", PORT="http").stderr


USED = {
    "translate, a write key": ("translate", {"SEGMENT_WRITE_KEY": "..."}, "SEGMENT_WRITE_KEY is still the placeholder"),
    "translate, a prefix": ("translate", {"EVENT_PREFIX": "''"}, "EVENT_PREFIX has quotes around its value"),
    "translate, names": ("translate", {"EVENT_NAMES": "x"}, "EVENT_NAMES is one of"),
    "replay, names": ("replay", {"EVENT_NAMES": "x"}, "EVENT_NAMES is one of"),
    "translate, echo": ("translate", {"ECHO_TO_CUSTOMERIO": "maybe"}, "ECHO_TO_CUSTOMERIO is a flag"),
    "replay, where to send": ("replay", {"SEGMENT_HOST": "https://..."}, "SEGMENT_HOST is a URL"),
    "replay, a dry run": ("replay", {"DRY_RUN": "1"}, "DRY_RUN is on: nothing would be sent"),
}


@pytest.mark.parametrize(("command", "settings", "words"), USED.values(), ids=USED.keys())
def test_a_setting_that_a_command_uses_must_be_right(segment, command, settings, words):
    done = run(command, "-", stdin=one_a_line(make_event("a")), **{"SEGMENT_HOST": segment.url} | settings)
    assert (done.exit_code, words in done.stderr, segment.requests) == (1, True, [])


@pytest.mark.parametrize("words", NOT_NEEDED.values(), ids=NOT_NEEDED.keys())
def test_a_command_that_keeps_no_dead_letters_leaves_their_file_alone(segment, tmp_path, words):
    """After `mv`, a `sudo ... replay` would leave a file that the relay's own user can't append to."""
    path = tmp_path / "letters.jsonl"
    settings = {"SEGMENT_HOST": segment.url, "DEAD_LETTER_FILE": str(path)}
    assert run(*words[0], stdin=one_a_line(make_event("a")), **settings).exit_code == 0
    assert not path.exists()


def test_a_file_for_what_fails_that_cannot_be_written_is_said_before_anything_is_sent(segment, tmp_path):
    text = one_a_line(make_event("a"), make_event("b", metric=None))
    done = run("replay", "-", "--failed", str(tmp_path / "no" / "rest"), stdin=text, SEGMENT_HOST=segment.url)
    assert (done.exit_code, segment.requests) == (1, [])
    assert "No such file or directory" in done.stderr


def test_sample_needs_no_write_key(relay):
    assert run("sample", "--yes", "--url", relay.url, SEGMENT_WRITE_KEY=None).stdout[:3] == "200"


@pytest.mark.parametrize("command", ["check", "replay"])
def test_a_wrong_setting_is_said_before_anything_is_sent(segment, command):
    """Not that "the relay cannot start": nobody starts it."""
    words = [command, "-"] if command == "replay" else [command]
    done = run(*words, stdin=one_a_line(make_event("a")), SEGMENT_HOST=segment.url, OMIT_PROPERTIES='"subject"')
    assert done.exit_code == 1
    assert "Error: The settings are wrong:\n  - OMIT_PROPERTIES has quotes in it" in done.stderr
    assert "cannot start" not in done.stderr
    assert segment.requests == []


CHECKED = {  # what is wrong at the start -> what check says
    "blank workers": ({"WEB_CONCURRENCY": " "}, "WEB_CONCURRENCY is set but blank"),
    "a number of workers that isn't a number": ({"WEB_CONCURRENCY": "abc"}, "WEB_CONCURRENCY is a whole number"),
    "a file that keeps nothing": ({"DEAD_LETTER_FILE": "/dev/null"}, "DEAD_LETTER_FILE cannot be appended to"),
    "a file that cannot be written": ({"DEAD_LETTER_FILE": "/"}, "DEAD_LETTER_FILE cannot be appended to"),
    "a dry run in production": ({"DRY_RUN": "1"}, "DRY_RUN is on while both keys are set"),
}


@pytest.mark.parametrize(("settings", "words"), CHECKED.values(), ids=CHECKED.keys())
def test_check_runs_the_checks_of_the_start(segment, settings, words):
    done = run("check", SEGMENT_HOST=segment.url, **settings)
    assert (done.exit_code, words in done.stderr, segment.requests) == (1, True, [])


# A place for dead letters -> what is wrong with it.
NO_FILE = {
    "a device": (lambda path: path.symlink_to("/dev/null"), "it is not a regular file"),
    "a named pipe": (os.mkfifo, "it is not a regular file"),
    "a folder": (os.mkdir, "Is a directory"),
    "a link to itself": (lambda path: path.symlink_to(path), "Too many levels of symbolic links"),
}


@pytest.mark.parametrize("create", [True, False], ids=["at the start", "in check"])
@pytest.mark.parametrize(("make", "problem"), NO_FILE.values(), ids=NO_FILE.keys())
def test_dead_letters_need_a_regular_file(tmp_path, make, problem, create):
    """Nothing is kept in a device, and opening a named pipe waits until somebody reads."""
    path = tmp_path / "letters.jsonl"
    make(path)
    user = pwd.getpwuid(os.geteuid()).pw_name
    assert file_problem(str(path), create=create) == f"{problem} ({path}, as the user {user})"


def test_only_the_start_creates_the_file_for_dead_letters(segment, tmp_path):
    """Under sudo it would be root's, and the relay could not append to it."""
    path = tmp_path / "letters.jsonl"
    assert run("check", SEGMENT_HOST=segment.url, DEAD_LETTER_FILE=str(path)).exit_code == 0
    assert list(tmp_path.iterdir()) == []
    assert file_problem(str(path)) is None
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert run("check", SEGMENT_HOST=segment.url, DEAD_LETTER_FILE=str(path)).exit_code == 0


def test_check_looks_at_the_folder_of_a_file_that_is_missing(segment, tmp_path, monkeypatch):
    missing = str(tmp_path / "no" / "letters.jsonl")
    assert "No such file or directory" in run("check", SEGMENT_HOST=segment.url, DEAD_LETTER_FILE=missing).stderr
    monkeypatch.setattr("os.access", lambda *_: False)
    there = str(tmp_path / "letters.jsonl")
    assert "Permission denied" in run("check", SEGMENT_HOST=segment.url, DEAD_LETTER_FILE=there).stderr
    assert segment.requests == []


def test_check_says_that_too_few_files_can_be_opened(segment):
    command = ["sh", "-c", 'ulimit -n 64 && exec "$@"', "-", sys.executable, "-m", "ops", "check"]
    env = {"PATH": os.environ["PATH"], **KEYS, "SEGMENT_HOST": segment.url}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=30)
    assert (done.returncode, "The limit of open files (ulimit -n) is 64." in done.stderr) == (1, True)
    assert segment.requests == []


def test_replay_keeps_trying_and_sends_batches(segment, slept, timing):
    segment.faults.extend(["500", "429:3", "reset"])
    lines = "\n".join(json.dumps(make_event(number)) for number in range(250))
    done = run("replay", "--rate", "1000000", "-", stdin=lines, SEGMENT_HOST=segment.url, timing=timing)
    assert done.exit_code == 0, done.stderr
    assert len(segment.kept) == 250
    assert [len(upload) for upload in segment.uploads] == [100, 100, 50]
    # A second, what Segment asks for, and four seconds.
    assert [seconds for seconds in slept if seconds >= 1] == [1, 3, 4]


def test_replay_gives_up_in_the_end_and_says_so(segment, slept, timing):
    segment.fault = "500"
    lines = "\n".join(json.dumps(make_event(number)) for number in range(2))
    done = run("replay", "-", stdin=lines, SEGMENT_HOST=segment.url, timing=timing)
    assert (done.exit_code, done.stdout) == (1, "0 sent, 2 not sent, 0 other lines.\n")
    assert "line 1: Segment answered 500\nline 2: Segment answered 500\n" in done.stderr
    assert len(segment.requests) == 6
    assert [seconds for seconds in slept if seconds >= 1] == [1, 2, 4, 8, 16]


HOPELESS = {  # what Segment answers -> why nothing can succeed
    "a refused key": ("401", "Segment refuses the write key (401): check SEGMENT_WRITE_KEY"),
    "a forbidden key": ("403", "Segment refuses the write key (403): check SEGMENT_WRITE_KEY"),
    "every event refused": ("400", "Segment refuses every event (400): check SEGMENT_WRITE_KEY"),
    "a redirect": ("redirect", "Segment's address redirects elsewhere: check SEGMENT_HOST"),
    "a captive portal": ("html", "what answered is not Segment: check SEGMENT_HOST and proxies"),
    "another server": ("404", "Segment answered 404"),
}


@pytest.mark.parametrize(("fault", "reason"), HOPELESS.values(), ids=HOPELESS.keys())
def test_replay_stops_at_once_when_nothing_can_succeed(segment, slept, timing, tmp_path, fault, reason):
    segment.fault = fault
    rest = tmp_path / "rest.jsonl"
    text = one_a_line(*map(make_event, range(250)))
    done = run("replay", "-", "--failed", str(rest), stdin=text, SEGMENT_HOST=segment.url, timing=timing)
    assert (done.exit_code, done.stdout) == (1, "0 sent, 250 not sent, 0 other lines.\n")
    assert done.stderr.endswith(f"Stopped: {reason}. Nothing else would be taken either, so it was not tried.\n")
    assert rest.read_text() == text
    assert slept == []
    assert len(segment.requests) == (4 if fault == "400" else 1)  # 100, 10, 1, and one event of our own


@pytest.mark.parametrize("fault", ["refuse", "500", "429:1"])
def test_replay_stops_when_a_first_upload_fails_to_the_end(segment, slept, timing, tmp_path, fault):
    segment.set_fault(fault)
    rest = tmp_path / "rest.jsonl"
    text = one_a_line(*map(make_event, range(250)))
    done = run("replay", "-", "--failed", str(rest), stdin=text, SEGMENT_HOST=segment.url, timing=timing)
    assert (done.exit_code, done.stdout) == (1, "0 sent, 250 not sent, 0 other lines.\n")
    assert "line 100: " in done.stderr
    assert "line 101: " not in done.stderr
    assert done.stderr.endswith(" Nothing else would be taken either, so it was not tried.\n")
    assert rest.read_text() == text
    assert len([seconds for seconds in slept if seconds >= 1]) == 5


def test_replay_goes_on_after_an_upload_that_fails_to_the_end_among_others(segment, timing):
    segment.faults.extend([None, *["500"] * 6])
    text = one_a_line(*map(make_event, range(250)))
    done = run("replay", "-", stdin=text, SEGMENT_HOST=segment.url, timing=timing)
    assert (done.exit_code, done.stdout) == (1, "150 sent, 100 not sent, 0 other lines.\n")


def test_replay_counts_what_was_sent_before_it_stopped(segment, timing, tmp_path):
    segment.faults.extend([None, "401"])
    rest = tmp_path / "rest.jsonl"
    text = one_a_line(make_event("bad", metric=None), *map(make_event, range(250)))
    done = run("replay", "-", "--failed", str(rest), stdin=text, SEGMENT_HOST=segment.url, timing=timing)
    assert (done.exit_code, done.stdout) == (1, "100 sent, 151 not sent, 0 other lines.\n")
    assert len(done.stderr.splitlines()) == 3  # the bar's label, the one that is bad, and why it stopped
    lines = text.splitlines(keepends=True)
    assert rest.read_text() == "".join([lines[0], *lines[101:]])


def test_replay_tries_once_whether_the_key_is_good(segment):
    segment.poison = {"customerio:email_poison"}
    text = one_a_line(*(make_event(number, metric="poison") for number in range(3)))
    done = run("replay", "-", stdin=text, SEGMENT_HOST=segment.url)
    assert (done.exit_code, done.stdout) == (1, "0 sent, 3 not sent, 0 other lines.\n")
    assert [message["event"] for message in segment.kept.values()] == ["customerio:relay_check"]


def test_replay_says_on_a_terminal_what_it_waits_for(segment):
    segment.faults.append("503")
    terminal, other = os.openpty()
    env = {"PATH": os.environ["PATH"], **KEYS, "SEGMENT_HOST": segment.url, "TERM": "xterm"}
    command = [sys.executable, "-m", "ops", "replay", "tests/events/legacy.json"]
    done = subprocess.run(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=other, timeout=30)
    os.close(other)
    shown = os.read(terminal, 100_000).decode()
    os.close(terminal)
    assert (done.returncode, done.stdout) == (0, b"1 sent, 0 not sent, 0 other lines.\n")
    assert "Segment answered 503: again in 1 s" in shown
    assert "100%" in shown
    assert "None" not in shown


def test_replay_keeps_to_the_rate(segment, slept, timing):
    lines = "\n".join(json.dumps(make_event(number)) for number in range(200))
    assert run("replay", "--rate", "100", "-", stdin=lines, SEGMENT_HOST=segment.url, timing=timing).exit_code == 0
    assert [len(upload) for upload in segment.uploads] == [100, 100]
    assert slept == [1, 1]


def test_replay_sends_nothing_in_a_dry_run(segment):
    done = run("replay", "-", stdin=LOG, SEGMENT_HOST=segment.url, DRY_RUN="force")
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
