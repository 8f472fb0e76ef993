"""`python -m ops check` asks both ends: Segment's Public API, and Customer.io's App API."""

import json
import shutil
import ssl
import subprocess
import time

import pytest
from click.testing import CliRunner
from conftest import KEYS, WRITE_KEY, free_port
from fake_apis import TOKEN, FakeCustomerioApi, FakeSegmentApi, Happened, source, webhook

from ops.__main__ import main
from ops.check import customerio_api, segment_api
from ops.timing import Timing

ADDRESS = "https://relay.example.com/webhook"
ALL = list(customerio_api.SUBSCRIBABLE)
ASK_EVERY = 15


def webhooks(*items):
    return json.dumps({"reporting_webhooks": items}).encode()


class Clock:
    """A clock that stands still, except that each pause takes `step` seconds."""

    def __init__(self):
        self.time, self.step, self.waits = 0, 0, []

    def now(self):
        return self.time

    def sleep(self, seconds):
        self.waits.append(seconds)
        self.time += self.step


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def waits(clock):
    """The seconds that `check` would have waited between two questions."""
    return clock.waits


@pytest.fixture
def public(segment):
    with FakeSegmentApi(segment) as api:
        yield api


@pytest.fixture
def app_api():
    with FakeCustomerioApi() as api:
        api.webhooks = [webhook(ADDRESS, ALL)]
        yield api


@pytest.fixture
def run(segment, public, app_api, clock):
    """Run `check` against the fakes, giving up on an answer soon; None leaves a setting out."""

    def run(*words, sleep=clock.sleep, upload=15, **settings):
        env = {
            **KEYS,
            "SEGMENT_HOST": segment.url,
            "SEGMENT_PUBLIC_API_TOKEN": TOKEN,
            "SEGMENT_PUBLIC_API_URL": public.url,
            "CUSTOMERIO_APP_API_KEY": TOKEN,
            "CUSTOMERIO_APP_API_URL": app_api.url,
            "DRY_RUN": None,
            "REQUESTS_CA_BUNDLE": None,
            "CURL_CA_BUNDLE": None,
            **settings,
        }
        timing = Timing(clock.now, sleep, answer=0.3, upload=upload)
        done = CliRunner().invoke(main, ["check", *words], obj=timing, env=env, prog_name="python -m ops")
        assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
        for secret in (TOKEN, *KEYS.values()):
            assert secret not in done.output
        return done

    return run


def report_of(done):
    return json.loads(done.stdout)


def test_all_is_well(run, public):
    public.happened = [Happened("customerio:email_opened", 1_234, minutes_ago=3)]
    done = run("--url", "https://relay.example.com")
    assert (done.exit_code, done.stderr) == (0, "")
    assert 'the write key belongs to the source "Customer.io relay", enabled.' in done.stdout
    assert "UTC it received 1,235 events, the last one at " in done.stdout
    assert "and dropped 0.\n" in done.stdout
    assert f'the webhook "Relay" goes to {ADDRESS}, enabled.' in done.stdout
    assert "on: all of customer, all of email, all of push, all of sms, " in done.stdout
    for unwanted in ("Not checked", "warning", "Now look for"):
        assert unwanted not in done.stdout


def test_without_tokens_it_says_what_it_could_not_check(run, public, app_api):
    done = run(SEGMENT_PUBLIC_API_TOKEN=None, CUSTOMERIO_APP_API_KEY=" ")
    assert (done.exit_code, done.stderr, public.requests + app_api.requests) == (0, "", [])
    assert "Not checked: which source has the write key" in done.stdout
    assert "Not checked: the webhook in Customer.io" in done.stdout
    assert "Now look for customerio:relay_check in Segment" in done.stdout


def test_it_asks_as_documented_and_a_netrc_replaces_no_token(run, public, app_api, tmp_path):
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login somebody password else\n")
    assert run(NETRC=str(tmp_path / "netrc")).exit_code == 0
    assert [(path, headers["authorization"]) for path, _, headers in public.requests + app_api.requests] == [
        ("/sources", f"Bearer {TOKEN}"),
        ("/delivery-overview/successfully-received", f"Bearer {TOKEN}"),
        ("/delivery-overview/failed-on-ingest", f"Bearer {TOKEN}"),
        ("/v1/reporting_webhooks", f"Bearer {TOKEN}"),
    ]


@pytest.mark.parametrize("as_json", [[], ["--json"]], ids=["text", "json"])
def test_a_token_inside_a_name_is_masked(run, public, app_api, as_json):
    public.sources[1].update(name=f"Relay of {TOKEN}")
    public.happened = [Happened(TOKEN, 12, f"{TOKEN}_disabled", 30)]
    app_api.webhooks = [
        webhook(f"https://{TOKEN}.example.com/{TOKEN}/webhook", [f"email_{TOKEN}"], name=f"{'n' * 95}{TOKEN}")
    ]
    done = run(*as_json)  # which looks for TOKEN in all output
    assert (TOKEN[:5] in done.output, "Relay of ***" in done.stdout, "email_***" in done.stdout) == (False, True, True)
    app_api.webhooks = [webhook(f"https://{TOKEN}.example.com/hook", ALL)]
    assert "There are https://***.example.com" in run(*as_json).output


def test_tokens_may_come_from_a_file(run, public, app_api, tmp_path):
    (tmp_path / "env").write_text(f"SEGMENT_PUBLIC_API_TOKEN={TOKEN}\n")
    env = {**KEYS, "SEGMENT_HOST": public.url, "SEGMENT_PUBLIC_API_URL": public.url, "DRY_RUN": "force"}
    done = CliRunner().invoke(main, ["--env-file", str(tmp_path / "env"), "check"], env=env)
    assert 'the source "Customer.io relay"' in done.stdout


# Segment's end: its state -> the exit code, and the message.
SEGMENT = {
    "the key is on the last page": (
        lambda api: (api.sources.insert(0, source("First", ["k"])), setattr(api, "page", 1)),
        0,
        'the source "Customer.io relay", enabled',
    ),
    "no source has the key": (
        lambda api: setattr(api, "sources", [source("Website", ["another-key"])]),
        1,
        "No source has SEGMENT_WRITE_KEY",
    ),
    "the key is on no page": (
        lambda api: (api.sources.pop(), api.sources.append(source("Shop", ["k"])), setattr(api, "page", 1)),
        1,
        "No source has SEGMENT_WRITE_KEY",
    ),
    "a part of a key is not the key": (
        lambda api: setattr(api, "sources", [source("Website", [WRITE_KEY + "x"]), source("Shop", [WRITE_KEY[1:]])]),
        1,
        "No source has SEGMENT_WRITE_KEY",
    ),
    "there is no source": (lambda api: api.sources.clear(), 1, "No source has SEGMENT_WRITE_KEY"),
    "the source is disabled": (
        lambda api: setattr(api, "sources", [source("Relay", ["old", WRITE_KEY], enabled=False)]),
        1,
        "The source is disabled",
    ),
    "the token lacks Source Admin": (
        lambda api: setattr(api, "source_admin", False),
        2,
        "SEGMENT_PUBLIC_API_TOKEN may not read the write keys of 2 of 2 sources: it lacks the Source Admin permission",
    ),
    "the token has Source Admin for another source": (
        lambda api: api.sources[1].update(writeKeys=[]),
        2,
        "write keys of 1 of 2 sources: it lacks the Source Admin permission",
    ),
    "no delivery overview": (lambda api: setattr(api, "business_plan", False), 2, "a Team or Business plan"),
    "it dropped events": (
        lambda api: api.happened.append(Happened("a", 12, "source_disabled", 30)),
        1,
        "Segment dropped 12 events of the last four hours after its 200",
    ),
    "it dropped events long ago": (
        lambda api: api.happened.append(Happened("a", 12, "source_disabled", 300)),
        0,
        "and dropped 0",
    ),
    "data is a list": (lambda api: setattr(api, "plain_lists", True), 0, "UTC it received 1 events"),
    "a list on several pages": (
        lambda api: (setattr(api, "plain_lists", True), setattr(api, "page", 1)),
        0,
        'the source "Customer.io relay", enabled',
    ),
    "a name that would move the cursor": (
        lambda api: api.sources[1].update(name="Re\x1b[2Jlay"),
        0,
        'the source "Re?[2Jlay", enabled',
    ),
}


@pytest.mark.parametrize(("prepare", "code", "words"), SEGMENT.values(), ids=SEGMENT.keys())
def test_segments_end(run, public, prepare, code, words):
    prepare(public)
    done = run()
    assert (done.exit_code, words in done.output) == (code, True), done.output
    assert ("Now look for" in done.stdout) == ("Source Admin permission" in words)
    assert ("Error: " in done.stderr, "Incomplete: " in done.stderr) == (code == 1, code == 2)


def test_drops_are_a_table_by_reason_with_what_each_means(run, public):
    public.page = 1
    public.happened = [
        Happened("a", 1_500, "project_not_found", 10),
        Happened("b", 3, "id_required", 5),
        Happened("b", 4, "id_required", 200),
        Happened("c", 1, "brand_new_reason", 1),
    ]
    done = run()
    assert done.exit_code == 1
    _, table = done.stdout.split("and dropped 1,508.\n")
    assert [line.split(maxsplit=3)[:1] + line.split(maxsplit=3)[2:] for line in table.splitlines()[1:4]] == [
        ["1,500", "project_not_found", "Segment doesn't know the write key: set SEGMENT_WRITE_KEY again."],
        [
            "7",
            "id_required",
            segment_api.NOT_OURS,
        ],
        ["1", "brand_new_reason", "See this source's Delivery Overview in Segment."],
    ]


@pytest.mark.parametrize(
    ("host", "address"),
    [
        ("https://api.segment.io", "https://api.segmentapis.com"),
        ("https://events.eu1.segmentapis.com", "https://eu1.api.segmentapis.com"),
        ("https://events.eu1.segmentapis.com.", "https://eu1.api.segmentapis.com"),
        ("https://EVENTS.EU1.SegmentAPIs.com", "https://eu1.api.segmentapis.com"),
        ("https://eu1.api.segmentapis.com", "https://eu1.api.segmentapis.com"),
        ("http://localhost:8099", "https://api.segmentapis.com"),
    ],
)
def test_the_region_is_that_of_segment_host(host, address):
    assert segment_api.from_env({"SEGMENT_PUBLIC_API_TOKEN": "t"}, host, 1).url == address


@pytest.mark.parametrize(("words", "host"), [([], "api"), (["--customerio-eu"], "api-eu")])
def test_the_region_of_customerio_is_an_option(run, words, host):
    """A key with a blank in it is not sent, so nobody is asked."""
    report = report_of(run("--json", *words, CUSTOMERIO_APP_API_URL=None, CUSTOMERIO_APP_API_KEY="no key"))
    assert report["customerio"]["asked"] == f"https://{host}.customer.io"


# Customer.io's end: the webhooks -> the exit code, and the message.
CUSTOMERIO = {
    "enabled, with all events": ([webhook(ADDRESS, ALL)], 0, "enabled"),
    "others are not candidates": (
        [webhook("https://example.com/hook", []), webhook("https://example.com/webhooks", []), webhook(ADDRESS, ALL)],
        0,
        "enabled",
    ),
    "there is none": ([], 1, "No reporting webhook in Customer.io has an address that ends in /webhook. There is none"),
    "none is for a relay": (
        [webhook("https://user:password@example.com/hook?secret=1", ALL)],
        1,
        "ends in /webhook. There are https://example.com.\n",
    ),
    "it is disabled": ([webhook(ADDRESS, ALL, disabled=True)], 1, 'The webhook "Relay" is disabled'),
    "two to one address": (
        [webhook(ADDRESS, ["email_sent"]), webhook(ADDRESS.replace("com", "com:443"), ALL, name="Other")],
        1,
        f"2 webhooks go to {ADDRESS}: events may arrive twice",
    ),
    "two that could be it": (
        [webhook(ADDRESS, ALL), webhook("https://staging.example.com/webhook", ALL)],
        2,
        "Several webhooks could be this relay's: name its address with --url",
    ),
    "a channel and an event are on": (
        [webhook(ADDRESS, ["email_sent", *(name for name in ALL if name.startswith("push_"))])],
        0,
        "on: all of push, email_sent\n  warning: These events are off: all of customer, all of sms, ",
    ),
    "an event is off": ([webhook(ADDRESS, ALL[:-1])], 0, f"warning: These events are off: {ALL[-1]}.\n"),
    "all events are off": ([webhook(ADDRESS, [])], 0, "warning: No event is on"),
    "an event that is not documented": (
        [webhook(ADDRESS, [*ALL, "email_snoozed"])],
        0,
        "all of in_app, email_snoozed\n",
    ),
    "the first open only": ([webhook(ADDRESS, ALL, full_resolution=False)], 0, "warning: Only the first open"),
    "with Body Content": ([webhook(ADDRESS, ALL, with_content=True)], 0, "warning: Body Content is on"),
    "with what this was not written for": (
        [{"endpoint": ADDRESS, "events": ALL, "type": "webhook"}, {"endpoint": None}, {"endpoint": "https://[::"}],
        0,
        "enabled",
    ),
}


@pytest.mark.parametrize(("webhooks", "code", "words"), CUSTOMERIO.values(), ids=CUSTOMERIO.keys())
def test_customerios_end(run, app_api, webhooks, code, words):
    app_api.webhooks = webhooks
    done = run()
    assert (done.exit_code, words in done.output) == (code, True), done.output


@pytest.mark.parametrize("url", ["https://relay.example.com", "https://RELAY.example.com:443/", ADDRESS])
def test_url_names_the_webhook(run, app_api, url):
    app_api.webhooks = [webhook("https://staging.example.com/webhook", []), webhook(ADDRESS, ALL)]
    done = run("--url", url)
    assert (done.exit_code, "warning" in done.stdout) == (0, False), done.output


# --url, and the webhooks -> the exit code, and the message.
PREFIXED = {
    "a prefix that --url lacks": (
        "https://relay.example.com",
        ["https://relay.example.com/a/b/webhook"],
        0,
        "goes to https://relay.example.com/a/b/webhook, enabled",
    ),
    "the prefix of --url": ("https://relay.example.com/a/", ["https://relay.example.com/a/webhook"], 0, "/a/webhook"),
    "another prefix": ("https://relay.example.com/a", ["https://relay.example.com/ab/webhook"], 1, "No reporting"),
    "another port": ("https://relay.example.com", ["https://relay.example.com:8443/webhook"], 1, "No reporting"),
    "another host": ("https://relay.example.com", ["https://relay.example.com.org/webhook"], 1, "No reporting"),
    "another end": ("https://relay.example.com", ["https://relay.example.com/webhook/a"], 1, "No reporting"),
    "the whole address": (ADDRESS, [ADDRESS, "https://relay.example.com/a/webhook"], 0, f"goes to {ADDRESS}, enabled"),
    "two addresses": (
        "https://relay.example.com",
        [ADDRESS, "https://relay.example.com/a/webhook"],
        2,
        "name its address with --url. There are https://relay.example.com.\n",
    ),
    "twice the same": ("https://relay.example.com", [ADDRESS, ADDRESS], 1, f"2 webhooks go to {ADDRESS}"),
}


@pytest.mark.parametrize(("url", "endpoints", "code", "words"), PREFIXED.values(), ids=PREFIXED.keys())
def test_url_and_a_prefix(run, app_api, url, endpoints, code, words):
    app_api.webhooks = [webhook(endpoint, ALL) for endpoint in endpoints]
    done = run("--url", url)
    assert (done.exit_code, words in done.output) == (code, True), done.output


def test_url_is_of_no_webhook(run):
    done = run("--url", "https://other.example.com")
    assert done.exit_code == 1
    assert "goes to https://other.example.com/webhook. There are https://relay.example.com.\n" in done.stderr
    assert run("--url", "relay").exit_code == 2


def test_the_names_in_the_settings_of_a_webhook():
    assert len(ALL) == 72
    assert "customer_subscription_preferences_changed" in ALL
    assert not {"customer_cio_subscription_preferences_changed", "slack_undeliverable"} & set(ALL)


# How the API fails -> the message for Segment's, and for Customer.io's.
FAULTS = {
    "401": ("Segment refuses SEGMENT_PUBLIC_API_TOKEN (401)", "Customer.io refuses CUSTOMERIO_APP_API_KEY (401)"),
    "403": ("sources need Source Admin", "CUSTOMERIO_APP_API_KEY lacks the permission"),
    "404": ("doesn't know the question (404)", "doesn't know the question (404)"),
    "400": (
        "answered 400: it doesn't accept the question. Update the relay, or check SEGMENT_PUBLIC_API_URL.",
        "answered 400: it doesn't accept the question. Update the relay, or check CUSTOMERIO_APP_API_URL.",
    ),
    "422": ("its API has changed", "answered 422: it doesn't accept the question"),
    "429": ("is limiting the rate of questions (429): try again.", "10 questions a second, and had more (429)"),
    "429:7": ("try again in 7 s.", "try again in 7 s."),
    "500": ("answered 500", "answered 500"),
    "hang": ("there is no answer within 0.3 s", "there is no answer within 0.3 s"),
    "drip": ("there is no answer within 0.3 s", "there is no answer within 0.3 s"),
    "drip-head": ("there is no answer within 0.3 s", "there is no answer within 0.3 s"),
    "close": ("the connection broke off", "the connection broke off"),
    "html": ("is not Segment's Public API", "is not Customer.io's App API"),
    "list": ("is not Segment's Public API", "is not Customer.io's App API"),
    "empty": ("has no list of sources", "has no list of reporting_webhooks"),
    "redirect": ("redirects elsewhere (302)", "redirects elsewhere (302)"),
}


@pytest.mark.parametrize(("fault", "words"), FAULTS.items(), ids=FAULTS.keys())
def test_an_end_that_does_not_answer(run, public, app_api, fault, words):
    public.fault = fault
    done = run()
    assert (done.exit_code, words[0] in done.stderr) == (2, True), done.output
    assert "Now look for" in done.stdout
    public.fault, app_api.fault = None, fault
    done = run()
    assert (done.exit_code, words[1] in done.stderr) == (2, True), done.output


def overview(row, **beside):
    return json.dumps({"data": {"dataset": [row]} | beside}).encode()


# What Segment's overview has instead of counts.
ODD_COUNTS = {
    "NaN": overview({"total": float("nan")}),
    "Infinity": overview({"total": float("inf")}),
    "1e999": b'{"data": {"dataset": [{"total": 1e999}]}}',
    "null": overview({"total": None}),
    "a text": overview({"total": "12"}),
    "a bool": overview({"total": True}),
    "negative": overview({"total": -1}),
    "a fraction": overview({"total": 1.5}),
    "nothing": overview({}),
    "series is a text": overview({"total": 1, "series": "12"}),
    "series is a number": overview({"total": 1, "series": 12}),
    "series is null": overview({"total": 1, "series": None}),
    "series of numbers": overview({"total": 1, "series": [12]}),
    "a count is null": overview({"series": [{"time": "2026-11-25T00:37:00Z", "count": None}]}),
    "next is a number": overview({"total": 1}, pagination={"next": 5}),
    "next is a list": overview({"total": 1}, pagination={"next": []}),
    "pagination is a text": overview({"total": 1}, pagination="next"),
}


@pytest.mark.parametrize("body", ODD_COUNTS.values(), ids=ODD_COUNTS.keys())
@pytest.mark.parametrize("question", [1, 2], ids=["received", "dropped"])
def test_odd_counts_are_neither_counts_nor_zero(run, public, body, question):
    public.faults.extend([None] * question + [body])
    done = run("--json")
    report = report_of(done)
    assert (done.exit_code, report["wrong"]) == (2, [])
    assert [f"what answers at {public.url} is not Segment's Public API" in words for words in report["incomplete"]] == [
        True
    ]


# Odd answers of Segment's that are accepted -> the message.
READ = {
    "no total, but a series": (
        overview({"series": [{"time": "x", "count": 2}, {"time": None, "count": 5}]}),
        "it received 7 events, and",
    ),
    "a total like 3.0": (overview({"total": 3.0}), "it received 3 events, and"),
    "a byte order mark": (b"\xef\xbb\xbf" + overview({"total": 8}), "it received 8 events, and"),
    "a time without a zone": (
        overview({"total": 9, "series": [{"time": "2026-11-25T00:37:00", "count": 9}]}),
        "it received 9 events, the last one at 00:37, and",
    ),
    "a time of another zone": (
        overview(
            {
                "total": 9,
                "series": [
                    {"time": "2026-11-25T00:37:00-01:00", "count": 4},
                    {"time": "2026-11-25T01:07:00Z", "count": 5},
                ],
            }
        ),
        "the last one at 01:37, and",
    ),
    "an invalid time": (
        overview({"total": 9, "series": [{"time": "0001-01-01T00:00:00+14:00", "count": 9}]}),
        "it received 9 events, and",
    ),
}


@pytest.mark.parametrize(("body", "words"), READ.values(), ids=READ.keys())
def test_what_is_read_all_the_same(run, public, monkeypatch, body, words):
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    time.tzset()
    public.faults.extend([None, body])
    done = run()
    monkeypatch.undo()
    time.tzset()
    assert (done.exit_code, words in done.stdout) == (0, True), done.output


@pytest.mark.parametrize("beside", [{}, {"plain_lists": True}, {"beside": True}], ids=["inside", "a list", "outside"])
def test_all_pages_are_read(run, public, beside):
    vars(public).update(beside, page=1)
    public.happened = [Happened("a", 1, "id_required"), Happened("a", 2, "another")]
    done = run()
    assert (done.exit_code, "and dropped 3." in done.stdout) == (1, True), done.output


def test_pages_without_an_end(run, public):
    public.sources = [source("Website", ["another-key"]) for _ in range(101)]
    public.page = 1
    done = run()
    assert (done.exit_code, len(public.requests)) == (2, 100)
    assert f"{public.url} has more than 100 pages of sources" in done.stderr


# What Customer.io's list of webhooks is instead.
ODD_WEBHOOKS = {
    "a text": b'{"reporting_webhooks": "webhook"}',
    "a list of texts": b'{"reporting_webhooks": ["webhook"]}',
    "null": b'{"reporting_webhooks": null}',
    "events is a text": webhooks(webhook(ADDRESS, "email_sent")),
    "events is a number": webhooks(webhook(ADDRESS, 5)),
    "events is null": webhooks(webhook(ADDRESS, None)),
    "events is an object": webhooks(webhook(ADDRESS, {"email_sent": True})),
    "events has a number": webhooks(webhook(ADDRESS, ["email_sent", 5])),
    "disabled is a text": webhooks(webhook(ADDRESS, ALL, disabled="false")),
}


@pytest.mark.parametrize("body", ODD_WEBHOOKS.values(), ids=ODD_WEBHOOKS.keys())
def test_odd_webhooks(run, app_api, body):
    app_api.fault = body
    done = run("--json")
    report = report_of(done)
    assert (done.exit_code, report["wrong"]) == (2, [])
    assert f"what answers at {app_api.url} is not Customer.io's App API" in report["incomplete"][0]


def test_which_events_are_on_is_unknown(run, app_api):
    app_api.webhooks = [{name: value for name, value in webhook(ADDRESS, ALL).items() if name != "events"}]
    done = run()
    assert (
        done.exit_code,
        "\n  on: unknown\n  warning: Customer.io doesn't say which events are on" in done.stdout,
    ) == (
        0,
        True,
    ), done.output
    (hook,) = report_of(run("--json"))["customerio"]["webhooks"]
    assert (hook["events_on"], hook["events_off"]) == (None, None)


def test_a_wrong_token(run, app_api):
    done = run(SEGMENT_PUBLIC_API_TOKEN="another-token", CUSTOMERIO_APP_API_KEY="another-token")
    assert (done.exit_code, done.stderr.count("(401)"), "another-token" in done.output) == (2, 2, False)


def test_too_many_questions(run, app_api):
    app_api.limit = 0
    done = run()
    assert (done.exit_code, "10 questions a second" in done.stderr) == (2, True)


@pytest.mark.parametrize("token", ["to ken", "tok\nen", '"token"', "tökén"])
def test_an_invalid_token_is_neither_sent_nor_shown(run, public, token):
    done = run(SEGMENT_PUBLIC_API_TOKEN=token)
    assert (done.exit_code, public.requests) == (2, [])
    assert "SEGMENT_PUBLIC_API_TOKEN has a blank, a quote" in done.stderr
    assert token not in done.output


NO_WAY = {
    "not resolvable": ("https://nowhere.invalid", "its name has no address"),
    "refused": ("http://127.0.0.1:1", "the port is refused"),
    "no address": (f"https://{'a' * 70}.example", "the address is malformed"),
}


@pytest.mark.parametrize(("address", "words"), NO_WAY.values(), ids=NO_WAY.keys())
def test_no_way_to_an_end(run, segment, address, words):
    done = run(SEGMENT_PUBLIC_API_URL=address)
    assert (done.exit_code, f"{address} can't be reached: {words}" in done.stderr) == (2, True), done.stderr
    done = run(CUSTOMERIO_APP_API_URL=address)
    assert (done.exit_code, f"{address} can't be reached: {words}" in done.stderr) == (2, True), done.stderr
    done = run(SEGMENT_HOST=address)
    assert (done.exit_code, f"{address} did not take the event: " in done.stderr) == (1, True), done.stderr
    assert words in done.stderr


@pytest.mark.parametrize("setting", ["SEGMENT_PUBLIC_API_URL", "CUSTOMERIO_APP_API_URL"])
@pytest.mark.parametrize(
    "value", ["api.example.com", "https://api.example.com/v1", "https://a:password@example.com", "http://["]
)
def test_an_invalid_address(run, setting, value):
    done = run("--json", **{setting: value})
    assert "password" not in done.output
    done = run(**{setting: value})
    assert (done.exit_code, f"{setting} is a URL without a path" in done.stderr) == (2, True)


def test_a_token_in_clear_text_is_a_warning(run):
    done = run(SEGMENT_PUBLIC_API_URL="http://nowhere.invalid")
    assert "warning: SEGMENT_PUBLIC_API_URL is not https: SEGMENT_PUBLIC_API_TOKEN is sent in clear text" in done.stdout


def test_tls_is_refused(run, segment, public, app_api):
    address = public.url.replace("http:", "https:")
    for name in ("SEGMENT_PUBLIC_API_URL", "CUSTOMERIO_APP_API_URL"):
        done = run(**{name: address})
        assert (done.exit_code, f"{address} can't be reached: TLS is refused (" in done.stderr) == (2, True)
    done = run(SEGMENT_HOST=address)
    assert done.exit_code == 1
    assert "did not take the event: the connection to Segment failed: TLS is refused (" in done.stderr


@pytest.mark.skipif(not shutil.which("openssl"), reason="no openssl to make a certificate with")
def test_a_certificate_that_is_not_trusted(run, public, tmp_path):
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=127.0.0.1"
    subprocess.run([*command.split(), "-keyout", key, "-out", certificate], check=True, capture_output=True)
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificate, key)
    with FakeSegmentApi(tls=tls) as api:
        done = run(SEGMENT_PUBLIC_API_URL=api.url)
    assert (done.exit_code, "TLS is refused (self-signed certificate)" in done.stderr) == (2, True), done.stderr


def test_certificates_that_are_not_there(run, public):
    done = run(SEGMENT_PUBLIC_API_URL=public.url.replace("http:", "https:"), REQUESTS_CA_BUNDLE="/nowhere.pem")
    assert (done.exit_code, "that REQUESTS_CA_BUNDLE or CURL_CA_BUNDLE names can't be read" in done.stderr) == (2, True)
    done = run(SEGMENT_HOST=public.url.replace("http:", "https:"), REQUESTS_CA_BUNDLE="/nowhere.pem")
    assert (done.exit_code, "REQUESTS_CA_BUNDLE has no certificates to trust: No such file" in done.stderr) == (1, True)


def test_a_proxy_that_does_not_answer(run):
    done = run(
        SEGMENT_PUBLIC_API_URL="http://api.example.com",
        HTTP_PROXY=f"http://127.0.0.1:{free_port()}",
        NO_PROXY="127.0.0.1",
    )
    assert (done.exit_code, "the proxy (HTTPS_PROXY) doesn't answer" in done.stderr) == (2, True)


# How the upload fails -> the rest of the message.
UPLOADS = {
    "400": "the write key has: it is far too short",
    "401": "refuses the write key (401): check SEGMENT_WRITE_KEY.",
    "500": "Segment answered 500.",
    "reset": "the connection to Segment failed: but something answers there, so try again.",
    "silent": "the connection to Segment failed: there is no answer within 0.3 s.",
    "refuse": "the connection to Segment failed: the port is refused, nothing listens there.",
}


@pytest.mark.parametrize(("fault", "words"), UPLOADS.items(), ids=UPLOADS.keys())
def test_an_upload_that_fails(run, segment, public, app_api, fault, words):
    segment.set_fault(fault)
    done = run()
    assert (done.exit_code, words in done.stderr) == (1, True), done.stderr
    assert 'the source "Customer.io relay", enabled' in done.stdout, "the ends are asked all the same"
    assert "took the event" not in done.stdout


@pytest.mark.parametrize("fault", ["hang", "drip"])
def test_a_slow_answer_has_its_time(run, segment, fault):
    segment.set_fault(fault)
    assert "Segment did not answer in time (0.2 s)." in run(upload=0.2).stderr


@pytest.mark.parametrize(("drops", "code", "word"), [("", 0, "received"), ("source_disabled", 1, "dropped")])
def test_watch_waits_for_the_report(run, public, waits, drops, code, word):
    public.happened = [Happened("customerio:relay_check", 3, drops, minutes_ago=50), Happened("another", 1)]
    public.drops = drops
    public.lag = 2 + 2 * 4  # two questions before the event, and then two each time
    done = run("--watch")
    assert (done.exit_code, waits) == (code, [ASK_EVERY] * 5), done.output
    assert "Waiting for Segment's report of customerio:relay_check, up to 10 minutes" in done.stderr
    assert f"customerio:relay_check was {word}, reported after 0 s.\n" in done.stdout


def test_watch_that_ends_with_a_drop_is_wrong_whatever_the_last_hours_say(run, public):
    public.drops = "source_disabled"
    public.faults.extend([None] * 5 + ["500"] * 2)  # the last two are about the last hours
    done = run("--watch")
    assert (done.exit_code, "was dropped, reported after 0 s.\n" in done.stdout) == (1, True), done.output
    assert "Error: Segment dropped customerio:relay_check, the event of this check, after its 200.\n" in done.stderr
    assert "Incomplete: " in done.stderr


def test_watch_counts_no_earlier_event_that_is_reported_late(run, public, waits):
    public.late = [Happened("customerio:relay_check", minutes_ago=2)]
    public.lag = 2 + 2 * 4
    done = run("--watch")
    assert (done.exit_code, waits) == (0, [ASK_EVERY] * 5), done.output


@pytest.mark.parametrize("fault", ["429", "500", "hang", "close"])
def test_watch_asks_again_for_the_counts_before_the_event(run, public, segment, waits, fault):
    public.faults.extend([None, fault, None, fault])  # sources, and two questions each time
    done = run("--watch")
    assert (done.exit_code, waits, len(segment.kept)) == (0, [ASK_EVERY] * 3, 1), done.output
    assert "The event waits, up to 10 minutes ...\n" in done.stderr


def test_watch_sends_the_event_after_ten_minutes_without_counts(run, public, segment, waits):
    public.faults.append(None)
    public.fault = "429"
    done = run("--watch")
    assert (done.exit_code, sum(waits), len(segment.kept)) == (2, 600, 1)
    assert "Incomplete: Segment is limiting the rate of questions (429): try again.\n" in done.stderr


# Which question about the last hours gets no answer -> the exit code, and the message.
HALVES = {
    "what it received": (1, 1, "it received an unknown number of events, and dropped 12.\n"),
    "what it dropped": (2, 2, "it received 8 events, the last one at "),
}


@pytest.mark.parametrize(("question", "code", "words"), HALVES.values(), ids=HALVES.keys())
def test_half_of_the_last_hours(run, public, question, code, words):
    public.happened = [Happened("a", 7), Happened("a", 12, "source_disabled", 30)]
    public.faults.extend([None] * question + ["429"])
    done = run()
    assert (done.exit_code, words in done.stdout, "(429)" in done.stderr) == (code, True, True), done.output
    assert ("and dropped an unknown number.\n" in done.stdout) == (question == 2)
    public.faults.extend([None] * question + ["429"])
    halves = report_of(run("--json"))["segment"]["overview"]
    assert [halves["received"] is None, halves["dropped"] is None] == [question == 1, question == 2]


def test_watch_gives_up_after_ten_minutes_in_which_only_other_events_arrive(run, public, waits):
    def sleep(seconds):
        waits.append(seconds)
        public.happened.append(Happened("customerio:email_opened"))

    public.lag = 1000
    public.happened = [Happened("customerio:relay_check", 3)]
    done = run("--watch", sleep=sleep)
    assert (done.exit_code, sum(waits)) == (2, 600)
    assert "After 10 minutes Segment has reported customerio:relay_check neither as received" in done.stderr


def test_watch_counts_the_time_that_questions_take(run, public, clock):
    clock.step = ASK_EVERY + 45  # a minute from one question to the next
    public.lag = 2 + 2 * 4
    done = run("--watch")
    assert "customerio:relay_check was received, reported after 300 s.\n" in done.stdout
    clock.waits.clear()
    public.lag = 1000
    done = run("--watch")
    assert (done.exit_code, clock.waits) == (2, [ASK_EVERY] * 11)  # the first after ten minutes is the last one


def test_watch_asks_again_when_a_question_gets_no_answer(run, public, waits):
    public.faults.extend([None, None, None, "429", "500"])  # sources, and two questions before the event
    done = run("--watch")
    assert (done.exit_code, waits) == (0, [ASK_EVERY] * 3), done.output


def test_watch_says_why_the_last_question_got_no_answer(run, public, segment):
    public.faults.extend([None, None, None])
    public.fault = "429"
    done = run("--watch")
    assert (done.exit_code, len(segment.kept)) == (2, 1)
    assert "The last question got no answer: Segment is limiting the rate" in done.stderr


def test_watch_sends_the_event_even_if_nobody_can_watch(run, public, segment, waits):
    public.business_plan = False
    assert (run("--watch").exit_code, len(segment.kept), waits) == (2, 1, [])
    public.sources.clear()
    assert (run("--watch").exit_code, len(segment.kept), waits) == (1, 2, [])


def test_watch_without_counts_before_the_event_is_incomplete(run, public, segment):
    public.faults.extend([None, "403"])
    done = run("--watch")
    assert (done.exit_code, len(segment.kept), "Incomplete: " in done.stderr) == (2, 1, True)


def test_what_two_questions_say_is_said_once(run, public):
    public.faults.extend([None, "403", "403"])
    assert len(report_of(run("--json"))["incomplete"]) == 1


def test_watch_needs_a_token(run, segment):
    done = run("--watch", SEGMENT_PUBLIC_API_TOKEN=None)
    assert (done.exit_code, segment.requests) == (2, [])
    assert "--watch needs SEGMENT_PUBLIC_API_TOKEN" in done.stderr


def test_a_dry_run_sends_nothing_and_asks_all_the_same(run, segment, app_api, waits):
    app_api.webhooks = []
    done = run("--watch", DRY_RUN="force")
    assert (done.exit_code, segment.requests, waits) == (1, [], [])
    assert "DRY_RUN is on: customerio:relay_check was not sent." in done.stdout
    assert 'the source "Customer.io relay", enabled' in done.stdout


def test_a_dry_run_has_nothing_to_watch(run, public, waits):
    public.fault = "429"
    public.faults.append(None)
    assert (run("--watch", DRY_RUN="force").exit_code, waits) == (2, [])


def test_a_dry_run_without_a_key_has_none_to_look_for(run, public):
    done = run(DRY_RUN="1", SEGMENT_WRITE_KEY=None)
    assert (done.exit_code, public.requests) == (0, [])
    assert "Not checked: which source has the write key: SEGMENT_WRITE_KEY is not set." in done.stdout


def test_json_has_all_of_it(run, public, app_api):
    public.happened = [Happened("a", 12, "source_disabled", 30)]
    app_api.webhooks = [webhook(ADDRESS, ALL[1:], with_content=True)]
    done = run("--json", "--watch")
    report = report_of(done)
    assert (done.exit_code, report["exit_code"], len(report["wrong"]), report["incomplete"]) == (1, 1, 1, [])
    assert report["settings"]["signatures"] == "checked"
    assert report["event"].items() >= {"name": "customerio:relay_check", "sent": True, "taken": True}.items()
    assert report["segment"]["source"] == {"id": "id-customer.io-relay", "name": "Customer.io relay", "enabled": True}
    assert report["segment"]["watch"]["outcome"] == "received"
    (row,) = report["segment"]["overview"]["dropped"]
    assert (row["reason"], row["count"]) == ("source_disabled", 12)
    (hook,) = report["customerio"]["webhooks"]
    assert (hook["address"], hook["events_on"], hook["events_off"]) == (ADDRESS, sorted(ALL[1:]), ALL[:1])
    assert len(hook["warnings"]) == 2


def test_a_word_in_the_place_of_the_signing_key_is_wrong(run):
    done = run(CUSTOMERIO_SIGNING_KEY="Unknown yet")
    assert done.exit_code == 1
    assert "Settings: not in order.\nSignatures: not set up: no webhook is accepted.\n" in done.stdout
    assert "Error: CUSTOMERIO_SIGNING_KEY has a word in place of the key" in done.stderr
    report = report_of(run("--json", CUSTOMERIO_SIGNING_KEY="Unknown yet"))
    assert (report["exit_code"], report["settings"]["set_up"], len(report["wrong"])) == (1, False, 1)


def test_json_of_wrong_settings(run):
    done = run("--json", SEGMENT_WRITE_KEY=None, PORT="x")
    report = report_of(done)
    assert (done.exit_code, report["exit_code"], len(report["settings"]["problems"])) == (1, 1, 2)
    assert (report["event"], report["segment"], report["customerio"]) == (None, None, None)


def test_what_is_wrong_comes_before_what_is_incomplete(run, public, app_api):
    public.fault, app_api.webhooks = "429", []
    done = run("--json")
    report = report_of(done)
    assert (done.exit_code, len(report["wrong"]), len(report["incomplete"])) == (1, 1, 1)
