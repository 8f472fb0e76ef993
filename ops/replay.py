"""The commands `replay` and `translate`, which read a file of webhooks and dead letters."""

import os
import sys
from contextlib import nullcontext
from datetime import UTC, datetime
from typing import Any, TextIO

import click

from config import MAPPING
from ops import settings
from ops.found import Found, find
from ops.rest import place_for_rest
from ops.sending import Number, Sender
from ops.timing import Timing, pass_timing
from relay.key_check import check_call
from relay.message import Message, to_message
from relay.outcomes import RetryLater
from relay.segment import SegmentClient
from translate import Untranslatable, parse, translate

FILE = click.argument("file", type=click.File(encoding="utf-8-sig", errors="surrogateescape"))


@click.command("translate")
@FILE
def translate_file(file: TextIO) -> None:
    """Print the track calls for the webhooks or dead letters in FILE (- is standard input). Sends nothing."""
    mapping = settings.read(MAPPING).mapping()
    found, _ = find(file.read())
    failed = 0
    for item in found:
        try:
            click.echo(message_of(item, mapping).json)
        except (Untranslatable, Unreadable) as error:
            failed += 1
            click.echo(f"{item.place}: {error}", err=True)
    end(found, failed)


@click.command()
@FILE
@click.option(
    "--rate", default=500.0, show_default=True, type=click.FloatRange(0, min_open=True), help="Events a second."
)
@click.option("--failed", type=click.Path(dir_okay=False), help="Where to write what could not be sent, as it stood.")
@pass_timing
def replay(timing: Timing, file: TextIO, rate: float, failed: str | None) -> None:
    """Send what is in FILE (- is standard input) to Segment again.

    FILE has dead letters or webhooks: one a line, pretty-printed, or in a JSON array; a log with
    other lines between them is fine. The parts of a long dead letter are put together. Safe to
    repeat: Segment knows the events by the same messageIds. Segment's own limit is 1,000 events a
    second.
    """
    way = [name for name in os.environ if name.lower().endswith("_proxy") or name.endswith("_CA_BUNDLE")]
    config = settings.read((*MAPPING, "SEGMENT_HOST", "DRY_RUN", *way), "SEGMENT_WRITE_KEY")
    if config.dry_run:
        raise click.ClickException("DRY_RUN is on: nothing would be sent. `translate` shows what would be.")
    segment = SegmentClient(config.segment_write_key, config.segment_host, config.proxy, config.ca_bundle)
    check = to_message(check_call(config.event_prefix, config.event_names))
    found, others = find(file.read())
    with place_for_rest(failed, file) if failed else nullcontext() as keep:  # before anything is sent
        ready, failures = messages_of(found, config.mapping())
        left = {position for position, _ in ready}
        stopped = ""
        # `update_min_steps=0` shows what it waits for, too.
        with click.progressbar(
            length=len(ready),
            label="Replaying",
            file=sys.stderr,
            item_show_func=lambda words: words,
            update_min_steps=0,
        ) as bar:
            sender = Sender(segment, check, timing, say=lambda words: bar.update(0, words))
            try:
                for position, reason in sender.send(ready, rate):
                    left.remove(position)
                    if reason:
                        failures[position] = reason
                    bar.update(1, "")
            except RetryLater as error:
                stopped = f"Stopped: {error}. Nothing else would be taken either, so it was not tried."
        for position, reason in sorted(failures.items()):
            click.echo(f"{found[position].place}: {reason}", err=True)
        if stopped:
            click.echo(stopped, err=True)
            failures |= dict.fromkeys(left, "")
        if keep:
            keep(found[position].text for position in sorted(failures))
    click.echo(f"{len(found) - len(failures)} sent, {len(failures)} not sent, {others} other lines.")
    end(found, len(failures))


def end(found: list[Found], failed: int) -> None:
    """Exit with an error if something failed, or nothing was found."""
    if not found:
        click.echo("There is no webhook and no dead letter in it.", err=True)
    if failed or not found:
        sys.exit(1)


def messages_of(found: list[Found], mapping: dict[str, Any]) -> tuple[list[tuple[Number, Message]], dict[Number, str]]:
    """Return the messages, each with the position of what it is made from, and why the others have none."""
    messages, failures = [], {}
    for position, item in enumerate(found):
        try:
            messages.append((position, message_of(item, mapping)))
        except (Untranslatable, Unreadable) as error:
            failures[position] = str(error)
    return messages, failures


class Unreadable(Exception):
    """What is found in a file isn't a whole event."""


def message_of(item: Found, mapping: dict[str, Any]) -> Message:
    """Return the message that the relay makes of it; raise Untranslatable or Unreadable."""
    if item.problem:
        raise Unreadable(item.problem)
    return to_message(translate(parse(item.body), received=datetime.now(UTC), **mapping))
