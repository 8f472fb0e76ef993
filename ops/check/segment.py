"""Checks Segment's end: the source that has the write key, and what Segment received and dropped of its events."""

from datetime import UTC, datetime, timedelta

from ops.check import segment_api
from ops.check.ask import Api, answered
from ops.check.part import Part, printable
from ops.check.segment_api import DROPPED, RECEIVED, Source

SPAN = timedelta(hours=4)  # the most that Segment reports by the minute


def check_source(api: Api | None, write_key: str) -> tuple[Source | None, Part]:
    """Ask which source has the write key."""
    if not api:
        asks = "which source has the write key, and what Segment dropped"
        return None, Part(not_checked=[f"{asks}. Set {segment_api.TOKEN} to know."])
    if not write_key:  # in a dry run
        return None, Part(not_checked=["which source has the write key: SEGMENT_WRITE_KEY is not set."])
    source, problems = answered(lambda: segment_api.find_source(api, write_key))
    found = {
        "asked": api.shown,
        "key_in_a_source": None if problems else bool(source),
        "source": source and {"id": source.id, "name": printable(source.name), "enabled": source.enabled},
    }
    if problems:
        return None, Part(found, incomplete=problems)
    wrong = []
    if not source:
        wrong.append(
            f"No source has SEGMENT_WRITE_KEY, says {api.url}: Segment answers 200, and drops every event. Copy "
            "the key again. If it is right, then SEGMENT_HOST is the wrong region, or "
            f"{segment_api.TOKEN} belongs to another workspace."
        )
    elif not source.enabled:
        wrong.append("The source is disabled: Segment drops its events. Enable it in Segment.")
    return source, Part(found, wrong)


def check_last_hours(api: Api, source: Source) -> Part:
    """Ask what Segment received and dropped in the last four hours. None is what it doesn't say."""
    until = datetime.now(UTC)
    since = until - SPAN
    received, no_received = answered(lambda: segment_api.overview(api, RECEIVED, source.id, since, until))
    dropped, no_dropped = answered(lambda: segment_api.overview(api, DROPPED, source.id, since, until, "discardReason"))
    problems = no_received + no_dropped
    if received is None and dropped is None:
        return Part(incomplete=problems)
    rows = [
        {
            "reason": printable(row.name) or "unknown",
            "count": row.total,
            "last": iso(row.last),
            "meaning": segment_api.meaning(row.name),
        }
        for row in dropped or ()
    ]
    found = {
        "since": iso(since),
        "until": iso(until),
        "received": None if received is None else sum(row.total for row in received),
        "last_received": iso(max((row.last for row in received or () if row.last), default=None)),
        "dropped": None if dropped is None else rows,
    }
    if not dropped:
        return Part(found, incomplete=problems)
    total = sum(row.total for row in dropped)
    words = (
        f"Segment dropped {total:,} events of the last four hours after its 200. Customer.io doesn't send them again."
    )
    return Part(found, [words], problems)


def iso(time: datetime | None) -> str | None:
    return time.isoformat(timespec="seconds") if time else None
