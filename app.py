"""The only file that knows HTTP: verify, translate, deliver, answer."""

import json
import logging
import os
import sys
import traceback
from datetime import UTC, datetime
from time import monotonic, time
from typing import Any

import gevent
from flask import Flask, Response, request
from werkzeug.exceptions import HTTPException, RequestEntityTooLarge

import dead_letters
from config import Config
from delivery import GroupCommit, NotAccepted, Uploader, shaper
from signature import BadSignature, verify
from translate import NotAnObject, Undeliverable, namespace, parse, translate

# Customer.io gives up after 4 s (docs.customer.io, Reporting webhooks, "Timeouts and
# failures"). The half second is for the way there and back.
DEADLINE = 3.5  # seconds, from a webhook's arrival to our answer

MAX_BODY = 8 * 1024 * 1024  # bytes; an email's whole body is far below

log = logging.getLogger("relay")


def create_app(config: Config) -> Flask:
    app = Flask(__name__, static_folder=None)

    names = namespace(config.segment_write_key)
    shape = shaper(config.segment_write_key)
    segment = GroupCommit(Uploader(config.segment_write_key, config.segment_host), config.segment_write_key)

    @app.post("/webhook", provide_automatic_options=False)
    def webhook() -> Response:
        # The last tenth is for saying that it was Segment who took too long.
        deadline = monotonic() + DEADLINE - 0.1
        # Over everything, the body that arrives slowly and the disk that is slow included.
        with gevent.Timeout(DEADLINE, NotAccepted("it took too long")):
            body = read_body()
            if config.signing_keys:
                headers = request.headers
                verify(
                    body,
                    headers.get("X-CIO-Timestamp", ""),
                    headers.get("X-CIO-Signature", ""),
                    config.signing_keys,
                    time(),
                )
            event: Any = body.decode(errors="replace")
            try:
                event = parse(body)
                call = translate(
                    event,
                    received=datetime.now(UTC),
                    namespace=names,
                    prefix=config.event_prefix,
                    omit=config.omit_properties,
                    echo=config.echo_to_customerio,
                )
                message, size = shape(call)
                if config.dry_run:
                    print(f"track call:\n{json.dumps(message, indent=2, ensure_ascii=False)}", flush=True)
                else:
                    segment.deliver(message, size, deadline)
            except Undeliverable as reason:
                dead_letters.keep(event, str(reason), config.dead_letter_file)
                if config.dead_letter_file:
                    log.warning("dead letter kept in %s: %s", config.dead_letter_file, reason)
                return answer(202, "dead-lettered", reason=str(reason))
            # Segment has it. Nothing above this line may answer 200.
            return answer(200, "delivered", message_id=message["messageId"])

    @app.get("/health", provide_automatic_options=False)
    def health() -> Response:
        return answer(200, "ok")

    @app.errorhandler(BadSignature)
    def unauthorized(error: BadSignature) -> Response:
        return answer(401, "unauthorized", reason=str(error))

    @app.errorhandler(NotAnObject)
    def rejected(error: NotAnObject) -> Response:
        return answer(400, "rejected", reason=str(error))

    @app.errorhandler(RequestEntityTooLarge)
    def too_large(error: RequestEntityTooLarge) -> Response:
        return answer(413, "rejected", reason=f"the body is larger than {MAX_BODY:,} bytes")

    @app.errorhandler(NotAccepted)
    def try_again(error: NotAccepted) -> Response:
        # Not 500, 502 or 429: after those, Customer.io waits an hour.
        log.warning("not accepted: %s", error)
        return answer(503, "retry", retry_after=error.retry_after, reason=str(error))

    @app.errorhandler(HTTPException)
    def other_route(error: HTTPException) -> Response:
        response = answer(error.code or 404, "rejected", reason=(error.name or "").lower())
        if isinstance(getattr(error, "valid_methods", None), list | tuple | set):
            response.headers["Allow"] = ", ".join(error.valid_methods)  # type: ignore[attr-defined]
        return response

    @app.errorhandler(Exception)
    def own_error(error: Exception) -> Response:
        # Where it happened, but not its text: that may quote the event.
        where = "".join(traceback.format_tb(error.__traceback__))
        log.error("unexpected %s, answered 503\n%s", type(error).__name__, where)
        return answer(503, "retry", retry_after=1, reason="the relay failed on it")

    return app


def read_body() -> bytes:
    """Return the body; raise RequestEntityTooLarge above MAX_BODY, NotAccepted if it does not arrive whole.

    Not request.get_data(): that cuts a body in chunks at the limit, and one whose sender
    went away where it ended, both in silence, and what is left has a wrong signature.
    """
    length = request.content_length
    if length and length > MAX_BODY:
        raise RequestEntityTooLarge
    # gunicorn ends the stream where the body ends; other servers would go on waiting.
    most = MAX_BODY + 1 if "wsgi.input_terminated" in request.environ else length or 0
    try:
        body: bytes = request.environ["wsgi.input"].read(most)
    except NotAccepted:
        raise
    except Exception:  # noqa: BLE001 - gunicorn has an error for each way in which chunks can be wrong
        raise NotAccepted("the body did not arrive whole") from None
    if len(body) > MAX_BODY:
        raise RequestEntityTooLarge
    if length and len(body) < length:
        raise NotAccepted("the body did not arrive whole")
    return body


def answer(code: int, status: str, retry_after: int | None = None, **more: Any) -> Response:
    headers = {"Retry-After": str(retry_after)} if retry_after else None
    return Response(json.dumps({"status": status, **more}), code, headers, mimetype="application/json")


def set_up_logging(level: str) -> None:
    # As gunicorn's own lines look.
    form = logging.Formatter("[%(asctime)s] [%(process)d] [%(levelname)s] %(message)s", "%Y-%m-%d %H:%M:%S %z")
    to_stderr = logging.StreamHandler(sys.stderr)
    to_stderr.setFormatter(form)
    logging.basicConfig(level=level.upper(), handlers=[to_stderr])
    # At these levels the client logs whole events, and urllib3 addresses.
    logging.getLogger("segment").setLevel(logging.CRITICAL)
    logging.getLogger("urllib3").setLevel(logging.CRITICAL)


config = Config.from_env(os.environ)
set_up_logging(config.log_level)
app = create_app(config)
