"""The command `check`: the settings, one event to Segment, and what Segment and Customer.io say about it."""

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any

import click
import requests

from config import KEYS, NOT_SET_UP, Config, ConfigError
from ops.check import ask, customerio_api, segment_api
from ops.check.ask import Api, NoAnswer, NotNow
from ops.check.customerio_api import SUBSCRIBABLE, Subscription
from ops.check.segment_api import DROPPED, RECEIVED
from relay.key_check import check_call
from relay.message import to_message
from relay.outcomes import Rejected, RetryLater
from relay.segment import SegmentClient
from server import preflight

TIMEOUT = 15  # seconds, for an upload that no webhook waits for
SPAN = timedelta(hours=4)  # the most that Segment reports by the minute
ASK_EVERY = 15  # seconds
ASK_FOR = 600  # seconds
SHOWN = 100  # characters of a name from outside

Report = dict[str, Any]


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--watch", is_flag=True, help="Ask until Segment reports the event as received or dropped: minutes.")
@click.option("--url", callback=lambda _context, _option, value: web_address(value), help="The relay's public address.")
@click.option("--customerio-eu", is_flag=True, help="Ask Customer.io's EU region.")
@click.pass_obj
def check(env: dict[str, str], as_json: bool, watch: bool, url: str | None, customerio_eu: bool) -> None:
    """Check the settings, send one event to Segment, and ask both ends about it.

    Segment answers 200 to wrong keys. With SEGMENT_PUBLIC_API_TOKEN set, its Public API says which
    source has the write key, and what it dropped. With CUSTOMERIO_APP_API_KEY set, Customer.io's
    App API says what the webhook sends. Both only read. The relay itself needs neither.

    Exit code 1: something is wrong. 2: nothing is known to be wrong, but an end could not be
    asked. 0: everything that could be checked is right.
    """
    if watch and not env.get(segment_api.TOKEN, "").strip():
        raise click.UsageError(f"--watch needs {segment_api.TOKEN}.")
    report = examine(env, url, customerio_eu, watch)
    if as_json:
        click.echo(json.dumps(report, indent=2))
    else:
        for line in as_text(report):
            click.echo(line)
        for problem in report["wrong"]:
            click.echo(f"Error: {problem}", err=True)
        for problem in report["incomplete"]:
            click.echo(f"Incomplete: {problem}", err=True)
    sys.exit(report["exit_code"])


def web_address(url: str | None) -> str | None:
    if url is not None and not customerio_api.address(url):
        raise click.BadParameter("an address like https://relay.example.com")
    return url


def pause(seconds: float) -> None:
    time.sleep(seconds)


def examine(env: dict[str, str], url: str | None, customerio_eu: bool, watch: bool) -> Report:
    """Do all checks. Nothing in the report is a key, a token or a webhook."""
    report: Report = {
        "exit_code": 0,
        "wrong": [],  # sentences
        "incomplete": [],  # the same
        "not_checked": [],  # the same
        "settings": None,
        "event": None,
        "segment": None,
        "customerio": None,
    }
    config = check_settings(env, report)
    if config:
        segment = segment_api.from_env(env, config.segment_host)
        customerio = customerio_api.from_env(env, customerio_eu)
        report["settings"]["warnings"] += [
            f"{api.url_setting} is not https: {api.token_setting} is sent in clear text."
            for api in (segment, customerio)
            if api and api.in_clear_text
        ]
        check_segment(config, segment, watch, report)
        check_customerio(customerio, url, report)
    report["exit_code"] = 1 if report["wrong"] else 2 if report["incomplete"] else 0
    return report


def check_settings(env: dict[str, str], report: Report) -> Config | None:
    """Return the settings, if they are in order."""
    try:
        config = Config.from_env(env, partial(preflight.file_problem, create=False), KEYS, preflight.bundle_problem)
    except ConfigError as error:
        report["settings"] = {"problems": error.problems}
        report["wrong"].append(wrong_settings(error))
        return None
    if problem := preflight.open_files_problem():
        report["settings"] = {"problems": [problem]}
        report["wrong"].append(problem)
        return None
    report["settings"] = {
        "problems": [],
        "warnings": [warning for warning in config.warnings if warning != NOT_SET_UP],  # it is wrong
        "set_up": not config.not_set_up,
        "signatures": config.signatures,
        "dry_run": config.dry_run,
        "segment_host": config.segment_host,
    }
    if config.not_set_up:
        report["wrong"].append(NOT_SET_UP)
    return config


def wrong_settings(error: ConfigError) -> str:
    """Return what a command says of settings with which the relay would not start."""
    return "The settings are wrong:" + error.listed


def check_segment(config: Config, api: Api | None, watch: bool, report: Report) -> None:
    """Send an event, and ask Segment what it makes of the source's events."""
    call = check_call(config.event_prefix, config.event_names)
    watched = None
    source = api and ask_for_source(config, api, report)
    if api and source and watch and not config.dry_run:
        with noted(report):
            watched = Watch(api, source, call["event"])
    if send_event(config, call, report) and watched:
        report["segment"]["watch"] = watched.wait(report)
    if api and source:
        report["segment"]["overview"] = last_hours(api, source, report)
    if not api:
        report["not_checked"].append(
            f"which source has the write key, and what Segment dropped. Set {segment_api.TOKEN} to know."
        )


@contextmanager
def noted(report: Report) -> Iterator[None]:
    """Note in the report that a question got no answer."""
    try:
        yield
    except NoAnswer as error:
        if f"{error}." not in report["incomplete"]:
            report["incomplete"].append(f"{error}.")


def ask_for_source(config: Config, api: Api, report: Report) -> str | None:
    """Return the id of the source that has the write key."""
    if not config.segment_write_key:  # in a dry run
        report["not_checked"].append("which source has the write key: SEGMENT_WRITE_KEY is not set.")
        return None
    end: Report = {"asked": api.shown, "key_in_a_source": None, "source": None, "watch": None, "overview": None}
    report["segment"] = end
    with noted(report):
        source = segment_api.find_source(api, config.segment_write_key)
        end["key_in_a_source"] = bool(source)
        if source:
            end["source"] = {"id": source.id, "name": printable(source.name), "enabled": source.enabled}
            if not source.enabled:
                report["wrong"].append("The source is disabled: Segment drops its events. Enable it in Segment.")
            return source.id
        report["wrong"].append(
            f"No source has SEGMENT_WRITE_KEY, says {api.url}: Segment answers 200, and drops every event. Copy "
            "the key again. If it is right, then SEGMENT_HOST is the wrong region, or "
            f"{segment_api.TOKEN} belongs to another workspace."
        )
    return None


def send_event(config: Config, call: dict[str, Any], report: Report) -> bool:
    """Send the event, unless in a dry run; return whether Segment took it."""
    report["event"] = event = {"name": call["event"], "sent": not config.dry_run, "taken": False, "milliseconds": None}
    if config.dry_run:
        return False
    segment = SegmentClient(config.segment_write_key, config.segment_host, config.proxy, config.ca_bundle)
    messages = [to_message(call)]
    started = time.monotonic()
    try:
        # upload() itself ends whatever takes too long, but only the relay, where gevent runs, can end a look-up.
        ask.within(TIMEOUT, lambda: segment.upload(messages, TIMEOUT))
    except requests.Timeout:
        late = f"Segment did not answer in time ({TIMEOUT} s)"
        report["wrong"].append(f"{config.segment_host} did not take the event: {late}.")
    except (RetryLater, Rejected) as error:
        report["wrong"].append(f"{config.segment_host} did not take the event: {error}{more(error, config)}.")
    else:
        event |= {"taken": True, "milliseconds": round((time.monotonic() - started) * 1000)}
    return bool(event["taken"])


def more(error: RetryLater | Rejected, config: Config) -> str:
    """Return what an upload's error doesn't say."""
    if isinstance(error, Rejected) and not error.by_segment:
        return ". The event has no fault, so what answered is not Segment: check SEGMENT_HOST and proxies"
    if isinstance(error, Rejected):
        return (
            ". The event has no fault, so the write key has: it is far too short. Copy SEGMENT_WRITE_KEY again from "
            "Segment: your source > Settings > API Keys"
        )
    if error.reason == "timeout":
        return f" ({TIMEOUT} s)"
    if error.reason == "connection":
        return f": {ask.look(config.segment_host) or 'but something answers there, so try again'}"
    return ""


def last_hours(api: Api, source: str, report: Report) -> Report | None:
    """Return what Segment received and dropped in the last four hours, None for what it doesn't say."""
    until = datetime.now(UTC)
    since = until - SPAN
    received = dropped = None
    with noted(report):
        received = segment_api.overview(api, RECEIVED, source, since, until)
    with noted(report):
        dropped = segment_api.overview(api, DROPPED, source, since, until, "discardReason")
    if dropped:
        report["wrong"].append(
            f"Segment dropped {sum(row.total for row in dropped):,} events of the last four hours after its 200. "
            "Customer.io doesn't send them again."
        )
    if received is None and dropped is None:
        return None
    return {
        "since": iso(since),
        "until": iso(until),
        "received": None if received is None else sum(row.total for row in received),
        "last_received": iso(max((row.last for row in received or () if row.last), default=None)),
        "dropped": dropped
        and [
            {
                "reason": printable(row.name) or "unknown",
                "count": row.total,
                "last": iso(row.last),
                "meaning": segment_api.meaning(row.name),
            }
            for row in dropped
        ],
    }


def iso(time: datetime | None) -> str | None:
    return time.isoformat(timespec="seconds") if time else None


def pauses() -> Iterator[None]:
    """Pause before each further question, for ten minutes."""
    started = time.monotonic()
    for _ in range(ASK_FOR // ASK_EVERY):
        pause(ASK_EVERY)
        yield
        if time.monotonic() - started > ASK_FOR:
            return


class Watch:
    """Waits until Segment reports one more event of a name than before: received, or dropped."""

    def __init__(self, api: Api, source: str, name: str):
        self._api, self._source, self._name = api, source, name
        self._before = self._first_counts()

    def wait(self, report: Report) -> Report:
        """Return what became of the event and after how many seconds."""
        click.echo(f"Waiting for Segment's report of {self._name}, up to {ASK_FOR // 60} minutes ...", err=True)
        started = time.monotonic()
        outcome = problem = ""
        for _ in pauses():
            try:
                outcome, problem = self._outcome(), ""
            except NoAnswer as error:  # the next question may be answered
                problem = f" The last question got no answer: {error}."
            if outcome:
                break
        if not outcome:
            report["incomplete"].append(
                f"After {ASK_FOR // 60} minutes Segment has reported {self._name} neither as received nor as dropped."
                + problem
            )
        if outcome == "dropped":
            report["wrong"].append(f"Segment dropped {self._name}, the event of this check, after its 200.")
        return {"outcome": outcome or "no report", "seconds": round(time.monotonic() - started)}

    def _first_counts(self) -> dict[str, int]:
        """Return the counts before the event, which can't be told afterwards."""
        further = pauses()
        while True:
            # Earlier minutes may have a check event that Segment hasn't reported yet.
            self._since = datetime.now(UTC).replace(second=0, microsecond=0)
            try:
                return self._counts()
            except NotNow as error:
                click.echo(f"{error}. The event waits, up to {ASK_FOR // 60} minutes ...", err=True)
                if next(further, "over") == "over":
                    raise

    def _outcome(self) -> str:
        counts = self._counts()
        outcomes = {DROPPED: "dropped", RECEIVED: "received"}
        return next((word for kind, word in outcomes.items() if counts[kind] > self._before[kind]), "")

    def _counts(self) -> dict[str, int]:
        until = datetime.now(UTC)
        start = self._since - timedelta(hours=1)  # a fixed one, so that counts only grow
        return {
            kind: sum(
                row.total - sum(count for minute, count in row.minutes if minute < self._since)
                for row in segment_api.overview(self._api, kind, self._source, start, until, "eventName")
                if row.name == self._name
            )
            for kind in (RECEIVED, DROPPED)
        }


def check_customerio(api: Api | None, url: str | None, report: Report) -> None:
    """Ask Customer.io about the webhook that goes to this relay."""
    if not api:
        report["not_checked"].append(f"the webhook in Customer.io. Set {customerio_api.TOKEN} to know.")
        return
    end: Report = {"asked": api.shown, "webhooks": []}
    report["customerio"] = end
    with noted(report):
        webhooks = customerio_api.list_subscriptions(api)
        ours = [webhook for webhook in webhooks if customerio_api.is_relay(webhook, url)]
        addresses = {customerio_api.address(webhook.endpoint) for webhook in ours}
        if len(addresses) > 1:
            raise NoAnswer(f"Several webhooks could be this relay's: name its address with --url{listed(ours)}")
        if not ours:
            wanted = f"goes to {customerio_api.target(url)}" if url else "has an address that ends in /webhook"
            report["wrong"].append(f"No reporting webhook in Customer.io {wanted}{listed(webhooks)}.")
        if len(ours) > 1:
            target = printable(addresses.pop())
            report["wrong"].append(f"{len(ours)} webhooks go to {target}: events may arrive twice. Keep one.")
        end["webhooks"] = [described(webhook) for webhook in ours]
        for webhook in end["webhooks"]:
            if not webhook["enabled"]:
                report["wrong"].append(f'The webhook "{webhook["name"]}" is disabled: enable it in Customer.io.')


def listed(webhooks: list[Subscription]) -> str:
    hosts = {customerio_api.origin(webhook.endpoint) for webhook in webhooks} - {""}
    return f". There are {', '.join(map(printable, sorted(hosts)))}" if hosts else ". There is none at all"


def described(webhook: Subscription) -> Report:
    """Return the report of a webhook, with what may be unintended about it."""
    off = customerio_api.events_off(webhook)
    warnings = []
    if webhook.events is None:
        warnings.append("Customer.io doesn't say which events are on: see Integrations > Reporting Webhooks.")
    elif not webhook.events:
        warnings.append("No event is on: it sends nothing.")
    elif off:
        warnings.append(f"These events are off: {grouped(off)}.")
    if webhook.first_only:
        warnings.append("Only the first open and click of a message are sent, not every one.")
    if webhook.with_content:
        warnings.append(
            "Body Content is on: whole messages go to Segment, which takes 32 KB an event. The relay cuts larger ones."
        )
    return {
        "name": printable(webhook.name),
        "address": printable(customerio_api.address(webhook.endpoint)),
        "enabled": webhook.enabled,
        "every_occurrence": not webhook.first_only,
        "body_content": webhook.with_content,
        "events_on": None if webhook.events is None else [printable(name) for name in webhook.events],
        "events_off": off,
        "warnings": warnings,
    }


def grouped(events: list[str]) -> str:
    """List events, whole channels by their name."""
    missing = {channel for name, channel in SUBSCRIBABLE.items() if name not in events}
    whole = [f"all of {channel}" for channel in dict.fromkeys(SUBSCRIBABLE.values()) if channel not in missing]
    return ", ".join(whole + [name for name in events if SUBSCRIBABLE.get(name, "") in {*missing, ""}])


def printable(text: str) -> str:
    """Return a text from outside as a terminal can take it."""
    return "".join(character if character.isprintable() else "?" for character in text[:SHOWN])


def as_text(report: Report) -> list[str]:
    """Say the report in lines, without the errors."""
    settings = report["settings"]
    if settings["problems"]:
        return []
    lines = [
        "Settings: in order." if settings["set_up"] else "Settings: not in order.",
        *(f"  warning: {warning}" for warning in settings["warnings"]),
    ]
    lines.append(f"Signatures: {settings['signatures']}.")
    lines += [*event_lines(report), *segment_lines(report), *customerio_lines(report)]
    return lines + [f"Not checked: {sentence}" for sentence in report["not_checked"]] + last_lines(report)


def event_lines(report: Report) -> list[str]:
    event = report["event"]
    if not event["sent"]:
        return [f"DRY_RUN is on: {event['name']} was not sent."]
    host = report["settings"]["segment_host"]
    return [f"Segment: {host} took the event in {event['milliseconds']} ms."] if event["taken"] else []


def segment_lines(report: Report) -> list[str]:
    end = report["segment"]
    if not end or not end["source"]:
        return []
    source, overview, watch = end["source"], end["overview"], end["watch"]
    state = "enabled" if source["enabled"] else "DISABLED"
    lines = [f'Segment: the write key is of the source "{source["name"]}", {state}.']
    if watch and watch["outcome"] != "no report":
        lines.append(f"Segment: {report['event']['name']} was {watch['outcome']}, reported after {watch['seconds']} s.")
    if not overview:
        return lines
    last = f", the last one at {clock(overview['last_received'])}" if overview["last_received"] else ""
    received = "an unknown number of" if overview["received"] is None else f"{overview['received']:,}"
    rows = overview["dropped"]
    dropped = "an unknown number" if rows is None else f"{sum(row['count'] for row in rows):,}"
    lines.append(
        f"Segment: from {clock(overview['since'])} to {clock(overview['until'])} UTC it received "
        f"{received} events{last}, and dropped {dropped}."
    )
    if rows:
        width = max(6, *(len(row["reason"]) for row in rows))
        lines.append(f"  {'Dropped':>9}  Last   {'Reason':{width}}  Meaning")
        for row in rows:
            lines.append(f"  {row['count']:>9,}  {clock(row['last']):5}  {row['reason']:{width}}  {row['meaning']}")
    return lines


def customerio_lines(report: Report) -> list[str]:
    lines = []
    for webhook in (report["customerio"] or {"webhooks": ()})["webhooks"]:
        state = "enabled" if webhook["enabled"] else "DISABLED"
        lines.append(f'Customer.io: the webhook "{webhook["name"]}" goes to {webhook["address"]}, {state}.')
        on = webhook["events_on"]
        lines.append(f"  on: {'unknown' if on is None else grouped(on) or 'nothing'}")
        lines += [f"  warning: {warning}" for warning in webhook["warnings"]]
    return lines


def last_lines(report: Report) -> list[str]:
    """Say what is left to do by hand."""
    known = report["segment"] and report["segment"]["key_in_a_source"] is not None
    if known or not report["event"]["taken"]:
        return []
    return [
        f"Now look for {report['event']['name']} in Segment: Connections > Sources > your source > Debugger.",
        "If it isn't there within a minute, the write key or the region (SEGMENT_HOST) is another source's.",
    ]


def clock(time: str | None) -> str:
    """Return hours and minutes of what iso() returned."""
    return time[11:16] if time else ""
