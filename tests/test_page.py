"""The page: right numbers, the right address, what is wrong now, and nothing personal in a live relay."""

import json
import re
import socket
import subprocess
import time
from datetime import UTC, datetime
from types import SimpleNamespace

import pytest
from conftest import ROOT, SIGNING_KEY, WRITE_KEY, InProcess, make_event, sign, until

from ops import samples
from ops.monitor import metrics
from ops.page import routes as page
from ops.page.inspector import Inspector
from relay.outcomes import REJECTED, RetryLater
from relay.webhook import Webhook
from server.shared import Shared
from translate import kind, translate

JSON = {"Content-Type": "application/json"}


@pytest.fixture
def live(always_fresh, segment):
    return InProcess(segment)


@pytest.fixture
def passing(monkeypatch):
    """passing(seconds) lets time pass for counts and page."""
    now = time.time()

    def later(seconds):
        nonlocal now
        now += seconds

    clock = SimpleNamespace(**vars(time) | {"time": lambda: now})
    monkeypatch.setattr(metrics, "time", clock)
    monkeypatch.setattr(page, "time", clock)
    return later


@pytest.fixture
def dry(always_fresh):
    """A dry run that checks signatures."""
    return InProcess(DRY_RUN="force", OMIT_PROPERTIES="headers,token")


def listed(relay, after=0):
    return relay.get(f"/webhooks?after={after}").json()["webhooks"]


def opened(relay):
    return relay.get(f"/webhooks/{listed(relay)[-1]['number']}").json()


def troubles(html):
    return re.findall(r'data-key="([^"]+)"', html)


def test_nothing_personal_on_the_page_of_a_live_relay(anywhere, segment):
    anywhere.post(make_event("secret-id", data={"customer_id": "secret-person", "subject": "secret"}))
    segment.fault = "500"
    assert anywhere.post(make_event("secret-id-2")).status_code == 503
    for path in ("/", "/metrics", "/health"):
        answer = anywhere.get(path)
        assert answer.status_code == 200
        for secret in ("secret", "person", SIGNING_KEY, WRITE_KEY):
            assert secret not in answer.text
    for path in ("/webhooks", "/webhooks?after=0", "/webhooks/1", "/webhooks/1/curl", "/samples/email_opened"):
        assert anywhere.get(path).status_code == 404
    assert anywhere.request("POST", "/sample", b"{}", JSON).status_code == 404


def test_a_live_relay_remembers_no_webhook(client):
    client.post(make_event("nowhere-to-be-found"))
    import gc

    from ops.page.inspector import Seen

    assert not any(isinstance(thing, Seen) and b"nowhere-to-be-found" in thing.body for thing in gc.get_objects())


@pytest.mark.parametrize("path", ["/", "/static/page.js", "/static/page.css", "/webhooks", "/webhooks/1", "/metrics"])
def test_the_page_loads_nothing_and_lets_nothing_in(dry, path):
    headers = dry.get(path).headers
    assert headers["Content-Security-Policy"] == (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
        "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    )
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Cache-Control"] == "no-store"


def test_script_and_style_are_ours_small_and_not_inline(dry):
    html = dry.get("/").text
    assert set(re.findall(r'(?:src|href)="(?!data:)([^"]+)"', html)) == {
        "/static/page.js", "/static/page.css", "/metrics"
    }  # fmt: skip
    assert not re.search(r"<style|style=|<script[^>]*>[^<]| on[a-z]+=", html)
    assert sum(path.stat().st_size for path in (ROOT / "ops/page/static").iterdir()) < 25_000
    assert dry.get("/static/..%2fpage.py").status_code == 404


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


def clock(monotonic):
    """Return the module time with another monotonic(), for one module."""
    return SimpleNamespace(**vars(time) | {"monotonic": monotonic})


# What is expensive, and how often a second it may be called.
RENDERED = {
    "/": (page, "render_template", 2),  # for addresses that can be reached, and for others
    "/metrics": (metrics, "generate_latest", 1),
}


@pytest.mark.parametrize("path", RENDERED)
def test_the_page_and_the_metrics_are_rendered_at_most_once_a_second(client, monkeypatch, path):
    module, name, times = RENDERED[path]
    render, calls, now = getattr(module, name), [], 100.0
    monkeypatch.setattr(module, name, lambda *args, **values: calls.append(1) or render(*args, **values))
    monkeypatch.setattr(page, "time", clock(lambda: now))
    for number in range(100):
        assert client.get(path, {"Host": f"{number}.example" if number % 2 else "localhost"}).status_code == 200
        now += 0.009
    assert len(calls) == times
    now += 0.2
    client.get(path)
    assert len(calls) == 2 * times


def test_each_reader_of_one_rendering_sees_the_address_that_they_asked_for(client, monkeypatch):
    monkeypatch.setattr(page, "time", clock(lambda: 100.0))
    for number in range(5):
        assert f">http://{number}.example/webhook<" in client.get("/", {"Host": f"{number}.example"}).text


def test_a_page_that_has_not_changed_is_not_sent_again(client):
    first = client.get("/")
    again = client.get("/", {"If-None-Match": first.headers["ETag"]})
    assert (again.status_code, again.text) == (304, "")


SETTINGS = {
    "a dry run": ({"DRY_RUN": "force"}, 'id="dry-run".*This is a dry run'),
    "a dry run is open": ({"DRY_RUN": "force"}, "The page shows webhooks to whoever opens it"),
    "a dry run that checks signatures": ({"DRY_RUN": "force"}, "<dt>Signatures</dt><dd>checked"),
    "a dry run with a wrong key": ({"DRY_RUN": "force", "SEGMENT_WRITE_KEY": "shorter"}, "not look like a write key"),
}


@pytest.mark.parametrize(("settings", "words"), SETTINGS.values(), ids=SETTINGS.keys())
def test_what_a_dry_run_says_of_the_settings(segment, settings, words):
    assert re.search(words, InProcess(segment, **settings).get("/").text)


TOLD_TO_NOBODY = {
    "unsigned": {"CUSTOMERIO_SIGNING_KEY": None, "ALLOW_UNSIGNED": "1"},
    "unsigned no more": {"ALLOW_UNSIGNED": "1"},
    "a wrong key": {"SEGMENT_WRITE_KEY": "shorter"},
    "the EU": {"SEGMENT_HOST": "https://events.eu1.segmentapis.com"},
}


@pytest.mark.parametrize("settings", TOLD_TO_NOBODY.values(), ids=TOLD_TO_NOBODY.keys())
def test_a_live_page_tells_strangers_no_settings(segment, settings):
    def shown(**settings):
        html = InProcess(segment, **settings).get("/").text
        return re.sub(r"20\d\d-\d\d-\d\d \d\d:\d\d UTC", "", html)

    told = shown(**settings)
    for words in ("unsigned", "signature", "ignatures", "eu1", "look like", "Events go to"):
        assert words not in told
    if settings.get("CUSTOMERIO_SIGNING_KEY", "") is not None:
        assert told == shown()


def test_a_live_page_does_not_speak_of_a_dry_run(client):
    assert "dry run" not in re.sub(r'<li class="dry_run" hidden>.*', "", client.get("/").text)


# --- What is wrong now ---

# What Segment answers -> the trouble, and a part of the remedy.
TROUBLES = {
    "a wrong key": ("401", "retried-write_key", "set SEGMENT_WRITE_KEY and restart"),
    "an outage": ("500", "retried-segment_500", "status.segment.com"),
    "a proxy": ("html", "retried-not_segment", "SEGMENT_HOST"),
    "a captive portal": ("html:403", "retried-not_segment", "SEGMENT_HOST"),
    "another service": ("404", "retried-segment_404", "Set SEGMENT_HOST"),
    "another service, without POST": ("405", "retried-segment_405", "Set SEGMENT_HOST"),
    "a limit": ("429", "retried-rate_limited", "Customer.io sends them again"),
}


@pytest.mark.parametrize(("fault", "key", "remedy"), TROUBLES.values(), ids=TROUBLES.keys())
def test_a_failure_is_a_trouble_until_it_is_followed_by_success(live, segment, monkeypatch, fault, key, remedy):
    monkeypatch.setattr("server.shared.MAX_PAUSE", 0.1)
    segment.fault = fault
    assert live.post(make_event(1)).status_code == 503
    html = live.get("/").text
    assert troubles(html) == [key]
    assert remedy in html.partition("<aside")[0]
    segment.fault = None
    until(lambda: live.post(make_event(1)).status_code == 200)  # after the pause of a 429
    html = live.get("/").text
    assert troubles(html) == []
    assert re.search(r'id="over" class="over">\s*<li>Retried: ', html)


def test_events_that_are_all_refused_are_a_wrong_key(live, segment):
    segment.fault = "400"
    for number in range(6):
        live.post(make_event(number))
    html = live.get("/").text
    assert "retried-every_event" in troubles(html)
    assert not steps(html)["Write key"][0]
    assert "Copy the write key again" in html


STRANGERS = {  # what anybody can cause -> the trouble that it is where genuine webhooks are missing
    "a forged signature": (b"{}", sign(b"{}", key="another"), "unauthorized-mismatch"),
    "no signature": (b"{}", {}, "unauthorized-missing"),
    "an old one": (b"{}", sign(b"{}", "1585250199"), "unauthorized-expired"),
    "a body that is too large": (b"x" * (8 * 1024 * 1024 + 1), {}, "rejected-too_large"),
}


@pytest.mark.parametrize(("body", "headers", "trouble"), STRANGERS.values(), ids=STRANGERS.keys())
def test_what_strangers_cause_is_a_trouble_only_where_genuine_webhooks_are_missing(
    live, passing, body, headers, trouble
):
    live.post(body, headers)
    assert troubles(live.get("/").text) == [trouble]
    live.post(make_event())
    for seconds in (0, 100, 198):
        passing(seconds)
        live.post(body, headers)
        assert troubles(live.get("/").text) == []
    passing(2)
    assert troubles(live.get("/").text) == [trouble]  # five minutes without a genuine one
    passing(3_600)
    assert troubles(live.get("/").text) == []


def test_an_unauthorized_webhook_is_a_trouble_until_a_genuine_one_comes(live):
    body = json.dumps(make_event()).encode()
    assert live.post(body, sign(body, key="another")).status_code == 422
    html = live.get("/").text
    assert troubles(html) == ["unauthorized-mismatch"]
    assert "set CUSTOMERIO_SIGNING_KEY and restart" in html
    live.post(make_event())
    html = live.get("/").text
    assert troubles(html) == []
    assert "Unauthorized: no configured key made this signature" in html


def test_a_flood_of_dead_letters_is_a_trouble_and_one_is_not(live):
    live.post(make_event(metric=None))
    assert troubles(live.get("/").text) == []
    for _ in range(5):
        live.post(make_event(metric=None))
    html = live.get("/").text
    assert troubles(html) == ["dead_lettered"]
    assert "6 of the last 6 events became dead letters. The last one: it has no name." in html
    assert "python -m ops replay" in html


def test_the_delay_of_events_in_words(live):
    live.post(make_event(1, timestamp=int(time.time()) - 100))
    live.post(make_event(2, timestamp=int(time.time()) - 200))
    assert "Events arrive 2 minutes after they happen." in live.get("/").text


def test_every_outcome_has_its_colour_and_words_in_the_chart(live, segment):
    live.post(make_event(1))
    live.post(make_event(2))
    live.post(make_event(metric=None))
    live.post(make_event(), headers={})
    live.post(b"x" * (8 * 1024 * 1024 + 1))
    segment.fault = "500"
    live.post(make_event(3))
    html = live.get("/").text
    style = live.get("/static/page.css").text
    for outcome in ("delivered", "dead_lettered", "retried", "unauthorized", "rejected"):
        assert f'<rect class="{outcome}"' in html
        assert re.search(rf"\.{outcome} {{ --colour: var\(--{outcome}\)", style)
    assert (
        "Webhooks in each minute of the last hour. delivered: 2 in all, 2 at the most; "
        "dead-lettered: 1 in all, 1 at the most; retried: 1 in all"
    ) in html


# --- The way live ---


def steps(html):
    """Return whether each step is done, and its words."""
    found = re.findall(r'<li class="(done|next|todo)"><b>([^<]+)</b>.*?<p>(.*?)</p></li>', html)
    return {title: (state == "done", words) for state, title, words in found}


LOCAL, PUBLIC = {"Host": "localhost:8080"}, {"Host": "relay.example"}
ODD_HOSTS = ["", "[", "[::1", "]:", ":", "a..b", "1.2.3.4.5", "x" * 500]
PRIVATE_HOSTS = ["127.0.0.1", "10.1.2.3", "192.168.1.7:8080", "[::1]:8080", "box", "box.local", "relay.internal"]


def test_the_steps_of_a_first_dry_run():
    relay = InProcess(DRY_RUN="1", SEGMENT_WRITE_KEY=None, CUSTOMERIO_SIGNING_KEY=None, PORT="8123")
    found = steps(relay.get("/", LOCAL).text)
    assert [done for done, _ in found.values()] == [False] * 5
    assert "cloudflared tunnel --url http://localhost:8123" in found["Public address"][1]
    assert "CUSTOMERIO_SIGNING_KEY" in found["Signing key"][1]
    assert ".venv/bin/gunicorn &#34;app:create_app()&#34;" in found["Events in Segment"][1]
    # A stranger, too, can send a Host header: only a genuine webhook shows that Customer.io reaches the relay.
    done, words = steps(relay.get("/", PUBLIC).text)["Public address"]
    assert (done, "Give it to Customer.io" in words) == (False, True)


def test_the_steps_are_those_of_the_readme():
    relay = InProcess(DRY_RUN="1", SEGMENT_WRITE_KEY=None, CUSTOMERIO_SIGNING_KEY=None)
    titles = re.findall(r"^\d\. \*\*(.+?)\.\*\*", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert list(steps(relay.get("/").text)) == titles


@pytest.mark.parametrize("host", PRIVATE_HOSTS)
def test_customerio_reaches_no_private_address(dry, host):
    assert not steps(dry.get("/", {"Host": host}).text)["Public address"][0]


@pytest.mark.parametrize("host", ODD_HOSTS)
def test_any_host_gets_the_page(dry, host):
    assert dry.get("/", {"Host": host}).status_code == 200


GENUINE = "First genuine webhook"
ARRIVED = r"It arrived just now, at 20\d\d-\d\d-\d\d \d\d:\d\d UTC\."


def test_the_first_genuine_webhook_and_not_a_sample_nor_a_stranger(dry):
    dry.request("POST", "/sample", json.dumps(make_event(1)).encode(), JSON)
    dry.post(make_event(2), headers={})
    assert steps(dry.get("/").text)[GENUINE] == (False, "Press Send test in Customer.io.")
    dry.post(make_event(3))
    done, words = steps(dry.get("/").text)[GENUINE]
    assert (done, bool(re.fullmatch(ARRIVED, words))) == (True, True), words


# What a live relay gets first, whatever Segment answers -> whether it is a genuine webhook.
FIRST = {
    "an event that Segment doesn't take now": (make_event(), "500", True),
    "an event that is a dead letter": (make_event(metric=None), None, True),
    "an event that is nested too deeply": (b'{"a":' * 20_000 + b"1" + b"}" * 20_000, None, True),
    "no object": (b"[]", None, True),
    "no signature": (b"[]", None, False),
}


@pytest.mark.parametrize(("event", "fault", "genuine"), FIRST.values(), ids=FIRST.keys())
def test_a_live_relay_too_says_when_the_first_genuine_webhook_came(live, segment, event, fault, genuine):
    segment.fault = fault
    live.post(event, headers=None if genuine else {})
    done, words = steps(live.get("/").text)[GENUINE]
    assert (done, bool(re.fullmatch(ARRIVED, words))) == (genuine, genuine), words


def test_without_a_signing_key_nobody_can_tell_a_genuine_webhook(segment):
    live = InProcess(segment, CUSTOMERIO_SIGNING_KEY=None, ALLOW_UNSIGNED="1")
    assert list(steps(live.get("/").text)) == ["Write key", "Events in Segment"]


def test_a_sample_of_the_command_ticks_no_step(live):
    """A step says that Customer.io's own webhooks come, and go on."""
    before = steps(live.get("/", PUBLIC).text)
    assert live.post(samples.sample("email_opened", "1", 1_700_000_000)).status_code == 200
    assert steps(live.get("/", PUBLIC).text) == before


def test_a_word_in_the_place_of_the_signing_key_leaves_its_step_open(segment):
    live = InProcess(segment, CUSTOMERIO_SIGNING_KEY="unknown-yet")
    live.post(make_event())
    html = live.get("/").text
    done, words = steps(html)["Signing key"]
    assert (done, "Set the key that it shows as CUSTOMERIO_SIGNING_KEY and restart." in words) == (False, True)
    assert steps(html)[GENUINE][0] is False
    assert "The relay has no signing key yet: set CUSTOMERIO_SIGNING_KEY." in html


def test_the_steps_fold_into_a_line_once_events_flow(live):
    assert not all(done for done, _ in steps(live.get("/", PUBLIC).text).values())
    live.post(make_event())
    html = live.get("/").text
    assert steps(html) == {}
    assert 'Live <span class="soft">all 5 steps done</span>' in html


# --- /delivering, for a monitor that knows nothing but a status ---


def forged(event):
    body = json.dumps(event).encode()
    return body, sign(body, key="another")


# What comes ("500" while Segment fails, "full" while the disk is), or the seconds that pass
# -> the reason, "" for a 200.
DOWN = "Segment answered 500"
FULL = "the dead letter could not be kept"
FORGED = "no configured key made this signature"
DELIVERING = {
    "nothing came": ("900", ""),
    "events are delivered": ("ok 900 ok", ""),
    "an outage begins": ("ok 500 299", ""),
    "an outage of five minutes": ("ok 500 301", DOWN),
    "an outage whose retries are far apart": ("ok 500 100 500 3000", DOWN),
    "an outage that began long after the last success": ("ok 9000 500 299", ""),
    "an outage that is over": ("500 300 ok", ""),
    "a second outage": ("500 400 ok 10 500 299", ""),
    "a second outage of five minutes": ("500 400 ok 10 500 301", DOWN),
    "dead letters while nothing is delivered": ("ok 500 100 dead 100 500 dead 101 dead", DOWN),
    "a dead letter that Segment refused": ("500 400 refused", ""),
    "dead letters that cannot be kept": ("ok full 200 full 101", FULL),
    "dead letters that can be kept again": ("full 200 full 101 dead", ""),
    "dead letters alone": ("ok dead 900 dead", ""),
    "one forged signature": ("ok forged 9000", ""),
    "forged ones among genuine ones": ("ok forged 200 ok forged 200 forged", ""),
    "a wrong signing key": ("ok forged 200 forged 101 forged", FORGED),
    "a signing key that is right again": ("forged 400 forged ok", ""),
    "a scanner": ("unsigned 200 unsigned 200 unsigned", ""),
}


def disk_is_full(*_):
    raise RetryLater("dead_letter")


@pytest.mark.parametrize(("story", "reason"), DELIVERING.values(), ids=DELIVERING.keys())
def test_delivering(live, segment, passing, monkeypatch, story, reason):
    for number, word in enumerate(story.split()):
        passing(0.001)
        segment.fault = {"500": "500", "refused": "400"}.get(word)
        match word:
            case "ok" | "500" | "refused":
                live.post(make_event(number))
            case "full":
                with monkeypatch.context() as patch:
                    patch.setattr("relay.dead_letters.DeadLetters.keep", disk_is_full)
                    live.post(make_event(number, metric=None))
            case "dead":
                live.post(make_event(number, metric=None))
            case "forged":
                live.post(*forged(make_event(number)))
            case "unsigned":
                live.post(make_event(number), headers={})
            case seconds:
                passing(int(seconds))
    answer = live.get("/delivering")
    expected = {"status": "not delivering", "reason": reason} if reason else {"status": "delivering"}
    assert (answer.status_code, answer.json()) == (503 if reason else 200, expected)


def test_a_dry_run_delivers_nothing():
    answer = InProcess(DRY_RUN="1", SEGMENT_WRITE_KEY=None).get("/delivering")
    assert (answer.status_code, answer.json()["reason"]) == (503, "DRY_RUN is on: nothing is sent to Segment")


def test_a_relay_that_is_not_set_up_delivers_nothing(segment):
    answer = InProcess(segment, CUSTOMERIO_SIGNING_KEY="unknown-yet").get("/delivering")
    assert (answer.status_code, answer.json()["reason"]) == (
        503,
        "the relay has no signing key yet: set CUSTOMERIO_SIGNING_KEY",
    )


def test_delivering_looks_at_most_once_a_second(client, monkeypatch):
    calls, now = [], 100.0
    look = page.advice.not_delivering
    monkeypatch.setattr(page.advice, "not_delivering", lambda *args: calls.append(1) or look(*args))
    monkeypatch.setattr(page, "time", clock(lambda: now))
    for _ in range(100):
        assert client.get("/delivering").status_code == 200
        now += 0.009
    assert len(calls) == 1


def test_one_worker_delivers_while_another_fails(segment, always_fresh, passing):
    shared = Shared()
    one = InProcess(segment, shared)
    segment.fault = "500"
    one.post(make_event(1))
    passing(300)
    assert one.get("/delivering").status_code == 503
    shared.counts.use_row(1)
    other = InProcess(segment, shared)
    segment.fault = None
    other.post(make_event(2))
    assert one.get("/delivering").status_code == 200


# --- The inspector ---


def test_every_outcome_is_listed(dry):
    dry.post(make_event(1))
    dry.post(make_event(2, metric=None))
    dry.post(make_event(3), headers={})
    dry.post(b"[]")
    rows = [(row["outcome"], row["event"], row["person"], row["reason"]) for row in listed(dry)]
    assert rows == [
        ("dry_run", "customerio:email_opened", "person-1", ""),
        ("dead_lettered", "", "person-2", "it has no name: neither event_type nor metric is a text"),
        ("unauthorized", "email_opened", "person-3", "the X-CIO-Timestamp and X-CIO-Signature headers are required"),
        ("dead_lettered", "", "", "the body is not a JSON object"),
    ]


def test_only_what_is_new_is_listed_and_the_last_hundred_are_kept(dry):
    for number in range(105):
        dry.post(make_event(number))
    rows = listed(dry)
    assert [row["person"] for row in rows] == [f"person-{number}" for number in range(5, 105)]
    assert [row["person"] for row in listed(dry, rows[-3]["number"])] == ["person-103", "person-104"]
    assert dry.get(f"/webhooks/{rows[0]['number'] - 1}").status_code == 404


CALL = ["event", "userId", "timestamp", "properties", "context", "integrations", "messageId"]


def test_a_call_is_in_the_order_in_which_people_read_it(dry):
    dry.post(make_event())
    call = json.loads(opened(dry)["call"]["text"])
    assert list(call)[:7] == CALL
    dry.post(make_event(data={"identifiers": {"email": "ada@example.com"}}))
    call = json.loads(opened(dry)["call"]["text"])
    assert list(call)[:7] == ["event", "anonymousId", *CALL[2:]]


# What changes in the event -> what the page says about it.
CHANGES = {
    "nothing": ({}, "Nothing was left out or changed."),
    "bulk": ({"data": {"customer_id": "1", "content": "x" * 40_000}}, "Segment takes 32 KB an event: content."),
    "OMIT_PROPERTIES": ({"data": {"customer_id": "1", "token": "t"}}, "because OMIT_PROPERTIES says so: token."),
    "no timestamp": ({"timestamp": None}, "The timestamp can't be read: the time of arrival stands in for it."),
    "a text as timestamp": ({"timestamp": "soon"}, "It is kept in context.timestamp."),
    "no id": ({"data": {"email_address": "ada@example.com"}}, "to Segment they are anonymous"),
    "no email": ({"data": {"identifiers": {"cio_id": "d9"}}}, "anonymousId is what else identifies the person."),
    "a reserved name": ({"campaign": 1, "device": 2}, "gives the name a meaning of its own: campaign, device."),
    "NaN": ({"data": {"customer_id": "1", "price": float("nan"), "name": "n"}}, "half a character: price."),
    "half a character": ({"data": {"customer_id": "1", "subject": "\ud83d"}}, "half a character: subject."),
    "NaN in the envelope": ({"extra": float("nan"), "name": "n"}, "half a character: extra."),
    "NaN under a reserved name": ({"campaign": float("inf")}, "half a character: campaign."),
    "reserved names as they were": ({"customerio": {"a": 1}}, "gives the name a meaning of its own: customerio."),
    "no event_id": ({"event_id": None}, "There is no event_id: the messageId is a digest of the whole event."),
    "an odd event_id": ({"event_id": "a b"}, "characters of its own: the messageId has a digest of it."),
    "an event_id that is an object": ({"event_id": {"a": 1}}, "is not an id: the messageId is a digest of the whole"),
}


@pytest.mark.parametrize(("event", "words"), CHANGES.values(), ids=CHANGES.keys())
def test_what_was_changed_is_said(dry, event, words):
    assert dry.post(make_event(**event)).status_code == 200
    assert words in " ".join(opened(dry)["changes"])


def test_an_id_that_may_not_be_sent_is_said_to_be_left_out():
    dry = InProcess(DRY_RUN="force", OMIT_PROPERTIES="customer_id")
    dry.post(make_event(data={"customer_id": 42, "email_address": "ada@example.com"}))
    assert "OMIT_PROPERTIES leaves no id of the person: to Segment they are" in " ".join(opened(dry)["changes"])


def test_what_was_left_out_of_an_object_is_said_by_its_whole_name():
    dry = InProcess(DRY_RUN="force", OMIT_PROPERTIES="identifiers.email,recipients.device_id,recipient,a.b")
    identifiers = {"id": None, "email": "ada@example.com", "cio_id": "d9c1"}
    dry.post(make_event(data={"identifiers": identifiers, "recipients": [{"device_id": "x"}], "a": {"c": 1}}))
    said = opened(dry)["changes"]
    assert said[0] == "Left out, because OMIT_PROPERTIES says so: identifiers.email, recipients.device_id."
    assert said[1].startswith("The person has no id")
    assert "ada@example.com" not in opened(dry)["call"]["text"]


# What became no call -> the name and the person that the list shows; the rule is translate's.
NO_CALL = {
    "no name": ({"metric": None}, {}, ("", "person-1")),
    "a channel that isn't a string": ({"object_type": 5}, {}, ("", "person-1")),
    "nobody": ({"data": {}}, {}, ("email_opened", "")),
    "an address, where no name": ({"metric": 5, "data": {"email_address": "A <a@b.c>"}}, {}, ("", "a@b.c")),
    "address before cio_id": (
        {"metric": None, "data": {"email_address": "a@b.c", "identifiers": {"cio_id": "d9"}}},
        *({}, ("", "a@b.c")),
    ),
    "under Segment's name": ({"data": {}}, {"EVENT_NAMES": "segment"}, ("Email Opened", "")),
    "whom OMIT_PROPERTIES leaves out": ({}, {"OMIT_PROPERTIES": "customer_id"}, ("email_opened", "")),
}


@pytest.mark.parametrize(("event", "settings", "shown"), NO_CALL.values(), ids=NO_CALL.keys())
def test_the_name_and_the_person_of_what_became_no_call(event, settings, shown):
    dry = InProcess(DRY_RUN="force", **settings)
    assert dry.post(make_event(**event)).status_code == 202
    row = listed(dry)[-1]
    assert (row["event"], row["person"]) == shown


def test_what_is_as_it_was_is_not_said_to_be_changed(dry):
    dry.post(make_event(customerio={"a": 1}, extra=[1, {"a": None}], traits={"x": 1}))
    assert "strict JSON" not in " ".join(opened(dry)["changes"])


def test_a_webhook_that_is_too_large_says_what_to_do(dry):
    dry.request("POST", "/webhook", CONTENT_LENGTH="9000000")
    assert "Turn Body Content off in Customer.io" in opened(dry)["answer"]


def test_bytes_that_are_not_utf8_are_named(dry):
    dry.post(json.dumps(make_event(name="ÿ"), ensure_ascii=False).encode("latin-1"))
    assert "Bytes that are not UTF-8 were replaced by �." in opened(dry)["changes"]


def test_a_large_webhook_is_cut_says_so_and_can_be_had_whole(dry):
    event = make_event(data={"customer_id": "1", "content": "x" * 1_000_000})
    dry.post(event)
    number = listed(dry)[-1]["number"]
    found = dry.get(f"/webhooks/{number}").json()["webhook"]
    assert len(found["text"]) == 30_000
    assert found["length"] > 1_000_000
    assert json.loads(dry.get(f"/webhooks/{number}/webhook").text) == event


def test_of_very_much_only_the_beginning_is_kept(dry, monkeypatch):
    monkeypatch.setattr("ops.page.inspector.MAX_HELD", 1_000_000)
    for number in range(3):
        dry.post(make_event(number, data={"customer_id": "1", "content": "x" * 400_000}))
    rows = listed(dry)
    whole = [dry.get(f"/webhooks/{row['number']}").json()["whole"] for row in rows]
    assert whole == [False, True, True]
    assert dry.get(f"/webhooks/{rows[0]['number']}/curl").status_code == 404


DEEP = {"arrays": b"[" * 950 + b"]" * 950, "objects": b'{"a":' * 950 + b"1" + b"}" * 950, "very": b"[" * 100_000}


@pytest.mark.parametrize("value", DEEP.values(), ids=DEEP.keys())
def test_what_nests_deeply_is_shown_as_text(dry, value, capsys):
    body = b'{"metric": "deep", "event_id": "1", "data": {"customer_id": "1", "x": ' + value + b"}}"
    assert dry.post(body).status_code in (200, 202)
    assert opened(dry)["webhook"]["text"] == body.decode()[:30_000]


def test_a_failure_of_the_page_changes_no_answer(dry, monkeypatch):
    monkeypatch.setattr("ops.page.inspector.Seen", None)
    assert dry.post(make_event()).json()["status"] == "dry-run"
    assert dry.post(make_event(metric=None)).json()["status"] == "dead-lettered"


def test_the_call_is_printed(dry, capsys):
    dry.post(make_event())
    heading, _, call = capsys.readouterr().out.partition("\n")
    assert heading == "track call:"
    assert json.loads(call)["event"] == "customerio:email_opened"


def test_the_call_is_printed_as_one_line_of_a_json_log(capsys):
    InProcess(DRY_RUN="force", LOG_FORMAT="json").post(make_event())
    line = json.loads(capsys.readouterr().out)
    assert (line["level"], line["message"], line["call"]["userId"]) == ("info", "track call", "person-1")


BODIES = {
    "an event": json.dumps(make_event(data={"customer_id": "1", "subject": "It's $HOME `id` !!"})).encode(),
    "laid out": json.dumps(make_event(), indent=2).encode(),
    "a file's name": b"@/etc/passwd",
    "a control character": b'{"metric": "\x1b[31m", "data": {"customer_id": "1"}}',
    "not UTF-8": b'{"metric": "\xff", "data": {"customer_id": "1"}}',
    "large": json.dumps(make_event(data={"customer_id": "1", "content": "x" * 200_000})).encode(),
}


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES.keys())
def test_a_webhook_as_a_curl_command_is_the_same_webhook(start, body):
    relay = start(DRY_RUN="force")
    relay.post(body)
    before = listed(relay)[-1]
    command = relay.get(f"/webhooks/{before['number']}/curl").text
    subprocess.run(["bash"], input=command, text=True, capture_output=True, check=True)
    rows = listed(relay, before["number"])
    assert [row["outcome"] for row in rows] == [before["outcome"]]
    assert before["outcome"] in ("dry_run", "dead_lettered")
    assert rows[0]["size"] == len(body)


def test_a_signature_is_given_to_nobody_from_outside(start):
    relay = start(DRY_RUN="force")
    relay.post(make_event("it's"), headers={})
    number = listed(relay)[-1]["number"]
    command = relay.get(f"/webhooks/{number}/curl", {"X-Forwarded-For": "203.0.113.7", "Host": "localhost"}).text
    assert not re.search("[0-9a-f]{64}", command)
    command = command.replace("http://localhost/", f"{relay.url}/")
    done = subprocess.run(
        ["bash"], input=f"export CUSTOMERIO_SIGNING_KEY={SIGNING_KEY}\n{command}", text=True, capture_output=True,
        check=True,
    )  # fmt: skip
    assert json.loads(done.stdout)["status"] == "dry-run"


OUTSIDE = {
    "no host": "",
    "a proxy that names the address alone": "Host: localhost\r\nX-Real-IP: 203.0.113.7\r\n",
    "another": "Host: localhost\r\nTrue-Client-IP: 203.0.113.7\r\n",
    "the name that a tunnel replaced": "Host: localhost\r\nX-Original-Host: relay.example\r\n",
}


def test_a_signature_needs_a_plainly_private_host(start):
    relay = start(DRY_RUN="force", WEB_CONCURRENCY="1")
    relay.post(make_event())
    path = f"/webhooks/{listed(relay)[-1]['number']}/curl"

    def signed(headers):
        with socket.create_connection(("127.0.0.1", relay.port)) as client:
            client.sendall(f"GET {path} HTTP/1.0\r\n{headers}\r\n".encode())
            answer = client.makefile().read()
        assert "curl http" in answer
        return re.search("X-CIO-Signature: [0-9a-f]{64}", answer) is not None

    assert signed("Host: localhost\r\n")
    assert [case for case, headers in OUTSIDE.items() if signed(headers)] == []


def test_a_curl_command_without_a_key_is_not_signed():
    relay = InProcess(DRY_RUN="1", SEGMENT_WRITE_KEY=None, CUSTOMERIO_SIGNING_KEY=None)
    relay.post(make_event(), headers={})
    assert "X-CIO" not in relay.get(f"/webhooks/{listed(relay)[-1]['number']}/curl").text


# --- Samples ---


def test_a_sample_goes_the_way_of_a_webhook_signed(dry):
    answer = dry.request("POST", "/sample", json.dumps(make_event("mine")).encode(), JSON).json()
    assert (answer["status"], answer["answer"]["status"]) == (200, "dry-run")
    row = listed(dry)[-1]
    assert (row["number"], row["person"], row["sample"]) == (answer["number"], "person-mine", True)


def test_a_sample_is_found_by_its_number_whatever_comes_meanwhile(dry, monkeypatch):
    remember = Inspector.remember

    def remember_two(inspector, *args):
        number = remember(inspector, *args)
        remember(inspector, Webhook(), REJECTED, 422, False)
        return number

    monkeypatch.setattr(Inspector, "remember", remember_two)
    number = dry.request("POST", "/sample", json.dumps(make_event("mine")).encode(), JSON).json()["number"]
    assert "mine" in dry.get(f"/webhooks/{number}").json()["webhook"]["text"]


def test_other_sites_send_no_samples(dry):
    for form in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data"):
        assert dry.request("POST", "/sample", b"{}", {"Content-Type": form}).status_code == 415
    assert listed(dry) == []


def test_there_is_a_choice_of_every_sample(dry):
    html = dry.get("/").text
    assert len(re.findall("<optgroup", html)) == len(samples.METRICS) == len(samples.CHANNELS)
    assert set(re.findall(r'<option value="(\w+)"', html)) == set(samples.EVENTS)
    assert dry.get("/samples/sms_replied").json()["metric"] == "replied"
    assert dry.get("/samples/sms_of_tomorrow").status_code == 404


@pytest.mark.parametrize("name", samples.EVENTS)
def test_every_sample_becomes_a_call(name):
    sample = samples.sample(name, "1", 1_700_000_000)
    assert kind(sample) == samples.EVENTS[name]
    assert translate(sample, received=datetime.now(UTC))["user_id"] == samples.ID


def test_there_is_a_sample_of_every_documented_event():
    documented = json.loads((ROOT / "tests/events/catalogue.json").read_text())
    assert len(documented) == 73
    assert {name: list(pair) for name, pair in samples.EVENTS.items()} == documented
