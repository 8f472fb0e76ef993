"""The only file that knows HTTP: verify, translate, deliver, answer."""

from __future__ import annotations

import json
import logging
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from functools import partial
from time import monotonic, time
from typing import IO, Any, NamedTuple

import gevent
from flask import Flask, Response, request
from werkzeug.exceptions import HTTPException, MethodNotAllowed

import commands
import dead_letters
import metrics
import page
from config import Config, ConfigError
from delivery import GroupCommit, Message, NotAccepted, Uploader, shaper
from signature import BadSignature, verify
from translate import NotAnObject, Undeliverable, parse, translator

# Customer.io gives up after 4 s (docs.customer.io, Reporting webhooks, "Timeouts and
# failures"). The half second is for the way there and back.
DEADLINE = 3.5  # seconds, from a webhook's arrival to our answer

MAX_BODY = 8 * 1024 * 1024  # bytes; an email's whole body is far below

log = logging.getLogger("relay")


class TooLarge(Exception):
    """The body is above MAX_BODY."""


class Answer(NamedTuple):
    code: int
    body: dict[str, Any]
    retry_after: int | None = None  # seconds

    def content(self) -> bytes:
        return json.dumps(self.body).encode()

    def headers(self) -> dict[str, str]:
        more = {"Retry-After": str(self.retry_after)} if self.retry_after else {}
        return {"Content-Type": "application/json"} | more


def relay(config: Config) -> Callable[[IO[bytes], Mapping[str, str]], Answer]:
    """Return the function that takes a webhook to Segment and says how that went.

    It is given the body, and the headers by their names in capitals.
    """
    translated = translator(config)
    shape = shaper(config.segment_write_key)
    segment = GroupCommit(Uploader(config.segment_write_key, config.segment_host), config.segment_write_key)

    def webhook(stream: IO[bytes], headers: Mapping[str, str]) -> Answer:
        arrived = monotonic()
        answer = accept(stream, headers, arrived)
        status = answer.body["status"]
        metrics.count(status, monotonic() - arrived, answer.body["reason"] if status == "retry" else "")
        return answer

    def accept(stream: IO[bytes], headers: Mapping[str, str], arrived: float) -> Answer:
        # The last tenth is for saying that it was Segment who took too long.
        deadline = arrived + DEADLINE - 0.1
        stamp, signature = headers.get("X-CIO-TIMESTAMP", ""), headers.get("X-CIO-SIGNATURE", "")
        try:
            # Over everything, the body that arrives slowly and the disk that is slow included.
            with gevent.Timeout(DEADLINE, NotAccepted("it took too long")):
                body = read_body(stream, headers.get("CONTENT-LENGTH"))
                return deliver(body, partial(make, body, stamp, signature), deadline)
        except BadSignature as error:
            return Answer(401, {"status": "unauthorized", "reason": str(error)})
        except NotAnObject as error:
            return Answer(400, {"status": "rejected", "reason": str(error)})
        except TooLarge:
            return Answer(413, {"status": "rejected", "reason": f"the body is larger than {MAX_BODY:,} bytes"})
        except NotAccepted as error:
            # Not 500, 502 or 429: after those, Customer.io waits an hour.
            log.warning("not accepted: %s", error)
            return Answer(503, {"status": "retry", "reason": str(error)}, error.retry_after)
        except Exception as error:  # noqa: BLE001 - whatever it is, the event must come back
            # Where it happened, but not its text: that may quote the event.
            where = "".join(traceback.format_tb(error.__traceback__))
            log.error("unexpected %s, answered 503\n%s", type(error).__name__, where)
            return Answer(503, {"status": "retry", "reason": "the relay failed on it"}, 1)

    def make(body: bytes, stamp: str, signature: str) -> tuple[Message, int]:
        if config.signing_keys:
            verify(body, stamp, signature, config.signing_keys, time())
        return shape(translated(parse(body)))

    def deliver(body: bytes, make: Callable[[], tuple[Message, int]], deadline: float) -> Answer:
        try:
            if config.dry_run:
                message, _ = make()
                print(f"track call:\n{json.dumps(message, indent=2, ensure_ascii=False)}", flush=True)
                page.seen(readable(body), message)
            else:
                message = segment.deliver(make, deadline)
        except Undeliverable as reason:
            event = readable(body)
            if config.dry_run:
                page.seen(event, f"a dead letter: {reason}")
            dead_letters.keep(event, str(reason), config.dead_letter_file)
            if config.dead_letter_file:
                log.warning("dead letter kept in %s: %s", config.dead_letter_file, reason)
            return Answer(202, {"status": "dead-lettered", "reason": str(reason)})
        # Segment has it. Nothing above this line may answer 200.
        return Answer(200, {"status": "delivered", "message_id": message["messageId"]})

    return webhook


def read_body(stream: IO[bytes], length: str | None) -> bytes:
    """Return the body; raise TooLarge above MAX_BODY, NotAccepted if it does not arrive whole."""
    expected = int(length or 0)
    if expected > MAX_BODY:
        raise TooLarge
    try:
        body = stream.read(MAX_BODY + 1)
    except NotAccepted:
        raise
    except Exception:  # noqa: BLE001 - gunicorn has an error for each way in which chunks can be wrong
        raise NotAccepted("the body did not arrive whole") from None
    if len(body) > MAX_BODY:
        raise TooLarge
    if len(body) < expected:
        raise NotAccepted("the body did not arrive whole")
    return body


def readable(body: bytes) -> Any:
    """Return the event in `body`, or its text where it nests too deeply to be parsed."""
    try:
        return parse(body)
    except Undeliverable:
        return body.decode(errors="replace")


def create_app(config: Config, problem: ConfigError | None = None) -> Flask:
    """Return the application. With a `problem`, only its commands are of use: no webhook is taken."""
    app = Flask(__name__, static_folder=None)
    webhook = relay(config)
    if problem:
        webhook = lambda stream, headers: Answer(503, {"status": "retry", "reason": "the relay is not configured"}, 1)  # noqa: E731
    commands.register(app, config, problem)
    page.register(app, config)

    # Our worker calls it for most webhooks, without all that Flask and WSGI would do first.
    app.webhook = webhook  # type: ignore[attr-defined]

    @app.post("/webhook", provide_automatic_options=False)
    def webhook_through_flask() -> Response:
        return respond(webhook(request.stream, {name.upper(): value for name, value in request.headers}))

    @app.get("/health", provide_automatic_options=False)
    def health() -> Response:
        return respond(Answer(200, {"status": "ok"}))

    @app.errorhandler(HTTPException)
    def other_route(error: HTTPException) -> Response:
        response = respond(Answer(error.code or 404, {"status": "rejected", "reason": (error.name or "").lower()}))
        if isinstance(error, MethodNotAllowed) and error.valid_methods:
            response.headers["Allow"] = ", ".join(error.valid_methods)
        return response

    return app


def respond(answer: Answer) -> Response:
    return Response(answer.content(), answer.code, answer.headers())


def set_up_logging(level: str) -> None:
    # As gunicorn's own lines look.
    form = logging.Formatter("[%(asctime)s] [%(process)d] [%(levelname)s] %(message)s", "%Y-%m-%d %H:%M:%S %z")
    to_stderr = logging.StreamHandler(sys.stderr)
    to_stderr.setFormatter(form)
    logging.basicConfig(level=level.upper(), handlers=[to_stderr])
    # At these levels the client logs whole events, and urllib3 addresses.
    logging.getLogger("segment").setLevel(logging.CRITICAL)
    logging.getLogger("urllib3").setLevel(logging.CRITICAL)


try:
    config, problem = Config.from_env(os.environ), None
except ConfigError as error:
    # gunicorn has said so and not started. A command has to be able to say --help.
    if os.environ.get("FLASK_RUN_FROM_CLI") != "true":
        raise
    config, problem = Config.from_env({"DRY_RUN": "1"}), error
set_up_logging(config.log_level)
app = create_app(config, problem)
