"""Starting: from the Procfile's command to serving, or to one readable message."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import KEYS, ROOT, InProcess, Relay, answers, environment, free_port, make_event, sign, until
from harness import APP, GUNICORN

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
    assert f"Is a directory ({tmp_path}, as the user " in log
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


def test_a_relay_without_a_signing_key_yet_starts_and_warns(start, segment):
    """Customer.io shows the key only once it has the relay's address."""
    relay = start(segment, CUSTOMERIO_SIGNING_KEY="unknown-yet")
    assert relay.log.count("[WARNING] CUSTOMERIO_SIGNING_KEY has a word in place of the key") == 1
    assert relay.post(make_event()).status_code == 503
    assert segment.requests == []


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


@pytest.mark.parametrize("form", ["text", "json"])
def test_a_dry_run_whose_output_nobody_reads_answers(start, form):
    relay = start(DRY_RUN="force", LOG_FORMAT=form)
    relay.reading.clear()
    for size in (3_000, 30_000):
        events = [make_event(number, data={"customer_id": "1", "content": "x" * size}) for number in range(64)]
        assert {answer.status_code for answer in relay.post_all(events)} == {200}
    assert relay.get("/health").status_code == 200
    relay.reading.set()
    until(lambda: relay.post(make_event("read")).status_code == 200 and '"userId": "person-read"' in relay.log)


def test_what_a_dry_run_printed_while_nobody_read_comes_later(start):
    relay = start(DRY_RUN="force")
    relay.reading.clear()
    events = [make_event(number, data={"customer_id": "1", "content": "x" * 5_000}) for number in range(64)]
    assert {answer.status_code for answer in relay.post_all(events)} == {200}
    relay.reading.set()
    until(lambda: relay.log.count("track call:\n{\n") == relay.log.count("\n}\n") == 64)


# An invalid setting -> the message instead of a start.
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


def test_a_wrong_log_level_is_said_in_json_too(start):
    relay = start(wait=False, LOG_FORMAT="json", LOG_LEVEL="loud")
    assert relay.process.wait(10) == 1
    *_, line = map(json.loads, relay.whole_log().splitlines())
    assert "LOG_LEVEL is one of" in line["message"]


def test_a_wrong_log_format_keeps_the_log_level(start):
    relay = start(wait=False, LOG_FORMAT="xml", LOG_LEVEL="critical")
    assert relay.process.wait(10) == 1
    assert relay.whole_log().startswith("The relay cannot start:")


# How gunicorn is started: options, environment, and whether in another folder than the repository.
OTHER_WAYS = {
    "another worker": (["-k", "sync"], {}, False),
    "threads": (["-k", "gthread", "--threads", "4"], {}, False),
    "gunicorn's own gevent worker": (["-k", "gevent"], {}, False),
    "the application loaded in the arbiter": (["--preload"], {}, False),
    "by GUNICORN_CMD_ARGS": ([], {"GUNICORN_CMD_ARGS": "--preload"}, False),
    "another folder": (["--chdir", str(ROOT)], {}, True),
    "only the code is found": ([], {"PYTHONPATH": str(ROOT)}, True),
    "gevent, and only the code": (["-k", "gevent"], {"PYTHONPATH": str(ROOT)}, True),
    "loaded in the arbiter, and only the code": (["--preload"], {"PYTHONPATH": str(ROOT)}, True),
}


def gunicorn(options, folder=ROOT, app=APP, **settings):
    """Run gunicorn until it ends by itself; return how."""
    env = {**KEYS, "PATH": os.environ["PATH"], "PORT": str(free_port()), **settings}
    command = [GUNICORN, app, *options]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=20, check=False)


@pytest.mark.gunicorn
@pytest.mark.parametrize(("options", "settings", "elsewhere"), OTHER_WAYS.values(), ids=OTHER_WAYS.keys())
def test_under_gunicorn_with_its_own_settings_or_not_at_all(tmp_path, options, settings, elsewhere):
    done = gunicorn(options, tmp_path if elsewhere else ROOT, **settings)
    assert done.returncode in (1, 4)
    assert f'type gunicorn -c {ROOT}/gunicorn.conf.py "app:create_app()"' in done.stderr
    assert done.stderr.count("The relay cannot start") == 1
    assert "Traceback" not in done.stderr
    assert done.stderr.count("Booting worker") <= 2


@pytest.mark.gunicorn
def test_without_parentheses_it_does_not_start_and_fail_on_every_webhook():
    done = gunicorn([], app="app:create_app")
    assert done.returncode == 1
    assert f'type gunicorn -c {ROOT}/gunicorn.conf.py "app:create_app()"' in done.stderr


@pytest.mark.gunicorn
@pytest.mark.parametrize("options", [[], ["--chdir", str(ROOT)]], ids=["", "with --chdir"])
def test_from_any_folder_with_its_settings_named(segment, tmp_path, options):
    env = environment(segment, {})
    with Relay(env, [APP, "-c", str(ROOT / "gunicorn.conf.py"), *options], folder=tmp_path) as relay:
        assert relay.post(make_event()).status_code == 200


REFUSED_IN_THE_BACKGROUND = {
    "a setting": ([], {"DRY_RUN": "maybe"}, "DRY_RUN is a flag"),
    "a log of JSON": ([], {"DRY_RUN": "maybe", "LOG_FORMAT": "json"}, "DRY_RUN is a flag"),
    "another worker": (["-k", "sync"], {}, "gunicorn.conf.py"),
    "loaded in the arbiter": (["--preload"], {}, "gunicorn.conf.py"),
}


@pytest.mark.gunicorn
@pytest.mark.parametrize(
    ("options", "settings", "words"), REFUSED_IN_THE_BACKGROUND.values(), ids=REFUSED_IN_THE_BACKGROUND.keys()
)
def test_in_the_background_a_refusal_is_said_where_it_was_started(options, settings, words):
    done = gunicorn(["-D", *options], **settings)  # until the last process has closed its standard error
    assert re.search(rf"The relay cannot start:(\n|\\n)  - .*{words}", done.stderr)


@pytest.mark.parametrize("script_name", ["/relay", "/relay/", "/a/b", "/web", "/webhook", "relay", "/"])
def test_script_name_is_a_warning_and_costs_no_hour(start, segment, script_name):
    relay = start(segment, SCRIPT_NAME=script_name)
    prefix = script_name.rstrip("/")
    assert f"SCRIPT_NAME is {script_name}: the relay answers at {prefix}/webhook, and at /webhook." in relay.log
    body = json.dumps(make_event()).encode()
    for path in {"", prefix if prefix.startswith("/") else ""}:
        assert relay.request("POST", f"{path}/webhook", body, sign(body)).status_code == 200
        assert relay.get(f"{path}/health").status_code == 200


def test_when_the_arbiter_is_killed_workers_leave_gracefully(start, segment):
    relay = start(segment)
    workers = relay.workers()
    segment.hold()
    with ThreadPoolExecutor(20) as pool:
        posted = [pool.submit(relay.post, make_event(number)) for number in range(20)]
        # What a worker has above 15 uploads is in its queue.
        until(lambda: sum(len(upload) for upload in segment.uploads) >= 15)
        relay.process.kill()
        threading.Timer(1.2, segment.release).start()
        again = start(segment, PORT=str(relay.port), wait=False)  # at once, as a supervisor does
        assert [future.result().status_code for future in posted] == [200] * 20
    until(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in workers))
    until(again.workers)  # the port was free soon enough
    until(lambda: answers(again.url + "/health"))
    assert again.post(make_event("after")).status_code == 200
    assert relay.log.count("The arbiter is gone") == len(workers)


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
    assert f"curl -d @tests/events/email_opened.json {url}/webhook" in log


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


def test_segments_names_reach_the_track_call_and_the_metrics_keep_customerios(segment):
    client = InProcess(segment, EVENT_NAMES="segment")
    assert client.post(make_event("a", object_type="in_app", metric="clicked")).status_code == 200
    (message,) = segment.kept.values()
    assert message["event"] == "In-App Clicked"
    assert 'relay_events_total{metric="clicked",object_type="in_app"} 1.0' in client.get("/metrics").text


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


HALF_MADE = {  # what .venv has -> whether it is made anew
    "nothing": ([], True),
    "a python, after a failed venv": (["python"], True),
    "both": (["python", "pip"], False),
}


@pytest.mark.parametrize(("there", "anew"), HALF_MADE.values(), ids=HALF_MADE.keys())
def test_make_install_takes_no_half_made_venv_for_a_whole_one(tmp_path, there, anew):
    """Debian's python3 leaves one without pip if python3-venv is missing."""
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / "requirements.txt").touch()
    for name in there:
        (tmp_path / ".venv/bin" / name).touch()
    done = subprocess.run(
        ["make", "-n", "-f", str(ROOT / "Makefile"), "install", "PYTHON=python3"],
        cwd=tmp_path,
        env={"PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        check=True,
    )
    assert ("python3 -m venv .venv --clear" in done.stdout) == anew
