"""The counts: of all workers, whichever answers, and of those that are gone."""

import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import time
from types import SimpleNamespace

import pytest
from conftest import ROOT, InProcess, make_event, sign, until
from prometheus_client.parser import text_string_to_metric_families

from config import VERSION, Config
from ops import samples
from ops.monitor.metrics import MINUTES, Metrics, documented_kind
from relay.outcomes import REASONS
from server import shared
from server.shared import ROWS, Counts, Shared

CONFIG = Config.from_env({"DRY_RUN": "1"})
NONE = dict.fromkeys(REASONS, 0)


@pytest.fixture
def client(always_fresh, segment):
    return InProcess(segment)


def all_samples(client):
    """Return every sample in /metrics of a relay, or in the text of a Metrics."""
    text = client.get("/metrics").text if hasattr(client, "get") else client.text().decode()
    return [sample for family in text_string_to_metric_families(text) for sample in family.samples]


def samples_of(client):
    """Return the value of each sample, by its name and its labels' values."""
    return {(sample.name, *sample.labels.values()): sample.value for sample in all_samples(client)}


def in_metrics(client):
    totals = dict(NONE)
    for (name, *labels), value in samples_of(client).items():
        if name == "relay_webhooks_total":
            totals[labels[0]] += int(value)
    return totals


def on_page(client):
    """Return the numbers on the page, of which a live relay has none for dry runs."""
    html = client.get("/").text
    return {
        outcome: int(found[1].replace(",", "")) if (found := re.search(rf'id="{outcome}">([\d,]+)<', html)) else 0
        for outcome in REASONS
    }


def test_each_webhook_is_counted_once_and_nothing_else_is(client, segment):
    assert client.post(make_event("a")).status_code == 200
    assert client.post(make_event(metric=None)).status_code == 202
    assert client.post(b"[]").status_code == 202
    assert client.post(make_event(), headers={}).status_code == 422
    assert client.request("POST", "/webhook", b"x", CONTENT_LENGTH="9000000").status_code == 413
    segment.fault = "500"
    assert client.post(make_event()).status_code == 503
    for method, path in (("GET", "/"), ("GET", "/health"), ("GET", "/metrics"), ("GET", "/webhook"), ("POST", "/x")):
        client.request(method, path)
    expected = NONE | {"delivered": 1, "dead_lettered": 2, "retried": 1, "unauthorized": 1, "rejected": 1}
    assert on_page(client) == in_metrics(client) == expected
    assert samples_of(client)["relay_acknowledge_seconds_count",] == 6


def test_a_dry_run_is_counted_by_itself(always_fresh):
    client = InProcess(DRY_RUN="force")
    client.request("POST", "/sample", json.dumps(make_event()).encode(), {"Content-Type": "application/json"})
    client.post(make_event())
    client.post(make_event(metric=None))
    assert on_page(client) == in_metrics(client) == NONE | {"dry_run": 2, "dead_lettered": 1}


BODY = json.dumps(make_event("a")).encode()
CODES = {  # what comes, what Segment does -> outcome and reason
    "delivered": (BODY, None, None, "delivered", ""),
    "no name": (make_event(metric=None), None, None, "dead_lettered", "no_name"),
    "nobody": (make_event(data={}), None, None, "dead_lettered", "names_nobody"),
    "too large": (make_event(data={"customer_id": "x" * 40_000}), None, None, "dead_lettered", "too_large"),
    "too deep": (b'{"metric": "m", "data": ' + b"[" * 100_000, None, None, "dead_lettered", "too_deep"),
    "refused": (BODY, None, "400", "dead_lettered", "segment_rejects"),
    "refused for its size": (BODY, None, "413", "dead_lettered", "segment_rejects"),
    "unsigned": (BODY, {}, None, "unauthorized", "missing"),
    "another key's": (BODY, sign(BODY, key="another"), None, "unauthorized", "mismatch"),
    "old": (BODY, sign(BODY, "1585250199"), None, "unauthorized", "expired"),
    "no number": (BODY, sign(BODY, "soon"), None, "unauthorized", "bad_timestamp"),
    "not JSON": (b"hello", None, None, "dead_lettered", "not_json"),
    "not an object": (b"[]", None, None, "dead_lettered", "not_object"),
    "a body too large": (b"x" * (8 * 1024 * 1024 + 1), None, None, "rejected", "too_large"),
    "429": (BODY, None, "429", "retried", "rate_limited"),
    "500": (BODY, None, "500", "retried", "segment_500"),
    "599": (BODY, None, "599", "retried", "segment_599"),
    "401": (BODY, None, "401", "retried", "write_key"),
    "404": (BODY, None, "404", "retried", "segment_404"),
    "a reset": (BODY, None, "reset", "retried", "connection"),
    "HTML": (BODY, None, "html", "retried", "not_segment"),
    "a redirect": (BODY, None, "redirect", "retried", "redirect"),
    "no success": (BODY, None, "false", "retried", "not_success"),
    "no answer": (BODY, None, "hang", "retried", "timeout"),
}


@pytest.mark.parametrize(("body", "headers", "fault", "outcome", "code"), CODES.values(), ids=CODES.keys())
def test_every_outcome_has_a_short_reason(client, segment, monkeypatch, body, headers, fault, outcome, code):
    monkeypatch.setattr("app.DEADLINE", 0.3 if fault == "hang" else 3.5)
    segment.fault = fault
    client.post(body, headers)
    found = samples_of(client)
    assert found["relay_webhooks_total", outcome, code] == 1
    assert in_metrics(client) == NONE | {outcome: 1}
    assert (("relay_last_retry_timestamp_seconds", code) in found) == (outcome == "retried")


def test_a_wrong_key_has_a_reason_of_its_own(client, segment):
    segment.fault = "400"
    for number in range(7):
        client.post(make_event(number))
    found = samples_of(client)
    assert found["relay_webhooks_total", "dead_lettered", "segment_rejects"] == 5
    assert found["relay_webhooks_total", "retried", "every_event"] == 2


def test_labels_are_short_codes_and_prose_is_nowhere(client, segment):
    for fault in ("500", "reset", "html", "400", "401", "false", None):
        segment.fault = fault
        client.post(make_event())
    labels = {label for name, *labels in samples_of(client) for label in labels if "_bucket" not in name}
    assert {label for label in labels if not re.fullmatch(r"[a-z0-9_]*", label)} == {VERSION}


def test_a_reason_is_there_from_the_start_so_that_its_first_increase_is_seen(client):
    found = samples_of(client)
    reasons = {pair for pair in ALL if not re.fullmatch(r"segment_\d+", pair[1])}
    assert {("retried", "internal"), ("unauthorized", "mismatch"), ("dead_lettered", "segment_rejects")} < reasons
    assert {key[1:]: value for key, value in found.items() if key[0] == "relay_webhooks_total"} == dict.fromkeys(
        reasons, 0
    )


def test_a_moment_is_absent_until_there_is_one(client, segment):
    """0.0 would make time() - x > 3600 fire at the start."""
    moments = {"relay_last_delivered_timestamp_seconds", "relay_last_retry_timestamp_seconds"}
    assert not moments & {name for name, *_ in samples_of(client)}
    client.post(make_event())
    found = samples_of(client)
    assert abs(found["relay_last_delivered_timestamp_seconds",] - time.time()) < 5
    segment.fault = "500"
    client.post(make_event())
    assert abs(samples_of(client)["relay_last_retry_timestamp_seconds", "segment_500"] - time.time()) < 5


AGES = {"just now": (0, "1.0"), "a minute": (40, "60.0"), "a day": (80_000, "86400.0"), "years": (10**8, "+Inf")}


@pytest.mark.parametrize(("age", "bucket"), AGES.values(), ids=AGES.keys())
def test_how_old_an_event_is_when_it_is_delivered(client, monkeypatch, age, bucket):
    monkeypatch.setattr("ops.monitor.observe.time", lambda: 1_700_000_000.5)
    client.post(make_event(timestamp=1_700_000_000.5 - age))
    buckets = {key[1]: value for key, value in samples_of(client).items() if key[0] == "relay_event_age_seconds_bucket"}
    assert [bound for bound, value in buckets.items() if value] == list(buckets)[list(buckets).index(bucket) :]
    assert samples_of(client)["relay_event_age_seconds_sum",] == age


def test_the_age_of_an_event_from_the_future_is_zero(client):
    client.post(make_event(timestamp=int(time.time()) + 1_000))
    assert samples_of(client)["relay_event_age_seconds_sum",] == 0


def test_what_is_not_delivered_or_has_no_time_has_no_age(client, segment):
    client.post(make_event(timestamp="soon"))
    client.post(make_event(metric=None))
    segment.fault = "500"
    client.post(make_event())
    assert samples_of(client)["relay_event_age_seconds_count",] == 0


KINDS = {
    "today's form": ({"object_type": "email", "metric": "opened"}, ("email", "opened")),
    "the legacy form": ({"event_type": "email_delivered"}, ("email", "delivered")),
    "both": ({"event_type": "sms_sent", "object_type": "email", "metric": "opened"}, ("sms", "sent")),
    "two words in a channel": ({"event_type": "in_app_clicked"}, ("in_app", "clicked")),
    "of a person": ({"event_type": "customer_subscribed"}, ("customer", "subscribed")),
    "without a channel": (
        {"metric": "cio_subscription_preferences_changed", "object_type_type": "customer"},
        ("customer", "cio_subscription_preferences_changed"),
    ),
    "an unknown metric": ({"object_type": "email", "metric": "snoozed"}, ("other", "other")),
    "an unknown channel": ({"object_type": "line", "metric": "opened"}, ("other", "other")),
    "an unknown legacy name": ({"event_type": "email_eaten"}, ("other", "other")),
    "no name": ({}, ("other", "other")),
    "a blank legacy name": ({"event_type": " ", "object_type": "email", "metric": "opened"}, ("email", "opened")),
    "a legacy name that isn't a string": ({"event_type": 5, "object_type": "sms", "metric": "sent"}, ("sms", "sent")),
    "a name that isn't a string": ({"event_type": ["email"]}, ("other", "other")),
    "a channel that isn't a string": ({"object_type": {}, "metric": 5}, ("other", "other")),
    "in capitals": ({"object_type": "In App", "metric": " Clicked"}, ("in_app", "clicked")),
    "a channel within a metric": ({"metric": "email_opened"}, ("other", "other")),
    "a name made to be a label": ({"object_type": 'x"} 1', "metric": "\n"}, ("other", "other")),
}


@pytest.mark.parametrize(("event", "expected"), KINDS.values(), ids=KINDS.keys())
def test_kind(event, expected):
    assert documented_kind(event) == expected


@pytest.mark.parametrize("name", samples.EVENTS)
def test_every_documented_event_is_of_its_own_kind(name):
    assert (
        documented_kind(samples.sample(name, "1", 1)) == documented_kind({"event_type": name}) == samples.EVENTS[name]
    )


def test_events_are_counted_once_they_will_not_come_again(client, segment):
    client.post(make_event("a"))
    client.post(make_event("b", metric="clicked"))
    client.post(make_event("c", metric=None))
    client.post(b"[]")
    client.post(make_event("d"), headers={})
    segment.fault = "500"
    client.post(make_event("d"))
    found = {
        (sample.labels["object_type"], sample.labels["metric"]): sample.value
        for sample in all_samples(client)
        if sample.name == "relay_events_total" and sample.value
    }
    assert found == {("email", "opened"): 1, ("email", "clicked"): 1, ("other", "other"): 2}


def test_uploads_are_measured_the_failed_ones_too(client, segment):
    segment.latency = 0.06
    segment.faults.append("500")
    assert client.post(make_event("a")).status_code == 200
    found = samples_of(client)
    assert found["relay_upload_seconds_count",] == found["relay_upload_events_count",] == 2
    assert found["relay_upload_seconds_bucket", "0.05"] == 0
    assert found["relay_upload_seconds_bucket", "3.5"] == 2
    assert found["relay_upload_events_sum",] == 2
    assert found["relay_uploads_in_progress",] == 0


def test_how_many_events_an_upload_carries():
    metrics = Metrics(Shared(), CONFIG)
    upload = metrics.count_uploads(lambda messages, seconds: None)
    for number in (1, 1, 2, 30, 100):
        upload([None] * number, 3)
    found = samples_of(metrics)
    expected = {"1.0": 2, "2.0": 3, "5.0": 3, "10.0": 3, "25.0": 3, "50.0": 4, "100.0": 5, "+Inf": 5}
    assert {key[1]: value for key, value in found.items() if key[0] == "relay_upload_events_bucket"} == expected


def test_uploads_in_progress():
    metrics = Metrics(Shared(), CONFIG)

    def fails(messages, seconds):
        seen.append(samples_of(metrics)["relay_uploads_in_progress",])
        raise KeyError("whatever ends it")

    seen = []
    with pytest.raises(KeyError):
        metrics.count_uploads(fails)([], 3)
    assert (seen, samples_of(metrics)["relay_uploads_in_progress",]) == ([1], 0)


def test_uploads_of_a_killed_worker_are_over_when_the_next_one_takes_its_place():
    def killed(messages, seconds):
        seen.append(samples_of(Metrics(memory, CONFIG))["relay_uploads_in_progress",])

    memory, seen = Shared(), []
    Metrics(memory, CONFIG).count_uploads(killed)([], 3)
    assert seen == [0]


INFOS = {
    "the US": ({"SEGMENT_HOST": "https://api.segment.io"}, "false", "us"),
    "the US, a dry run": ({"DRY_RUN": "force"}, "true", "us"),
    "the EU": ({"SEGMENT_HOST": "https://events.eu1.segmentapis.com"}, "false", "eu"),
    "elsewhere": ({"SEGMENT_HOST": "https://rudder.example"}, "false", "other"),
}


@pytest.mark.parametrize(("settings", "dry_run", "region"), INFOS.values(), ids=INFOS.keys())
def test_what_runs_here(settings, dry_run, region):
    text = InProcess(**settings).get("/metrics").text
    (line,) = [line for line in text.splitlines() if line.startswith("relay_info{")]
    assert set(re.findall(r'(\w+)="([^"]*)"', line)) == {("version", VERSION), ("dry_run", dry_run), ("region", region)}
    assert line.endswith("} 1.0")


@pytest.mark.skipif(not shutil.which("promtool"), reason="no promtool here")
@pytest.mark.parametrize("used", [False, True], ids=["new", "used"])
def test_promtool_has_nothing_to_say(client, segment, used):
    for fault in (None, "500", "400", "html") if used else ():
        segment.fault = fault
        client.post(make_event())
        client.post(b"[]")
    done = subprocess.run(
        ["promtool", "check", "metrics"], input=client.get("/metrics").text, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_counts_are_of_all_workers_whichever_answers(start, segment):
    relay = start(segment, WEB_CONCURRENCY="3")
    assert {answer.status_code for answer in relay.post_all([make_event(n) for n in range(30)])} == {200}
    relay.post(make_event(metric=None))
    relay.post(make_event(), headers={})
    relay.post(b"x" * (8 * 1024 * 1024 + 1))
    segment.fault = "500"
    relay.post(make_event())
    expected = NONE | {"delivered": 30, "dead_lettered": 1, "retried": 1, "unauthorized": 1, "rejected": 1}
    for _ in range(8):
        assert on_page(relay) == expected
        assert in_metrics(relay) == expected
    answer = relay.get("/metrics")
    assert "relay_acknowledge_seconds_count 34.0" in answer.text
    assert answer.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
    page = relay.get("/").text
    assert "Segment answered 500" in page
    assert "30 in all" in page


def test_counts_survive_killed_workers(start, segment):
    relay = start(segment)
    for number in range(2):
        assert relay.post(make_event(number)).status_code == 200
        workers = relay.workers()
        assert len(workers) == 2
        for pid in workers:
            os.kill(pid, signal.SIGKILL)
        until(lambda: len(set(relay.workers()) - set(workers)) == 2)  # noqa: B023 - waited for here
        until(lambda: relay.get("/health").status_code == 200)
    assert on_page(relay)["delivered"] == in_metrics(relay)["delivered"] == 2


@pytest.fixture
def gunicorn(monkeypatch):
    """gunicorn's arbiter, as far as gunicorn.conf.py sees it: start() and end() workers."""
    monkeypatch.setenv("DRY_RUN", "1")
    fresh = Shared()
    monkeypatch.setattr(shared, "of_service", lambda: fresh)
    hooks = runpy.run_path(str(ROOT / "gunicorn.conf.py"))
    server = SimpleNamespace(WORKERS={}, started=0)

    def start():
        worker = SimpleNamespace(pid=server.started)
        hooks["pre_fork"](server, worker)
        worker.row_of_memory = fresh.counts.row  # as the fork inherits it
        server.WORKERS[worker.pid] = worker
        server.started += 1
        return worker

    return SimpleNamespace(
        server=server,
        start=start,
        end=lambda worker: server.WORKERS.pop(worker.pid),
        shared=fresh,
    )


def test_three_hundred_replaced_workers_lose_no_count_and_do_not_grow_the_metrics(gunicorn):
    metrics = Metrics(gunicorn.shared, CONFIG)
    workers = [gunicorn.start() for _ in range(2)]
    sizes = []
    for _ in range(300):
        gunicorn.shared.counts.row = workers[0].row_of_memory
        metrics.count_answer("delivered", "", 0.02)
        sizes.append((len(gunicorn.shared.counts.column(0)), len(metrics.text().splitlines())))
        gunicorn.end(workers.pop(0))
        workers.append(gunicorn.start())
    assert metrics.outcomes()["delivered"] == 300
    assert sum(metrics.per_minute()["delivered"]) == 300
    assert in_metrics(metrics)["delivered"] == 300
    assert set(sizes) == {(2, sizes[0][1])} | {sizes[0]}


def test_no_two_live_workers_have_the_same_row(gunicorn):
    workers = [gunicorn.start() for _ in range(64)]
    gunicorn.end(workers.pop(10))
    gunicorn.end(workers.pop(20))
    workers += [gunicorn.start() for _ in range(64)]
    assert len({worker.row for worker in workers}) == len(workers) == 126
    assert max(worker.row for worker in workers) < ROWS


def test_a_total_is_the_sum_over_the_rows():
    counts = Counts()
    for row, number in ((0, 1), (1, 10), (5, 100), (1, 1000)):
        counts.use_row(row)
        counts.row[3] += number
    assert list(counts.column(3)) == [1, 1010, 0, 0, 0, 100]
    assert sum(counts.column(4)) == 0


ALL = [(outcome, code) for outcome, codes in REASONS.items() for code in codes]


def test_the_last_row_and_the_last_column_are_within_the_memory():
    memory = Shared()
    memory.counts.use_row(ROWS - 1)
    metrics = Metrics(memory, CONFIG)
    for outcome, code in ALL:
        metrics.count_answer(outcome, code, 99)
    metrics.count_uploads(lambda *_: None)([None] * 101, 3)
    metrics.note_age(10**9)
    metrics.count_event({})
    assert metrics.outcomes() == {outcome: len(codes) for outcome, codes in REASONS.items()}
    assert len(metrics.failures(REASONS)) == len(ALL)
    assert metrics.per_minute()["age"][-1] == 10**9


def test_the_chart_has_the_last_sixty_minutes(monkeypatch):
    now = 1_700_000_000.0
    monkeypatch.setattr("ops.monitor.metrics.time.time", lambda: now)
    memory = Shared()
    metrics = Metrics(memory, CONFIG)
    for minute in range(200):
        memory.counts.use_row(minute % 2)
        for _ in range(minute):
            metrics.count_answer("delivered", "", 0.02)
        metrics.count_answer("retried", "timeout", 0.02)
        metrics.note_age(7)
        now += 60
    now -= 60
    assert metrics.per_minute() == {name: [0] * MINUTES for name in REASONS} | {
        "delivered": list(range(140, 200)),
        "retried": [1] * MINUTES,
        "age": [7] * MINUTES,
    }
    now += 60 * 10
    assert metrics.per_minute()["delivered"] == [*range(150, 200), *[0] * 10]
    now += 60 * MINUTES
    assert metrics.per_minute()["delivered"] == [0] * MINUTES


def test_the_first_genuine_webhook_is_the_first_of_all_workers(monkeypatch):
    memory = Shared()
    metrics = Metrics(memory, CONFIG)
    assert metrics.first_genuine() == 0
    for row, now in ((3, 200.0), (1, 100.0), (3, 300.0), (1, 400.0)):
        monkeypatch.setattr("ops.monitor.metrics.time.time", lambda now=now: now)
        memory.counts.use_row(row)
        metrics.note_genuine()
    assert metrics.first_genuine() == 100


@pytest.mark.parametrize("outcome", [outcome for outcome, codes in REASONS.items() if "other" in codes])
def test_an_unknown_reason_is_counted_as_another(outcome):
    metrics = Metrics(Shared(), CONFIG)
    metrics.count_answer(outcome, "of_tomorrow", 0.1)
    assert [failure.words for failure in metrics.failures([outcome])] == ["for another reason"]
    assert samples_of(metrics)["relay_webhooks_total", outcome, "other"] == 1


def test_apps_in_one_process_share_only_what_they_are_given(segment):
    memory = Shared()
    one, other, stranger = InProcess(segment, memory), InProcess(segment, memory), InProcess(segment)
    assert one.post(make_event("a")).status_code == 200
    assert in_metrics(one)["delivered"] == in_metrics(other)["delivered"] == 1
    assert in_metrics(stranger)["delivered"] == 0
    segment.faults.append("429:5")
    assert one.post(make_event("b")).status_code == 503
    assert other.post(make_event("b")).status_code == 503
    assert stranger.post(make_event("b")).status_code == 200
