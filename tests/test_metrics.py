"""The counts: of all workers, whichever answers, and of those that are gone."""

import os
import re
import runpy
import signal
from types import SimpleNamespace

import pytest
from conftest import ROOT, InProcess, make_event, until

import shared
from ops.metrics import MINUTES, OUTCOMES, REASONS, Metrics
from shared import ROWS, Counts, Shared


def on_page(client):
    html = client.get("/").text
    return {outcome: int(re.search(rf'id="{outcome}">([\d,]+)<', html)[1].replace(",", "")) for outcome in OUTCOMES}


def in_metrics(client):
    text = client.get("/metrics").text
    return {
        outcome: int(float(re.search(rf'relay_webhooks_total{{outcome="{outcome}"}} (\S+)', text)[1]))
        for outcome in OUTCOMES
    }


def test_each_webhook_is_counted_once_and_nothing_else_is(client, segment):
    assert client.post(make_event("a")).status_code == 200
    assert client.post(make_event(metric=None)).status_code == 202
    assert client.post(b"[]").status_code == 400
    assert client.post(make_event(), headers={}).status_code == 401
    assert client.request("POST", "/webhook", b"x", CONTENT_LENGTH="9000000").status_code == 413
    segment.fault = "500"
    assert client.post(make_event()).status_code == 503
    for method, path in (("GET", "/"), ("GET", "/health"), ("GET", "/metrics"), ("GET", "/webhook"), ("POST", "/x")):
        client.request(method, path)
    expected = {"delivered": 1, "dead-lettered": 1, "retried": 1, "unauthorized": 1, "rejected": 2}
    assert on_page(client) == in_metrics(client) == expected
    assert "relay_acknowledge_seconds_count 6.0" in client.get("/metrics").text


def test_a_sample_is_counted_once():
    client = InProcess(DRY_RUN="1")
    assert client.request("POST", "/sample").status_code == 303
    assert in_metrics(client)["delivered"] == 1


def test_counts_are_of_all_workers_whichever_answers(start, segment):
    relay = start(segment, WEB_CONCURRENCY="3")
    assert {answer.status_code for answer in relay.post_all([make_event(n) for n in range(30)])} == {200}
    relay.post(make_event(metric=None))
    relay.post(make_event(), headers={})
    relay.post(b"[]")
    segment.fault = "500"
    relay.post(make_event())
    expected = {"delivered": 30, "dead-lettered": 1, "retried": 1, "unauthorized": 1, "rejected": 1}
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
        server.WORKERS[worker.pid] = worker
        server.started += 1
        return worker

    return SimpleNamespace(
        server=server,
        start=start,
        end=lambda worker: server.WORKERS.pop(worker.pid),
        post_fork=lambda worker: hooks["post_fork"](server, worker),
        shared=fresh,
    )


def test_three_hundred_replaced_workers_lose_no_count_and_do_not_grow_the_metrics(gunicorn):
    metrics = Metrics(gunicorn.shared)
    workers = [gunicorn.start() for _ in range(2)]
    sizes = []
    for _ in range(300):
        gunicorn.post_fork(workers[0])
        metrics.answered("delivered", "", 0.02)
        sizes.append((len(gunicorn.shared.counts.column(0)), len(metrics.text().splitlines())))
        gunicorn.end(workers.pop(0))
        workers.append(gunicorn.start())
    assert metrics.outcomes()["delivered"] == 300
    assert sum(metrics.per_minute()) == 300
    assert 'relay_webhooks_total{outcome="delivered"} 300.0' in metrics.text().decode()
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


def test_the_last_row_and_the_last_column_are_within_the_memory():
    metrics = Metrics(memory := Shared())
    memory.counts.use_row(ROWS - 1)
    for reason in REASONS:
        metrics.answered("retry", reason, 99)
    assert metrics.outcomes()["retried"] == len(REASONS)
    assert len(metrics.failures()) == len(REASONS)


def test_the_chart_has_the_last_sixty_minutes(monkeypatch):
    now = 1_700_000_000.0
    monkeypatch.setattr("ops.metrics.time.time", lambda: now)
    memory = Shared()
    metrics = Metrics(memory)
    for minute in range(200):
        memory.counts.use_row(minute % 2)
        for _ in range(minute):
            metrics.answered("delivered", "", 0.02)
        now += 60
    now -= 60
    assert metrics.per_minute() == list(range(140, 200))
    now += 60 * 10
    assert metrics.per_minute() == [*range(150, 200), *[0] * 10]
    now += 60 * MINUTES
    assert metrics.per_minute() == [0] * MINUTES


def test_an_unknown_reason_is_counted_as_another():
    metrics = Metrics(Shared())
    metrics.answered("retry", "of tomorrow", 0.1)
    assert [reason for reason, _ in metrics.failures()] == ["for another reason"]


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
