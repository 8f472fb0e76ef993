"""The page: right numbers, the right address, and nothing personal, whoever looks."""

import re
from datetime import UTC, datetime

import pytest
from conftest import SIGNING_KEY, WRITE_KEY, InProcess, make_event

from ops import samples
from translate import translate


def test_nothing_personal_on_the_page_of_a_live_relay(anywhere, segment):
    anywhere.post(make_event("secret-id", data={"customer_id": "secret-person", "subject": "secret"}))
    segment.fault = "500"
    assert anywhere.post(make_event("secret-id-2")).status_code == 503
    for path in ("/", "/metrics", "/health"):
        answer = anywhere.get(path)
        assert answer.status_code == 200
        for secret in ("secret", "person", SIGNING_KEY, WRITE_KEY):
            assert secret not in answer.text
    assert anywhere.request("POST", "/sample").status_code == 404


def test_the_page_loads_nothing_and_lets_nothing_in(client):
    answer = client.get("/")
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
def test_the_address_to_paste(anywhere, headers, address):
    assert f'<code id="address">{address}</code>' in anywhere.get("/", headers).text


def test_text_from_outside_is_only_text(anywhere):
    headers = {"Host": "x.example", "X-Forwarded-Proto": "javascript"}
    assert ">https://x.example/webhook<" in anywhere.get("/", headers).text


SETTINGS = {
    "usual": ({}, "another host, 127.0.0.1"),
    "the US": ({"SEGMENT_HOST": "https://api.segment.io"}, "Segment, in the US"),
    "the EU": ({"SEGMENT_HOST": "https://events.eu1.segmentapis.com"}, "Segment, in the EU"),
    "a dry run": ({"DRY_RUN": "1"}, "this is a dry run"),
    "unsigned": ({"CUSTOMERIO_SIGNING_KEY": None, "ALLOW_UNSIGNED": "1"}, "takes? events|can send events to Segment"),
    "a wrong key": ({"SEGMENT_WRITE_KEY": "short"}, "does not look like a write key"),
}


@pytest.mark.parametrize(("settings", "words"), SETTINGS.values(), ids=SETTINGS.keys())
def test_what_it_says_of_the_settings(segment, settings, words):
    assert re.search(words, InProcess(segment, **settings).get("/").text)


def test_a_dry_run_shows_webhooks_beside_their_calls(start):
    relay = start(DRY_RUN="1")
    sent = relay.request("POST", "/sample")
    assert (sent.status_code, sent.headers["Location"]) == (303, "/")
    relay.post(make_event("<b>bold</b>"))
    relay.post(make_event(metric=None))
    page = relay.get("/").text
    assert page.count("<details") == 3
    assert "customerio:email_delivered" in page
    assert "a dead letter: it has no name" in page
    assert "<b>bold" not in page
    assert 'id="delivered">2<' in page


@pytest.mark.parametrize("name", samples.EVENTS)
def test_every_sample_becomes_a_call(name):
    call = translate(samples.sample(name, "1", 1_700_000_000), received=datetime.now(UTC))
    assert call["event"] == f"customerio:{name}"
    assert call["user_id"] == "0200102"


def test_there_is_a_sample_of_every_documented_event():
    assert len(samples.EVENTS) == 69
