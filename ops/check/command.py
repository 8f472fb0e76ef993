"""The command `check`: the settings, one event to Segment, and what Segment and Customer.io say about it."""

import json
import os
import sys
from collections.abc import Mapping
from functools import partial

import click

from config import KEYS, NOT_SET_UP, Config, ConfigError
from ops import settings
from ops.check import customerio_api, segment_api
from ops.check.ask import Api, answered
from ops.check.customerio import check_webhook
from ops.check.event import send_event
from ops.check.part import Part, Report
from ops.check.segment import check_last_hours, check_source
from ops.check.text import as_text
from ops.check.watch import Watch
from ops.timing import Timing, pass_timing
from relay.key_check import check_call
from server import preflight


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--watch", is_flag=True, help="Ask until Segment reports the event as received or dropped: minutes.")
@click.option("--url", callback=lambda _context, _option, value: web_address(value), help="The relay's public address.")
@click.option("--customerio-eu", is_flag=True, help="Ask Customer.io's EU region.")
@pass_timing
def check(timing: Timing, as_json: bool, watch: bool, url: str | None, customerio_eu: bool) -> None:
    """Check the settings, send one event to Segment, and ask both ends about it.

    Segment answers 200 to wrong keys. With SEGMENT_PUBLIC_API_TOKEN set, its Public API says which
    source has the write key, and what it dropped. With CUSTOMERIO_APP_API_KEY set, Customer.io's
    App API says what the webhook sends. Both only read. The relay itself needs neither.

    Exit code 1: something is wrong. 2: nothing is known to be wrong, but an end could not be
    asked. 0: everything that could be checked is right.
    """
    if watch and not os.environ.get(segment_api.TOKEN, "").strip():
        raise click.UsageError(f"--watch needs {segment_api.TOKEN}.")
    report = examine(os.environ, url, customerio_eu, watch, timing)
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


def examine(env: Mapping[str, str], url: str | None, customerio_eu: bool, watch: bool, timing: Timing) -> Report:
    """Do all checks. Nothing in the report is a key, a token or a webhook."""
    try:
        config = Config.from_env(env, partial(preflight.file_problem, create=False), KEYS, preflight.bundle_problem)
    except ConfigError as error:
        return put_together(Part({"problems": error.problems}, [settings.wrong(error)]))
    if problem := preflight.open_files_problem():
        return put_together(Part({"problems": [problem]}, [problem]))
    segment = segment_api.from_env(env, config.segment_host, timing.answer)
    customerio = customerio_api.from_env(env, customerio_eu, timing.answer)
    call = check_call(config.event_prefix, config.event_names)

    source, source_part = check_source(segment, config.segment_write_key)
    watching, no_watch = None, list[str]()
    if segment and source and watch and not config.dry_run:
        watching, no_watch = answered(lambda: Watch(segment, source, call["event"], timing))
    event = send_event(config, call, timing)
    watched = watching.wait() if watching and event.found["taken"] else Part(incomplete=no_watch)
    last_hours = check_last_hours(segment, source) if segment and source else NOTHING
    return put_together(
        check_settings(config, [api for api in (segment, customerio) if api]),
        source_part,
        event,
        watched,
        last_hours,
        check_webhook(customerio, url),
    )


NOTHING = Part()


def put_together(
    settings: Part,
    source: Part = NOTHING,
    event: Part = NOTHING,
    watch: Part = NOTHING,
    last_hours: Part = NOTHING,
    webhook: Part = NOTHING,
) -> Report:
    """Return the report that the parts make."""
    parts = (settings, source, event, watch, last_hours, webhook)
    wrong = [sentence for part in parts for sentence in part.wrong]
    incomplete = [sentence for part in parts for sentence in part.incomplete]
    return {
        "exit_code": 1 if wrong else 2 if incomplete else 0,
        "wrong": wrong,
        "incomplete": list(dict.fromkeys(incomplete)),  # two questions may fail alike
        "not_checked": [sentence for part in parts for sentence in part.not_checked],
        "settings": settings.found,
        "event": event.found,
        "segment": source.found and source.found | {"watch": watch.found, "overview": last_hours.found},
        "customerio": webhook.found,
    }


def check_settings(config: Config, apis: list[Api]) -> Part:
    """Return what there is to say about settings with which the relay starts."""
    found = {
        "problems": [],
        "warnings": [
            *(warning for warning in config.warnings if warning != NOT_SET_UP),  # it is wrong
            *(
                f"{api.url_setting} is not https: {api.token_setting} is sent in clear text."
                for api in apis
                if api.in_clear_text
            ),
        ],
        "set_up": not config.not_set_up,
        "signatures": config.signatures,
        "dry_run": config.dry_run,
        "segment_host": config.segment_host,
    }
    return Part(found, [NOT_SET_UP] if config.not_set_up else [])
