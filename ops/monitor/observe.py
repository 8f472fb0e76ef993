"""Counts and logs every webhook once it is answered, and shows it in a dry run."""

import logging
from contextlib import suppress
from time import monotonic, time

from flask import Flask, Response, g, request

from config import Config
from ops import samples
from ops.monitor.metrics import FAILING, Metrics
from ops.page.inspector import Inspector
from relay.outcomes import ACKNOWLEDGED, DEAD_LETTERED, DELIVERED, DRY_RUN, IGNORED, RETRIED, UNAUTHORIZED, Outcome
from relay.webhook import Webhook
from server.log import Repeats
from translate import occurred_at

log = logging.getLogger("relay")


def observe(app: Flask, config: Config, metrics: Metrics, inspector: Inspector) -> None:
    """Observe the webhooks of `app`."""
    repeats = Repeats(log)

    @app.after_request
    def observed(response: Response) -> Response:
        webhook: Webhook | None = g.get("webhook")
        if not webhook or not webhook.outcome:
            return response
        outcome, status = webhook.outcome, response.status_code
        is_webhook = request.endpoint == "receive"
        if is_webhook:
            with suppress(Exception):  # a counting error must not change the answer
                count(webhook, outcome)
            with suppress(Exception):  # nor may the page
                if config.dry_run:
                    number = inspector.remember(webhook, outcome, status, is_sample(webhook))
                    request.environ.get("relay.sample", {})["number"] = number  # for the page that sent it
        failed = is_webhook and outcome not in (DELIVERED, DRY_RUN, IGNORED)
        elsewhere = status in (404, 405)  # perhaps a webhook with a wrong address
        if webhook.error or failed or elsewhere:
            log_answer(webhook, outcome, status)
        return response

    def log_answer(webhook: Webhook, outcome: Outcome, status: int) -> None:
        level = logging.ERROR if webhook.error else logging.WARNING
        letter = outcome is DEAD_LETTERED and config.dead_letter_file
        kept = f"dead letter kept in {config.dead_letter_file}: " if letter else ""
        message = webhook.error or f"answered {status}: {kept}{webhook.words}"
        repeats.log(level, message, outcome.label, webhook.reason)

    def count(webhook: Webhook, outcome: Outcome) -> None:
        metrics.count_answer(outcome.label, webhook.reason, monotonic() - webhook.arrived)
        sample = is_sample(webhook)
        if webhook.genuine and not sample:
            metrics.note_genuine()
        # Where nobody signs, any event is as good as genuine. A scanner's request has no signature at all.
        genuine = webhook.genuine or webhook.event is not None
        if (outcome is RETRIED and genuine) or (outcome is UNAUTHORIZED and webhook.reason in ("mismatch", "expired")):
            metrics.note_failure(webhook.reason if webhook.reason in FAILING else outcome.label)
        if outcome in ACKNOWLEDGED:
            metrics.count_event(webhook.event)
        if outcome is DELIVERED and not sample:
            metrics.note_real_delivery()
        if outcome is DELIVERED and webhook.event and (occurred := occurred_at(webhook.event)):
            metrics.note_age(time() - occurred.timestamp())


def is_sample(webhook: Webhook) -> bool:
    """Return whether this webhook is a sample, from the page or from the command."""
    return "relay.sample" in request.environ or samples.is_sample(webhook.event or {})
