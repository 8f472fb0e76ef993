"""The Flask application: the route that takes a webhook to Segment, and the handler for every way it can end."""

import logging
import os
import traceback
from datetime import UTC, datetime
from functools import partial
from time import time

from flask import Flask, Request, request
from flask.typing import ResponseReturnValue
from werkzeug.exceptions import HTTPException, MethodNotAllowed
from werkzeug.routing import MapAdapter

from config import Config
from ops.watch import watch
from relay.body import Bodies
from relay.dead_letters import DeadLetters
from relay.delivery import Delivery
from relay.key_check import KeyCheck, check_call
from relay.message import Message, to_message
from relay.outcomes import DELIVERED, DRY_RUN, ENDS, REJECTED, Outcome, Rejected, RetryLater
from relay.segment import SegmentClient
from relay.signature import verify
from relay.webhook import current
from server import log, preflight
from server.shared import Shared, of_service
from translate import Ended, NotAnObject, Undeliverable, parse, translate

# Customer.io gives up after 4 s (docs.customer.io, Reporting webhooks, "Timeouts and failures").
# Leave half a second for the network.
DEADLINE = 3.5  # seconds, from a webhook's arrival to our answer
TO_ANSWER = 0.1  # seconds of those, to say so when Segment didn't answer

# For requests that aren't webhooks; all others are 422.
OTHER_STATUSES = (404, 405, 413, 415)

Answer = tuple[dict[str, str], int]


class App(Flask):
    def create_url_adapter(self, request: Request | None) -> MapAdapter | None:
        """Route by the path alone. To an odd Host or a WebSocket upgrade, werkzeug answers 400: an hour."""
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
    config = config or Config.from_env(os.environ, bundle_problem=preflight.bundle_problem)
    mapping = config.mapping()
    segment = SegmentClient(config.segment_write_key, config.segment_host, config.proxy, config.ca_bundle)
    app = App(__name__, static_folder=None)
    metrics = watch(app, config, shared)
    delivery = Delivery(metrics.count_uploads(segment.upload), shared.pause)
    # One messageId, so that Segment keeps one however many are sent.
    check_event = check_call(config.event_prefix, config.event_names)
    key_check = KeyCheck(lambda deadline: delivery.attempt([to_message(check_event)], deadline))
    letters = DeadLetters(config.dead_letter_file, log.stream())
    bodies = Bodies()

    @app.post("/webhook", provide_automatic_options=False)
    def receive() -> ResponseReturnValue:
        webhook = current()
        deadline = webhook.arrived + DEADLINE
        with bodies.hold(request, DEADLINE) as body:
            webhook.body = body
            if config.not_set_up:
                raise RetryLater("not_set_up")
            if config.signing_keys:
                timestamp, signature = request.headers.get("X-CIO-Timestamp"), request.headers.get("X-CIO-Signature")
                verify(body, timestamp or "", signature or "", config.signing_keys, time())
                webhook.genuine = True
            try:
                webhook.event = parse(body)
                if connection := request.environ.get("gunicorn.socket"):
                    connection.worth_keeping = True  # for worker.py
                call = translate(webhook.event, received=datetime.now(UTC), **mapping)
                webhook.message = message = to_message(call)
                if config.dry_run:
                    return answer(200, DRY_RUN, message_id=message.id)
                send(message, deadline - TO_ANSWER)
            except (Undeliverable, NotAnObject) as error:
                if isinstance(error, NotAnObject) and not config.signing_keys:
                    raise
                # Whatever the key has signed is genuine. Refusing it would hold up every later event for seven days.
                letters.keep(body, str(error), deadline)
                raise Undeliverable(error.reason, error.detail) from None
        # Segment has it. Nothing above this line answers "delivered".
        key_check.accepted()
        return answer(200, DELIVERED, message_id=message.id)

    def send(message: Message, deadline: float) -> None:
        try:
            delivery.deliver(message, deadline)
        except Rejected as error:
            key_check.rejected(error, deadline)
            raise Undeliverable(error.reason, error.detail) from None

    app.add_url_rule("/health", view_func=health, provide_automatic_options=False)
    for kind, (status, outcome) in ENDS.items():
        app.register_error_handler(kind, partial(ended, status, outcome))
    app.register_error_handler(HTTPException, other_route)
    app.register_error_handler(Exception, unexpected)
    app.json.sort_keys = False  # type: ignore[attr-defined]  # the status first
    logging.getLogger("segment").setLevel(logging.CRITICAL)  # at debug level the client logs whole events
    return app


def answer(status: int, outcome: Outcome, reason: str = "", words: str = "", **more: str) -> Answer:
    """Return a webhook's answer. `reason` is a label for metrics and log; `words` is its sentence."""
    webhook = current()
    webhook.outcome, webhook.reason, webhook.words = outcome, reason, words
    return {"status": outcome.word} | ({"reason": words} if words else {}) | more, status


def ended(status: int, outcome: Outcome, error: Ended) -> ResponseReturnValue:
    headers = {"Retry-After": str(error.retry_after)} if isinstance(error, RetryLater) else {}
    return *answer(status, outcome, error.label, str(error)), headers


def unexpected(error: Exception) -> ResponseReturnValue:
    # Where it happened, but not its text: that may quote the event.
    where = "".join(traceback.format_tb(error.__traceback__))
    current().error = f"unexpected {type(error).__name__}, answered 503\n{where}"
    return ended(*ENDS[RetryLater], RetryLater("internal"))


def other_route(error: HTTPException) -> ResponseReturnValue:
    if error.code is None or error.code >= 500:  # a handler failed
        return unexpected(error)
    allow = {"Allow": ", ".join(error.valid_methods or ())} if isinstance(error, MethodNotAllowed) else {}
    words = error.name.lower()
    reason = "method" if error.code == 405 else words.replace(" ", "_")
    status = error.code if error.code in OTHER_STATUSES else 422
    return *answer(status, REJECTED, reason, words), allow


def health() -> ResponseReturnValue:
    return {"status": "ok"}
