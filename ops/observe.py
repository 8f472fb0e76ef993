"""Counts and logs every webhook once it is answered, and shows it in a dry run."""

import logging
from contextlib import suppress
from time import monotonic, time

from flask import Flask, Response, g, request

from config import Config
from logs import Repeats
from ops import samples
from ops.inspector import Inspector
from ops.metrics import Metrics
from translate import occurred_at
from webhook import Webhook

# The `status` of an answer -> the outcome in the metrics.
OUTCOMES = {
    "delivered": "delivered",
    "dry-run": "dry_run",
    "dead-lettered": "dead_lettered",
    "retry": "retried",
    "unauthorized": "unauthorized",
    "rejected": "rejected",
}

log = logging.getLogger("relay")


def observe(app: Flask, config: Config, metrics: Metrics, inspector: Inspector) -> None:
    """Observe the webhooks of `app`."""
    log_sparingly = Repeats(log)

    @app.after_request
    def observed(response: Response) -> Response:
        webhook: Webhook | None = g.get("webhook")
        if not webhook or not webhook.status:
            return response
        outcome = OUTCOMES[webhook.status]
        if request.endpoint == "receive":
            with suppress(Exception):  # a counting error must not change the answer
                count(webhook, outcome)
            with suppress(Exception):  # nor may the page
                if config.dry_run:
                    show(webhook, outcome, response.status_code)
        refused = request.endpoint == "receive" and outcome not in ("delivered", "dry_run")
        elsewhere = response.status_code in (404, 405)  # perhaps a webhook with a wrong address
        if webhook.error or refused or elsewhere:
            level = logging.ERROR if webhook.error else logging.WARNING
            letter = outcome == "dead_lettered" and config.dead_letter_file
            kept = f"dead letter kept in {config.dead_letter_file}: " if letter else ""
            message = webhook.error or f"answered {response.status_code}: {kept}{webhook.reason}"
            log_sparingly(level, message, outcome, webhook.code)
        return response

    def count(webhook: Webhook, outcome: str) -> None:
        metrics.answered(outcome, webhook.code, monotonic() - webhook.arrived)
        verified = bool(config.signing_keys) and (webhook.event is not None or outcome == "dead_lettered")
        sample = is_sample(webhook)
        if verified and not sample:
            metrics.genuine()
        if outcome in ("delivered", "dry_run", "dead_lettered"):
            metrics.acknowledged(webhook.event)
        if outcome == "delivered" and not sample:
            metrics.arrived()
        if outcome == "delivered" and webhook.event and (occurred := occurred_at(webhook.event)):
            metrics.delivered(time() - occurred.timestamp())

    def show(webhook: Webhook, outcome: str, status: int) -> None:
        sample = is_sample(webhook)
        inspector.seen(
            webhook.body, webhook.message, status=status, outcome=outcome, reason=webhook.reason, sample=sample
        )


def is_sample(webhook: Webhook) -> bool:
    """Return whether this webhook is a sample: from the page, whatever is in it, or from the command."""
    return "relay.sample" in request.environ or samples.is_sample(webhook.event or {})
