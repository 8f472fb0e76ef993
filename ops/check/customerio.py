"""Checks Customer.io's end: the webhook that goes to this relay."""

from ops.check import customerio_api
from ops.check.ask import Api, answered
from ops.check.customerio_api import SUBSCRIBABLE, Subscription
from ops.check.part import Part, Report, printable


def check_webhook(api: Api | None, url: str | None) -> Part:
    """Ask for the webhook of the relay whose public address is `url`, or of any relay."""
    if not api:
        return Part(not_checked=[f"the webhook in Customer.io. Set {customerio_api.TOKEN} to know."])
    webhooks, problems = answered(lambda: customerio_api.list_subscriptions(api))
    ours = [webhook for webhook in webhooks or () if customerio_api.is_relay(webhook, url)]
    addresses = {customerio_api.address(webhook.endpoint) for webhook in ours}
    if len(addresses) > 1:
        problems = [f"Several webhooks could be this relay's: name its address with --url{listed(ours)}."]
    if webhooks is None or problems:
        return Part({"asked": api.shown, "webhooks": []}, incomplete=problems)
    wrong = []
    if not ours:
        wanted = f"goes to {customerio_api.target(url)}" if url else "has an address that ends in /webhook"
        wrong.append(f"No reporting webhook in Customer.io {wanted}{listed(webhooks)}.")
    if len(ours) > 1:
        target = printable(addresses.pop())
        wrong.append(f"{len(ours)} webhooks go to {target}: events may arrive twice. Keep one.")
    wrong += [
        f'The webhook "{printable(webhook.name)}" is disabled: enable it in Customer.io.'
        for webhook in ours
        if not webhook.enabled
    ]
    return Part({"asked": api.shown, "webhooks": [described(webhook) for webhook in ours]}, wrong)


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
