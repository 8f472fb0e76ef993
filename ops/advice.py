"""Says what is wrong now, what was, and what is still to do before events flow. Pure."""

import ipaddress
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from ops.metrics import Tally

LATELY = 5  # minutes
FLOOD = 5  # dead letters in that time, and a tenth of all webhooks

WEBHOOK_PAGE = "Customer.io: Integrations > Reporting Webhooks > your webhook"
KEY_PAGE = "Segment: Connections > Sources > your source > Settings > API Keys"

COMES_BACK = "Nothing is lost: Customer.io sends them again, for seven days."
WAIT = f"{COMES_BACK} If it lasts, look at status.segment.com."
NEW_KEY = f"Copy the write key again from {KEY_PAGE}; set SEGMENT_WRITE_KEY and restart. {COMES_BACK}"

# What to do about webhooks that were asked to come back, by the code of the reason.
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
    "internal": f"The log says where: please report it. {COMES_BACK}",
    "body": "Look at the network and the proxy between Customer.io and the relay.",
    "busy": "Turn Body Content off in Customer.io, or run more workers (WEB_CONCURRENCY).",
}
STRANGERS = ("body", "busy")  # anybody can cause these, so one of them is soon forgotten

SIGNING = (
    f"If they are Customer.io's: copy the signing key from {WEBHOOK_PAGE}; set CUSTOMERIO_SIGNING_KEY and restart. "
    "Customer.io waits an hour after each 401, and then sends them again, for seven days."
)
DEAD_LETTERS = (
    "They are kept whole, {place}. `python -m ops translate` says what is wrong with each; "
    "`python -m ops replay` sends them again."
)
TOO_LARGE = "Turn Body Content off in Customer.io: until the webhook fits, all later ones wait behind it."

# Of the outcomes.
LABELS = {
    "delivered": "delivered",
    "dry_run": "dry run",
    "dead_lettered": "dead letters",
    "retried": "retried",
    "unauthorized": "unauthorized",
    "rejected": "rejected",
}

# Besides what ipaddress calls private.
PRIVATE_NAMES = ("localhost", "local", "internal", "lan", "home", "arpa", "test")


class Trouble(NamedTuple):
    """Something that is wrong now."""

    key: str
    words: str
    remedy: str


class Step(NamedTuple):
    """Something to do before events flow: what is done, or else how."""

    title: str
    done: bool
    words: str


class Health(NamedTuple):
    """What the counts say."""

    failures: list[Tally]  # retried, unauthorized, rejected and dead_lettered
    successes: list[Tally]  # delivered and dry_run
    per_minute: dict[str, list[float]]


def wrong_now(health: Health, now: float, letters_in: str) -> list[Trouble]:
    """Return what is wrong at `now`, in unix seconds. `letters_in` says where dead letters are."""
    found = [
        Trouble(f"{failure.outcome}-{failure.code}", _said(failure), _remedy(failure))
        for failure in health.failures
        if _lasts(failure, health, now)
    ]
    return found + _flood(health, letters_in)


def over(health: Health, now: float) -> list[tuple[str, Tally]]:
    """Return what was wrong in the last day and is not now, in words, the latest first."""
    return [
        (f"{LABELS[failure.outcome].capitalize()}: {failure.words}", failure)
        for failure in health.failures
        if not _lasts(failure, health, now) and now - failure.last < 86_400
    ]


def delay(health: Health) -> str:
    """Say how long ago events happened when they are delivered, on average; "" if none was lately."""
    delivered = sum(health.per_minute["delivered"][-LATELY:])
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


def steps(
    *,
    write_key: bool,
    refused: bool,
    signed: bool,
    dry_run: bool,
    reachable: bool,
    port: int,
    genuine: str,
    delivered: str,
) -> list[Step]:
    """Return the steps from a dry run to a live relay.

    `refused` says that Segment refuses the write key now; `genuine` and `delivered` say when there
    was such an event, "" if never.
    """
    write_key_next = f"Copy it from {KEY_PAGE}. It is set together with the last step."
    if refused:
        write_key_next = f"Segment refuses this one. {NEW_KEY}"
    keyed = write_key and not refused
    if not signed and not dry_run:
        genuine_next = "Without the signing key nobody can tell a genuine one."
    else:
        genuine_next = "Press Send test in Customer.io." if signed else "First set the signing key."
    return [
        Step(
            "Public address",
            reachable or bool(genuine),
            "Customer.io reaches it."
            if reachable or genuine
            else f"This one is private. Deploy the relay, or open a tunnel (`cloudflared tunnel --url "
            f"http://localhost:{port}`), and open this page at its address.",
        ),
        Step(
            "Signing key",
            signed,
            "CUSTOMERIO_SIGNING_KEY is set."
            if signed
            else "In Customer.io: Integrations > Reporting Webhooks > Add, with the address above. "
            "Set the key that it shows as CUSTOMERIO_SIGNING_KEY and restart.",
        ),
        Step("First genuine webhook", bool(genuine), genuine or genuine_next),
        Step("Write key", keyed, "SEGMENT_WRITE_KEY is set." if keyed else write_key_next),
        _last_step(dry_run, write_key, delivered),
    ]


def _last_step(dry_run: bool, write_key: bool, delivered: str) -> Step:
    if dry_run:
        setting = "Unset DRY_RUN" if write_key else "Set SEGMENT_WRITE_KEY, unset DRY_RUN"
        return Step("Events in Segment", False, f"{setting} and restart.")
    look = "Segment takes events for wrong keys too: look once in your source's Debugger."
    return Step(
        "Events in Segment", bool(delivered), f"{delivered} {look}" if delivered else "The first webhook brings one."
    )


def is_private(host: str) -> bool:
    """Return whether Customer.io can't reach this name or address: localhost, or one of a local network."""
    try:
        return not ipaddress.ip_address(host).is_global
    except ValueError:
        return "." not in host or host.rstrip(".").rsplit(".", 1)[-1].lower() in PRIVATE_NAMES


def _lasts(failure: Tally, health: Health, now: float) -> bool:
    """Return whether nothing has gone well since."""
    accepted = _last(health.successes)
    kept = _last(failure for failure in health.failures if failure.outcome == "dead_lettered")
    match failure.outcome, failure.code:
        case "retried", "dead_letter":  # other events may do well, and prove nothing
            return failure.last > kept
        case "retried", code if code in STRANGERS:
            return failure.last > accepted and now - failure.last < LATELY * 60
        case ("retried", _) | ("rejected", "too_large"):
            return failure.last > accepted
        case "unauthorized", _:  # a dead letter too had the right signature
            return failure.last > max(accepted, kept)
    return False


def _last(failures: Iterable[Tally]) -> float:
    return max((failure.last for failure in failures), default=0.0)


def _said(failure: Tally) -> str:
    words = failure.words[0].upper() + failure.words[1:]
    whole = failure.outcome == "retried" and failure.code != "other"  # a sentence as it is
    return f"{words}." if whole else f"Webhooks are {failure.outcome}: {failure.words}."


def _remedy(failure: Tally) -> str:
    if failure.outcome == "retried":
        return REMEDIES.get(failure.code, WAIT)
    return SIGNING if failure.outcome == "unauthorized" else TOO_LARGE


def _flood(health: Health, letters_in: str) -> list[Trouble]:
    def lately(outcome: str) -> int:
        return int(sum(health.per_minute[outcome][-LATELY:]))

    dead = lately("dead_lettered")
    total = dead + sum(map(lately, ("delivered", "dry_run")))
    if dead < FLOOD or dead * 10 < total:
        return []
    reasons: Sequence[str] = [failure.words for failure in health.failures if failure.outcome == "dead_lettered"]
    words = f"{dead:,} of the last {total:,} events became dead letters. The last one: {reasons[0]}."
    return [Trouble("dead_lettered", words, DEAD_LETTERS.format(place=letters_in))]
