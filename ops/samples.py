"""Realistic sample webhooks, one for each event that Customer.io documents. Pure."""

from typing import Any

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

# As people say them.
CHANNELS = {
    "customer": "Person",
    "email": "Email",
    "push": "Push",
    "sms": "SMS",
    "whatsapp": "WhatsApp",
    "slack": "Slack",
    "webhook": "Webhook",
    "in_app": "In-app",
}

RECIPIENTS = {
    "email": "ada@example.com",
    "sms": "+15555550100",
    "whatsapp": "+15555550100",
    "slack": "#signups",
    "webhook": "https://example.com/hook",
    "in_app": "ada@example.com",
}
FAILED = ("attempted", "bounced", "deferred", "dropped", "failed", "undeliverable")


def sample(name: str, event_id: str, timestamp: int) -> dict[str, Any]:
    """Return a webhook of that event; raise KeyError if `name` is not in EVENTS."""
    channel, metric = EVENTS[name]
    person = {"id": "0200102", "email": "ada@example.com", "cio_id": "d9c106000001"}
    data: dict[str, Any] = {"customer_id": "0200102", "identifiers": person}
    if channel == "customer":
        data["email_address"] = "ada@example.com"
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
    return {"event_id": event_id, "object_type": channel, "metric": metric, "timestamp": timestamp, "data": data}
