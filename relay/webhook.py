"""What is known of a webhook while it is answered, for its error handlers and ops/monitor/observe.py."""

from dataclasses import dataclass, field
from time import monotonic
from typing import Any

from flask import g

from relay.message import Message
from relay.outcomes import Outcome


@dataclass(slots=True)
class Webhook:
    arrived: float = field(default_factory=monotonic)  # on the monotonic clock
    body: bytes = b""
    genuine: bool = False  # it has a right signature
    event: dict[str, Any] | None = None
    message: Message | None = None
    # Of its answer:
    outcome: Outcome | None = None
    reason: str = ""  # its label
    words: str = ""  # the reason's
    error: str = ""  # an unexpected one, and where it was


def current() -> Webhook:
    """Return this request's webhook; create it on first use."""
    webhook: Webhook = g.setdefault("webhook", Webhook())
    return webhook
