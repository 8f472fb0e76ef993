"""The Flask application: the route that takes a webhook to Segment, and one handler per way it can end."""

import logging
import os
import traceback
from collections.abc import Callable
from datetime import UTC, datetime
from time import time
from typing import Any

from flask import Flask, Request, request
from flask.typing import ResponseReturnValue
from werkzeug.exceptions import HTTPException, MethodNotAllowed
from werkzeug.routing import MapAdapter

from body import MAX_BODY, Bodies, BodyTooLarge
from config import Config
from dead_letters import DeadLetters
from delivery import Delivery, Rejected, RetryLater
from key_check import KeyCheck, check_call
from ops import page, preflight
from ops.inspector import Inspector
from ops.metrics import Metrics
from ops.observe import observe
from segment_client import SegmentClient
from shared import Shared, of_service
from signature import BadSignature, verify
from translate import NotAnObject, Undeliverable, parse, translate
from webhook import current

# Customer.io gives up after 4 s (docs.customer.io, Reporting webhooks, "Timeouts and failures").
# Half a second is left for the way there and back.
DEADLINE = 3.5  # seconds, from a webhook's arrival to our answer
TO_ANSWER = 0.1  # seconds of those, to say so when Segment didn't answer

Answer = tuple[dict[str, str], int]


class App(Flask):
    def create_url_adapter(self, request: Request | None) -> MapAdapter | None:
        """Route by the path alone. For an odd Host, or a wish to speak WebSocket, werkzeug has a 400: an hour."""
        if request is None:
            return super().create_url_adapter(request)
        return self.url_map.bind("", path_info=request.path, default_method=request.method)


def create_app(config: Config | None = None, shared: Shared | None = None) -> Flask:
    """Return the relay. Without a `config` it reads the environment, and raises ConfigError if that is wrong.

    `shared` is the memory of the counts and of the pause after a 429; by default that of all workers.
    """
    shared = shared or of_service()
    if not shared.in_our_worker:
        preflight.require_our_worker()
    config = config or Config.from_env(os.environ)
    mapping = config.mapping()
    segment = SegmentClient(config.segment_write_key, config.segment_host)
    metrics = Metrics(shared, config)
    delivery = Delivery(metrics.counted(segment.upload), shared.pause)
    key_check = KeyCheck(
        lambda deadline: delivery.upload([segment.to_message(check_call(config.event_prefix))], deadline)
    )
    letters = DeadLetters(config.dead_letter_file)
    bodies = Bodies()
    inspector = Inspector(config)
    app = App(__name__, static_folder=None)
    observe(app, config, metrics, inspector)

    @app.post("/webhook", provide_automatic_options=False)
    def receive() -> ResponseReturnValue:
        webhook = current()
        with bodies.read(request, DEADLINE) as webhook.body:
            if config.signing_keys:
                timestamp, signature = request.headers.get("X-CIO-Timestamp"), request.headers.get("X-CIO-Signature")
                verify(webhook.body, timestamp or "", signature or "", config.signing_keys, time())
            webhook.event = parse(webhook.body)
            if connection := request.environ.get("gunicorn.socket"):
                connection.genuine = True  # worth keeping, for worker.py
            call = translate(webhook.event, received=datetime.now(UTC), **mapping)
            webhook.message = message = segment.to_message(call)
            if config.dry_run:
                return answer(200, "dry-run", message_id=message.id)
            delivery.deliver(message, webhook.arrived + DEADLINE - TO_ANSWER)
        # Segment has it. Nothing above this line answers "delivered".
        key_check.accepted()
        return answer(200, "delivered", message_id=message.id)

    @app.errorhandler(Rejected)
    def rejected_by_segment(error: Rejected) -> ResponseReturnValue:
        if error.status == 400:
            try:
                key_check.rejected(current().arrived + DEADLINE - TO_ANSWER)
            except RetryLater as wrong_key:
                return retry_later(wrong_key)
        return dead_letter(Undeliverable(str(error), "segment_rejects"))

    @app.errorhandler(Undeliverable)
    def dead_letter(error: Undeliverable) -> ResponseReturnValue:
        # Genuine, but refusing it would hold up every later event for seven days.
        try:
            letters.keep(current().body, str(error), current().arrived + DEADLINE)
        except RetryLater as not_kept:
            return retry_later(not_kept)
        return answer(202, "dead-lettered", error.code, reason=str(error))

    app.add_url_rule("/health", view_func=health, provide_automatic_options=False)
    app.register_blueprint(page.blueprint(config, metrics, shared.started, inspector))
    for error, handler in HANDLERS.items():
        app.register_error_handler(error, handler)
    app.json.sort_keys = False  # type: ignore[attr-defined]  # the status first
    # At debug level the client logs whole events, and urllib3 addresses.
    for name in ("segment", "urllib3"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    return app


def answer(code: int, status: str, reason_code: str = "", **more: str) -> Answer:
    """Return a webhook's answer. `reason_code` is the reason for metrics and log."""
    webhook = current()
    webhook.status, webhook.code, webhook.reason = status, reason_code, more.get("reason", "")
    return {"status": status} | more, code


def rejected(error: NotAnObject) -> ResponseReturnValue:
    return answer(400, "rejected", error.code, reason=str(error))


def unauthorized(error: BadSignature) -> ResponseReturnValue:
    return answer(401, "unauthorized", error.code, reason=str(error))


def too_large(error: BodyTooLarge) -> ResponseReturnValue:
    return answer(413, "rejected", "too_large", reason=f"the body is larger than {MAX_BODY:,} bytes")


def retry_later(error: RetryLater) -> ResponseReturnValue:
    # Not 500, 502 or 429: after those Customer.io waits an hour.
    return *answer(503, "retry", error.code, reason=str(error)), {"Retry-After": str(error.retry_after)}


def unexpected(error: Exception) -> ResponseReturnValue:
    # Where it happened, but not its text: that may quote the event.
    where = "".join(traceback.format_tb(error.__traceback__))
    current().error = f"unexpected {type(error).__name__}, answered 503\n{where}"
    return retry_later(RetryLater("the relay failed on it", "internal"))


def other_route(error: HTTPException) -> ResponseReturnValue:
    if error.code is None or error.code >= 500:  # a handler failed
        return unexpected(error)
    allow = {"Allow": ", ".join(error.valid_methods or ())} if isinstance(error, MethodNotAllowed) else {}
    reason = error.name.lower()
    code = "method" if error.code == 405 else reason.replace(" ", "_")
    return *answer(error.code, "rejected", code, reason=reason), allow


def health() -> ResponseReturnValue:
    return {"status": "ok"}


HANDLERS: dict[type[Exception], Callable[[Any], ResponseReturnValue]] = {
    NotAnObject: rejected,
    BadSignature: unauthorized,
    BodyTooLarge: too_large,
    RetryLater: retry_later,
    HTTPException: other_route,
    Exception: unexpected,
}
