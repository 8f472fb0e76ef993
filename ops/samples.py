"""Sample webhooks, one for each event that Customer.io documents, of a person who is plainly a sample's. Pure."""

from typing import Any

from translate import CHANNELS as NAMES

# Customer.io's "Reporting webhooks", as of August 2026, and four (email deferred, sms dropped, slack and webhook
# converted) that it documents only where webhooks are set up (App API, "Reporting webhooks").
METRICS = {
    "customer": "subscribed unsubscribed cio_subscription_preferences_changed",
    "email": (
        "drafted attempted sent delivered opened clicked converted unsubscribed bounced dropped spammed failed "
        "undeliverable deferred"
    ),
    "push": "drafted attempted sent delivered opened clicked converted bounced dropped failed undeliverable",
    "sms": "drafted attempted sent delivered clicked converted bounced dropped failed undeliverable replied",
    "whatsapp": (
        "drafted attempted sent delivered opened clicked converted bounced dropped failed undeliverable replied"
    ),
    "slack": "drafted attempted sent clicked converted failed undeliverable",
    "webhook": "drafted attempted sent clicked converted failed undeliverable",
    "in_app": "drafted attempted sent opened clicked converted failed undeliverable",
}
EVENTS = {
    f"{channel}_{metric}": (channel, metric) for channel, metrics in METRICS.items() for metric in metrics.split()
}

CHANNELS = NAMES | {"customer": "Person", "in_app": "In-app"}  # in words, for the page

ID = "relay-sample"  # the person's, and how every event_id begins
EMAIL = "relay-sample@example.com"

RECIPIENTS = {
    "email": EMAIL,
    "sms": "+15555550100",
    "whatsapp": "+15555550100",
    "slack": "#signups",
    "webhook": "https://example.com/hook",
    "in_app": EMAIL,
}
FAILED = ("attempted", "bounced", "deferred", "dropped", "failed", "undeliverable")


def sample(name: str, unique: str, timestamp: int) -> dict[str, Any]:
    """Return a webhook of that event, with `unique` in its id; raise KeyError if `name` is not in EVENTS."""
    channel, metric = EVENTS[name]
    data: dict[str, Any] = {"customer_id": ID, "identifiers": {"id": ID, "email": EMAIL, "cio_id": ID}}
    if channel == "customer":
        data["email_address"] = EMAIL
    else:
        data |= {"campaign_id": 23, "action_id": 96, "delivery_id": "RPILAgUBcRhIBqSfeiIwdIYJKxTY"}
        if channel == "push" and metric not in ("drafted", *FAILED):
            data["recipients"] = [{"device_id": "CJwbPXxJSfyCbCtVVqVyEq8", "device_platform": "ios"}]
        elif channel != "push":
            data["recipient"] = RECIPIENTS[channel]
    if channel == "email":
        data["subject"] = "Why haven't you visited lately?"
    if metric == "clicked":
        data |= {"href": "https://example.com/welcome-back", "link_id": 1}
    if metric in FAILED:
        data["failure_message"] = "550 5.1.1 The account that you tried to reach does not exist"
    event_id = f"{ID}-{unique}"
    return {"event_id": event_id, "object_type": channel, "metric": metric, "timestamp": timestamp, "data": data}


def is_sample(event: dict[str, Any]) -> bool:
    """Return whether an event is one of these, by its id."""
    event_id = event.get("event_id")
    return isinstance(event_id, str) and event_id.startswith(f"{ID}-")
