"""The report of `check` as lines for people, without what is wrong."""

from ops.check.customerio import grouped
from ops.check.part import Report


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
    lines = [f'Segment: the write key belongs to the source "{source["name"]}", {state}.']
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
