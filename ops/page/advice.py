"""Says what is wrong now, what was, and what is still to do before events flow. Pure."""

import ipaddress
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from config import KEY_PAGE, WEBHOOK_PAGE, Config
from ops.monitor.metrics import Tally
from relay.outcomes import (
    DEAD_LETTERED,
    DELIVERED,
    DRY_RUN,
    OUTCOMES,
    REASONS,
    REJECTED,
    RETRIED,
    UNAUTHORIZED,
    Outcome,
)

LATELY = 5  # minutes
FLOOD = 5  # dead letters in that time, and a tenth of all webhooks

ADD_WEBHOOK = "Customer.io: Integrations > Reporting Webhooks > Add"

COMES_BACK = "Nothing is lost: Customer.io sends them again, for seven days."
WAIT = f"{COMES_BACK} If it lasts, look at status.segment.com."
NEW_KEY = f"Copy the write key again from {KEY_PAGE}; set SEGMENT_WRITE_KEY and restart. {COMES_BACK}"

# What to do about webhooks that got a 503, by reason.
REMEDIES = {
    "write_key": NEW_KEY,
    "every_event": f"{NEW_KEY} The first events became dead letters; `python -m ops replay` sends them again.",
    "not_segment": f"Set SEGMENT_HOST to Segment's address, look for a proxy in between, and restart. {COMES_BACK}",
    "redirect": f"Set SEGMENT_HOST to Segment's address and restart. {COMES_BACK}",
    # Segment has no other 4xx; 408 passes.
    **{
        f"segment_{status}": f"Set SEGMENT_HOST to Segment's address and restart. {COMES_BACK}"
        for status in range(400, 500)
        if status != 408
    },
    "dead_letter": f"Make room on the disk, or set DEAD_LETTER_FILE to a file that can be written. {COMES_BACK}",
    "not_set_up": f"Copy the signing key from {WEBHOOK_PAGE}; set CUSTOMERIO_SIGNING_KEY and restart. {COMES_BACK}",
    "internal": f"The log says where: please report it. {COMES_BACK}",
    "body": "Look at the network and the proxy between Customer.io and the relay.",
    "busy": "Turn Body Content off in Customer.io, or run more workers (WEB_CONCURRENCY).",
}
# Anybody can cause these.
STRANGERS = {(RETRIED.label, "body"), (RETRIED.label, "busy"), (REJECTED.label, "too_large")} | {
    (UNAUTHORIZED.label, reason) for reason in REASONS[UNAUTHORIZED.label]
}
FORGOTTEN = 60  # minutes after the last one

NOT_DELIVERING_AFTER = 300  # seconds

SIGNING = (
    f"If they are Customer.io's: copy the signing key from {WEBHOOK_PAGE}; set CUSTOMERIO_SIGNING_KEY and restart. "
    "Customer.io then sends them again: nothing is lost within seven days."
)
DEAD_LETTERS = (
    "They are kept whole, {place}. `python -m ops translate` says what is wrong with each; "
    "`python -m ops replay` sends them again."
)
TOO_LARGE = "Turn Body Content off in Customer.io: until the webhook fits, all later ones wait behind it."

TITLES = {outcome.label: outcome.title for outcome in OUTCOMES}

# Besides what ipaddress calls private.
PRIVATE_NAMES = ("localhost", "local", "internal", "lan", "home", "arpa", "test")


class Trouble(NamedTuple):
    """Something that is wrong now."""

    outcome: str
    reason: str  # "" for a flood of dead letters
    words: str
    remedy: str


class Step(NamedTuple):
    """Something to do before events flow: what is done, or else how."""

    title: str
    done: bool
    words: str


class Progress(NamedTuple):
    """What has been seen of the way to a live relay."""

    refused: bool  # Segment refuses the write key now
    reachable: bool  # Customer.io could reach the address at which the reader sees the page
    genuine: str  # says when the first genuine webhook came; "" if none has
    delivered: str  # says when the last event arrived; "" if none has


class Health(NamedTuple):
    """What the counts say."""

    failures: list[Tally]  # retried, unauthorized, rejected and dead_lettered
    successes: list[Tally]  # delivered and dry_run
    ignored: list[Tally]
    per_minute: dict[str, list[float]]
    failing_since: dict[str, float]  # each of metrics.FAILING, without a success since; unix seconds, 0 if it doesn't


def wrong_now(health: Health, now: float, letters_in: str) -> list[Trouble]:
    """Return what is wrong at `now`, in unix seconds. `letters_in` says where dead letters are."""
    found = [
        Trouble(failure.outcome, failure.reason, _said(failure), _remedy(failure))
        for failure in health.failures
        if _lasts(failure, health, now)
    ]
    return found + _flood(health, letters_in)


def not_delivering(health: Health, now: float, config: Config) -> str:
    """Say why webhooks have not been delivered for five minutes; "" if they are, or if none came.

    A single forged signature is no reason, but those that have come for five minutes without a
    genuine one are: that is what a wrong signing key looks like from here.
    """
    if config.dry_run:
        return "DRY_RUN is on: nothing is sent to Segment"
    if config.not_set_up:
        return REASONS[RETRIED.label]["not_set_up"]
    retried = (
        failure
        for failure in health.failures
        if failure.outcome == RETRIED.label and (RETRIED.label, failure.reason) not in STRANGERS
    )
    unauthorized = (failure for failure in health.failures if failure.outcome == UNAUTHORIZED.label)
    since = health.failing_since
    for failure in retried:
        what = failure.reason if failure.reason in since else RETRIED.label
        if since[what] and now - since[what] >= NOT_DELIVERING_AFTER:
            return failure.words
    for failure in unauthorized:
        if since[UNAUTHORIZED.label] and failure.last - since[UNAUTHORIZED.label] >= NOT_DELIVERING_AFTER:
            return failure.words
    return ""


def over(health: Health, now: float) -> list[tuple[str, Tally]]:
    """Return what was wrong in the last day and is not now, in words, the latest first."""
    return [
        (f"{TITLES[failure.outcome].capitalize()}: {failure.words}", failure)
        for failure in health.failures
        if not _lasts(failure, health, now) and now - failure.last < 86_400
    ]


def delay(health: Health) -> str:
    """Say how long ago events happened when they are delivered, on average; "" if none was lately."""
    delivered = sum(health.per_minute[DELIVERED.label][-LATELY:])
    if not delivered:
        return ""
    seconds = sum(health.per_minute["age"][-LATELY:]) / delivered
    behind = ": Customer.io held them back, and is catching up" if seconds > 900 else ""
    return f"Events arrive {duration(seconds)} after they happen{behind}."


def duration(seconds: float) -> str:
    """Say a length of time in its largest unit."""
    for size, name in ((86_400, "day"), (3_600, "hour"), (60, "minute"), (1, "second")):
        if seconds >= size:
            number = int(seconds // size)
            return f"{number} {name}{'s' if number > 1 else ''}"
    return "less than a second"


def steps(config: Config, seen: Progress) -> list[Step]:
    """Return the steps from a dry run to a live relay, in README.md's order."""
    keyed = bool(config.segment_write_key) and not seen.refused
    write_key_next = f"Segment refuses this one. {NEW_KEY}" if seen.refused else f"Copy it from {KEY_PAGE}."
    write_key = Step("Write key", keyed, "SEGMENT_WRITE_KEY is set." if keyed else write_key_next)
    last = _last_step(config.dry_run, seen.delivered)
    signed = bool(config.signing_keys)
    if not (signed or config.not_set_up or config.dry_run):
        # Strangers read the page of a live relay; don't tell them that signatures aren't checked.
        return [write_key, last]
    address_next = (
        f"Deploy the relay, or open a tunnel (`cloudflared tunnel --url http://localhost:{config.port}`), and open "
        "this page at its address: this one is private."
    )
    if seen.reachable:
        address_next = f"Give it to Customer.io: {ADD_WEBHOOK}. The first genuine webhook shows that it is right."
    signing_key_next = (
        f"{ADD_WEBHOOK}, with the address above. Set the key that it shows as CUSTOMERIO_SIGNING_KEY and restart."
    )
    webhook_next = "Press Send test in Customer.io." if signed else "First set the signing key."
    return [
        write_key,
        Step("Public address", bool(seen.genuine), "Customer.io reaches it." if seen.genuine else address_next),
        Step("Signing key", signed, "CUSTOMERIO_SIGNING_KEY is set." if signed else signing_key_next),
        Step("First genuine webhook", bool(seen.genuine), seen.genuine or webhook_next),
        last,
    ]


def _last_step(dry_run: bool, delivered: str) -> Step:
    if dry_run:
        start = "Start the relay with both keys and without DRY_RUN"
        return Step("Events in Segment", False, f'{start}: `.venv/bin/gunicorn "app:create_app()"`, not `make run`.')
    look = "Segment takes events for wrong keys too: look once in your source's Debugger."
    return Step(
        "Events in Segment", bool(delivered), f"{delivered} {look}" if delivered else "The first webhook brings one."
    )


def is_private(host: str) -> bool:
    """Return whether Customer.io can't reach this name or address: localhost, or one of a local network.

    A missing name counts as reachable: browsers take some names that the relay can't read.
    """
    if not host:
        return False
    try:
        return not ipaddress.ip_address(host).is_global
    except ValueError:
        return "." not in host or host.rstrip(".").rsplit(".", 1)[-1].lower() in PRIVATE_NAMES


def _lasts(failure: Tally, health: Health, now: float) -> bool:
    """Return whether there was no success since."""
    accepted = _last(health.successes)
    kept = _last(failure for failure in health.failures if failure.outcome == DEAD_LETTERED.label)
    what = failure.outcome, failure.reason
    if what in STRANGERS:
        genuine = max(accepted, kept, _last(health.ignored))  # these, too, had the right signature
        missing = now - genuine >= LATELY * 60
        return missing and failure.last > genuine and now - failure.last < FORGOTTEN * 60
    if what == (RETRIED.label, "dead_letter"):  # other events may do well, and prove nothing
        return failure.last > kept
    return failure.outcome == RETRIED.label and failure.last > accepted


def _last(failures: Iterable[Tally]) -> float:
    return max((failure.last for failure in failures), default=0.0)


def _said(failure: Tally) -> str:
    words = failure.words[0].upper() + failure.words[1:]
    whole = failure.outcome == RETRIED.label and failure.reason != "other"  # a sentence as it is
    return f"{words}." if whole else f"Webhooks are {TITLES[failure.outcome]}: {failure.words}."


def _remedy(failure: Tally) -> str:
    if failure.outcome == RETRIED.label:
        return REMEDIES.get(failure.reason, WAIT)
    return SIGNING if failure.outcome == UNAUTHORIZED.label else TOO_LARGE


def _flood(health: Health, letters_in: str) -> list[Trouble]:
    def lately(outcome: Outcome) -> int:
        return int(sum(health.per_minute[outcome.label][-LATELY:]))

    dead = lately(DEAD_LETTERED)
    total = dead + lately(DELIVERED) + lately(DRY_RUN)
    if dead < FLOOD or dead * 10 < total:
        return []
    reasons: Sequence[str] = [failure.words for failure in health.failures if failure.outcome == DEAD_LETTERED.label]
    words = f"{dead:,} of the last {total:,} events became dead letters. The last one: {reasons[0]}."
    return [Trouble(DEAD_LETTERED.label, "", words, DEAD_LETTERS.format(place=letters_in))]
