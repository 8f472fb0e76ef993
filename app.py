"""The Flask application: the route that takes a webhook to Segment, and one handler per way it can end."""

import logging
import os
import traceback
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from time import monotonic, time
from typing import Any

from flask import Flask, Response, g, request
from flask.typing import ResponseReturnValue
from werkzeug.exceptions import HTTPException, MethodNotAllowed

from body import MAX_BODY, Bodies, BodyTooLarge
from config import Config
from dead_letters import DeadLetters
from delivery import Delivery, RetryLater
from ops import page
from ops.metrics import Metrics
from segment_client import SegmentClient
from shared import Shared, of_service
from signature import BadSignature, verify
from translate import NotAnObject, Undeliverable, parse, translate

# Customer.io gives up after 4 s (docs.customer.io, Reporting webhooks, "Timeouts and failures").
# Half a second is left for the way there and back.
DEADLINE = 3.5  # seconds, from a webhook's arrival to our answer
TO_ANSWER = 0.1  # seconds of those, to say so when Segment didn't answer

log = logging.getLogger("relay")


def create_app(config: Config | None = None, shared: Shared | None = None) -> Flask:
    """Return the relay. Without a `config` it reads the environment, and raises ConfigError if that is wrong.

    `shared` is the memory of the counts and of the pause after a 429; by default that of all workers.
    """
    config = config or Config.from_env(os.environ)
    shared = shared or of_service()
    mapping = config.mapping()
    segment = SegmentClient(config.segment_write_key, config.segment_host)
    delivery = Delivery(segment.upload, shared.pause)
    letters = DeadLetters(config.dead_letter_file)
    metrics = Metrics(shared)
    bodies = Bodies()
    app = Flask(__name__, static_folder=None)

    @app.post("/webhook", provide_automatic_options=False)
    def webhook() -> ResponseReturnValue:
        g.arrived = monotonic()
        g.body = body = bodies.read(request, DEADLINE)
        if config.signing_keys:
            timestamp, signature = request.headers.get("X-CIO-Timestamp"), request.headers.get("X-CIO-Signature")
            verify(body, timestamp or "", signature or "", config.signing_keys, time())
        event = parse(body)
        call = translate(event, received=datetime.now(UTC), **mapping)
        message = segment.to_message(call)
        if config.dry_run:
            page.show(event, message)
        else:
            delivery.deliver(message, g.arrived + DEADLINE - TO_ANSWER)
        # Segment has it. Nothing above this line answers 200.
        return answer(200, "delivered", message_id=message.id)

    @app.errorhandler(Undeliverable)
    def dead_letter(error: Undeliverable) -> ResponseReturnValue:
        # Genuine, but refusing it would hold up every later event for seven days.
        reason = str(error)
        try:
            event = letters.keep(g.body, reason, g.arrived + DEADLINE)
        except RetryLater as not_kept:
            return retry_later(not_kept)
        if config.dry_run:
            page.show(event, reason)
        return answer(202, "dead-lettered", reason=reason)

    @app.after_request
    def count(response: Response) -> Response:
        if request.endpoint == "webhook" and "outcome" in g:
            with suppress(Exception):  # whatever becomes of the counts, the answer stands
                metrics.answered(g.outcome, g.reason_code, monotonic() - g.arrived)
        return response

    @app.teardown_request
    def release(_: BaseException | None) -> None:
        bodies.release(g.pop("body", b""))

    app.add_url_rule("/health", view_func=health, provide_automatic_options=False)
    app.register_blueprint(page.blueprint(config, metrics, shared.started))
    for error, handler in HANDLERS.items():
        app.register_error_handler(error, handler)
    app.json.sort_keys = False  # type: ignore[attr-defined]  # the status first
    # At debug level the client logs whole events, and urllib3 addresses.
    for name in ("segment", "urllib3"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    return app


def answer(code: int, status: str, reason_code: str = "", **more: Any) -> tuple[dict[str, Any], int]:
    """Return a webhook's response; `reason_code` is for the metrics."""
    g.outcome, g.reason_code = status, reason_code
    return {"status": status, **more}, code


def rejected(error: NotAnObject) -> ResponseReturnValue:
    return answer(400, "rejected", reason=str(error))


def unauthorized(error: BadSignature) -> ResponseReturnValue:
    return answer(401, "unauthorized", reason=str(error))


def too_large(error: BodyTooLarge) -> ResponseReturnValue:
    return answer(413, "rejected", reason=f"the body is larger than {MAX_BODY:,} bytes")


def retry_later(error: RetryLater) -> ResponseReturnValue:
    # Not 500, 502 or 429: after those Customer.io waits an hour.
    log.warning("not accepted: %s", error)
    return *answer(503, "retry", error.code, reason=str(error)), {"Retry-After": str(error.retry_after)}


def unexpected(error: Exception) -> ResponseReturnValue:
    # Where it happened, but not its text: that may quote the event.
    where = "".join(traceback.format_tb(error.__traceback__))
    log.error("unexpected %s, answered 503\n%s", type(error).__name__, where)
    return retry_later(RetryLater("the relay failed on it", "internal"))


def other_route(error: HTTPException) -> ResponseReturnValue:
    if error.code is None or error.code >= 500:  # a handler failed
        return unexpected(error)
    allow = {"Allow": ", ".join(error.valid_methods or ())} if isinstance(error, MethodNotAllowed) else {}
    return {"status": "rejected", "reason": error.name.lower()}, error.code, allow


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
