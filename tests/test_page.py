"""The page and /metrics: right numbers over all workers, and nothing personal, whoever looks."""

import re

import pytest
import requests
from conftest import SIGNING_KEY, WRITE_KEY, make_event

import samples
from translate import translate

OUTCOMES = ("delivered", "dead-lettered", "retried", "unauthorized", "rejected")


def on_page(relay):
    html = requests.get(relay.url + "/", timeout=5).text
    return {outcome: int(re.search(rf'id="{outcome}">([\d,]+)<', html)[1].replace(",", "")) for outcome in OUTCOMES}


def in_metrics(relay):
    text = requests.get(relay.url + "/metrics", timeout=5).text
    return {
        outcome: int(float(re.search(rf'relay_webhooks_total{{outcome="{outcome}"}} (\S+)', text)[1]))
        for outcome in OUTCOMES
    }


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
    text = requests.get(relay.url + "/metrics", timeout=5).text
    assert "relay_acknowledge_seconds_count 34.0" in text
    kind = requests.get(relay.url + "/metrics", timeout=5).headers["Content-Type"]
    assert kind == "text/plain; version=0.0.4; charset=utf-8"
    page = requests.get(relay.url + "/", timeout=5).text
    assert "Segment answered 500" in page
    assert "30 in all" in page


def test_counts_survive_a_killed_worker(start, segment):
    import os
    import signal

    from conftest import until

    relay = start(segment)
    relay.post(make_event())
    for pid in relay.workers():
        os.kill(pid, signal.SIGKILL)
    until(lambda: relay.post(make_event(2)).status_code == 200 if relay.workers() else False)
    assert on_page(relay)["delivered"] == 2


def test_nothing_personal_on_the_page_of_a_live_relay(start, segment):
    relay = start(segment)
    relay.post(make_event("secret-id", data={"customer_id": "secret-person", "subject": "secret"}))
    segment.fault = "500"
    relay.post(make_event("secret-id-2"))
    for path in ("/", "/metrics", "/health"):
        text = requests.get(relay.url + path, timeout=5).text
        for secret in ("secret", "person", SIGNING_KEY, WRITE_KEY):
            assert secret not in text
    assert requests.post(relay.url + "/sample", timeout=5).status_code == 404


def test_the_page_loads_nothing_and_lets_nothing_in(relay):
    answer = requests.get(relay.url + "/", timeout=5)
    policy = answer.headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'")
    assert "unsafe" not in policy
    assert not re.search(r'(src|href)="(?!/metrics)', answer.text)
    assert answer.headers["Cache-Control"] == "no-store"


ADDRESSES = {
    "directly": ({"Host": "relay.example:8080"}, "http://relay.example:8080/webhook"),
    "behind Heroku's router": (
        {"Host": "x.herokuapp.com", "X-Forwarded-Proto": "https"},
        "https://x.herokuapp.com/webhook",
    ),
    "behind two": ({"Host": "relay.example", "X-Forwarded-Proto": "https, http"}, "https://relay.example/webhook"),
}


@pytest.mark.parametrize(("headers", "address"), ADDRESSES.values(), ids=ADDRESSES.keys())
def test_the_address_to_paste(relay, headers, address):
    assert f'<code id="address">{address}</code>' in requests.get(relay.url + "/", headers=headers, timeout=5).text


def test_text_from_outside_is_only_text(relay):
    headers = {"Host": "x.example", "X-Forwarded-Proto": "javascript"}
    assert ">https://x.example/webhook<" in requests.get(relay.url + "/", headers=headers, timeout=5).text


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "another host, 127.0.0.1"),
        ({"SEGMENT_HOST": "https://api.segment.io"}, "Segment, in the US"),
        ({"SEGMENT_HOST": "https://events.eu1.segmentapis.com"}, "Segment, in the EU"),
        ({"DRY_RUN": "1"}, "this is a dry run"),
        ({"CUSTOMERIO_SIGNING_KEY": None, "ALLOW_UNSIGNED": "1"}, "takes? events|can send events to Segment"),
        ({"SEGMENT_WRITE_KEY": "short"}, "does not look like a write key"),
    ],
    ids=str,
)
def test_what_it_says_of_the_settings(start, segment, settings, words):
    relay = start(segment, **settings)
    assert re.search(words, requests.get(relay.url + "/", timeout=5).text)


def test_a_dry_run_shows_webhooks_beside_their_calls(start):
    relay = start(DRY_RUN="1")
    assert requests.post(relay.url + "/sample", timeout=5).status_code == 200  # redirected to the page
    relay.post(make_event("<b>bold</b>"))
    relay.post(make_event(metric=None))
    page = requests.get(relay.url + "/", timeout=5).text
    assert page.count("<details") == 3
    assert "customerio:email_delivered" in page
    assert "a dead letter: it has no name" in page
    assert "<b>bold" not in page
    assert on_page(relay)["delivered"] == 2


@pytest.mark.parametrize("name", samples.EVENTS)
def test_every_sample_becomes_a_call(name):
    from datetime import UTC, datetime

    call = translate(samples.sample(name, "1", 1_700_000_000), received=datetime.now(UTC))
    assert call["event"] == f"customerio:{name}"
    assert call["user_id"] == "0200102"


def test_there_is_a_sample_of_every_documented_event():
    assert len(samples.EVENTS) == 69
