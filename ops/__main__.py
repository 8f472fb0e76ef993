"""The operator's commands: `python -m ops check | sample | replay | translate`."""

import json
import os
import re
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import TextIO
from uuid import uuid4

import click
import requests

import signature
from config import Config, ConfigError
from dead_letters import file_problem
from delivery import Message, RateLimited, Rejected, RetryLater, fitting
from ops import samples
from segment_client import SegmentClient
from translate import NotAnObject, Undeliverable, parse, translate

ATTEMPTS = 6  # for each upload of a replay, a second apart and then twice as long each time
TIMEOUT = 15  # seconds, for an upload that no webhook waits for

FILE = click.argument("file", type=click.File(encoding="utf-8", errors="surrogateescape"))


@click.group()
def main() -> None:
    """Check the settings, try the relay, and send dead letters again."""


def settings(**instead: str) -> Config:
    """Return the settings of the environment, with `instead` for what a command doesn't need."""
    try:
        return Config.from_env(dict(os.environ) | instead, file_problem)
    except ConfigError as error:
        raise click.ClickException(str(error)) from None


def message_maker(config: Config, segment: SegmentClient) -> Callable[[bytes], Message]:
    """Return the function that does with a webhook's body what the relay does."""
    mapping = config.mapping()
    return lambda body: segment.to_message(translate(parse(body), received=datetime.now(UTC), **mapping))


@main.command()
def check() -> None:
    """Check the settings and send one event to Segment.

    Segment answers 200 to wrong keys, so the last step is yours: look for the event there.
    """
    config = settings()
    click.echo("Settings: in order.")
    for warning in config.warnings:
        click.echo(f"  warning: {warning}")
    click.echo(f"Signatures: {'checked' if config.signing_keys else 'not checked'}.")
    name = config.event_prefix + "relay_check"
    if config.dry_run:
        click.echo(f"DRY_RUN is on: {name} was not sent.")
        return
    segment = SegmentClient(config.segment_write_key, config.segment_host)
    call = {
        "event": name,
        "anonymous_id": "relay_check",
        "message_id": f"customerio-check-{uuid4()}",
        "properties": {"sent_by": "python -m ops check"},
        "context": {},
    }
    started = time.monotonic()
    try:
        segment.upload([segment.to_message(call)], TIMEOUT)
    except (RetryLater, Rejected) as error:
        raise click.ClickException(f"{config.segment_host} did not take the event: {error}.") from None
    click.echo(f"Segment: {config.segment_host} took the event in {(time.monotonic() - started) * 1000:.0f} ms.")
    click.echo(
        f"Now look for {name} in Segment: Connections > Sources > your source > Debugger.\n"
        "If it isn't there within a minute, the write key or the region (SEGMENT_HOST) is another source's."
    )


@main.command()
@click.option("--url", help="The relay's address; by default the one on this machine.")
@click.option("--event", "name", default="email_delivered", show_default=True, help="Any documented event.")
def sample(url: str | None, name: str) -> None:
    """Send a signed sample webhook to a running relay, and print the answer."""
    if name not in samples.EVENTS:
        raise click.BadParameter(f"not one of {', '.join(samples.EVENTS)}", param_hint="--event")
    config = settings(DRY_RUN="1")
    target = (url or f"http://localhost:{config.port}").rstrip("/").removesuffix("/webhook") + "/webhook"
    body = json.dumps(samples.sample(name, str(uuid4()), int(time.time()))).encode()
    headers = {"Content-Type": "application/json"}
    if config.signing_keys:
        headers |= signature.sign(body, str(int(time.time())), config.signing_keys[0])
    try:
        answer = requests.post(target, data=body, headers=headers, timeout=10)
    except requests.RequestException as error:
        raise click.ClickException(f"no answer from {target}: {type(error).__name__}. Is the relay running?") from None
    click.echo(f"{answer.status_code} {answer.text.strip()}")
    if not answer.ok:
        sys.exit(1)


@main.command("translate")
@FILE
def translate_file(file: TextIO) -> None:
    """Print the track calls for the webhooks or dead letters in FILE (- is standard input). Sends nothing."""
    config = settings(DRY_RUN="1")
    to_message = message_maker(config, SegmentClient(config.segment_write_key, config.segment_host))
    failed = 0
    for number, line in enumerate(lines(file), 1):
        try:
            if (body := event_in(line)) is not None:
                click.echo(to_message(body).json)
        except (Undeliverable, NotAnObject) as error:
            failed += 1
            click.echo(f"line {number}: {error}", err=True)
    if failed:
        sys.exit(1)


@main.command()
@FILE
@click.option(
    "--rate", default=500.0, show_default=True, type=click.FloatRange(0, min_open=True), help="Events a second."
)
def replay(file: TextIO, rate: float) -> None:
    """Send what is in FILE (- is standard input) to Segment again.

    FILE has dead letters, or webhooks, one a line; a log with other lines between them is fine.
    Safe to repeat: Segment knows the events by the same messageIds. Segment's own limit is
    1,000 events a second.
    """
    config = settings()
    if config.dry_run:
        raise click.ClickException("DRY_RUN is on: nothing would be sent. `translate` shows what would be.")
    segment = SegmentClient(config.segment_write_key, config.segment_host)
    to_message = message_maker(config, segment)
    failures: dict[int, str] = {}
    found: list[tuple[int, Message]] = []
    others = 0
    for number, line in enumerate(lines(file), 1):
        try:
            body = event_in(line)
            if body is None:
                others += 1
            else:
                found.append((number, to_message(body)))
        except (Undeliverable, NotAnObject) as error:
            failures[number] = str(error)
    sent = 0
    with click.progressbar(length=len(found), label="Replaying", file=sys.stderr) as bar:
        while found:
            started = time.monotonic()
            count = fitting(message for _, message in found)
            batch, found = found[:count], found[count:]
            rejected = send(batch, segment.upload)
            failures |= rejected
            sent += len(batch) - len(rejected)
            bar.update(len(batch))
            time.sleep(max(0.0, len(batch) / rate - (time.monotonic() - started)))
    for number, reason in sorted(failures.items()):
        click.echo(f"line {number}: {reason}", err=True)
    click.echo(f"{sent} sent, {len(failures)} not sent, {others} other lines.")
    if failures:
        sys.exit(1)


def lines(file: TextIO) -> list[str]:
    """Return the lines of a file, or all of it if it is one event that somebody has laid out."""
    text = file.read()
    try:
        parse(text.encode("utf-8", "surrogateescape"))
    except (NotAnObject, Undeliverable):
        return text.removesuffix("\n").split("\n")
    return [text]


def event_in(line: str) -> bytes | None:
    """Return the body of the webhook in a line: a dead letter's, or the line itself; None if it has neither.

    A dead letter may stand behind what a log puts in front of it.
    """
    text = line.strip()
    if found := re.search(r'\{ ?"event": ?', text):
        try:
            letter = json.loads(text[found.start() :])
            event = letter["event"]
            # What could not be parsed was kept as it came.
            return (event if isinstance(event, str) else json.dumps(event)).encode("utf-8", "surrogatepass")
        except (ValueError, KeyError, RecursionError):
            raise NotAnObject("a dead letter that is not whole") from None
    if not (text.startswith("{") and text.endswith("}")):
        return None
    body = text.encode("utf-8", "surrogateescape")
    try:
        event = parse(body)
    except Undeliverable:
        return body
    return body if {"event_type", "metric", "event_id", "data"} & set(event) else None


def send(batch: list[tuple[int, Message]], upload: Callable[[list[Message], float], None]) -> dict[int, str]:
    """Upload a batch; return the reasons, by line number, for what Segment did not take."""
    reason = ""
    for attempt in range(ATTEMPTS):
        try:
            upload([message for _, message in batch], TIMEOUT)
            return {}
        except Rejected as error:
            if len(batch) == 1:
                return {batch[0][0]: str(error)}
            middle = len(batch) // 2
            return send(batch[:middle], upload) | send(batch[middle:], upload)
        except RetryLater as error:
            reason = str(error)
            if attempt < ATTEMPTS - 1:
                time.sleep(error.retry_after if isinstance(error, RateLimited) else 2.0**attempt)
    return {number: reason for number, _ in batch}


if __name__ == "__main__":
    main(prog_name="python -m ops")
