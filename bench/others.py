"""What the relay is compared with: bare Flask, and two uses of Segment's client, as gunicorn applications."""

import os
from typing import Any

from flask import Flask, request


def bare() -> Flask:
    """Parse the JSON and answer: the ceiling."""
    app = Flask(__name__)

    @app.post("/webhook")
    def webhook() -> dict[str, Any]:
        keep_connection()
        return {"status": "received", "event_id": request.get_json()["event_id"]}

    return app


def with_client(**options: Any) -> Flask:
    """Hand each webhook to Segment's client: one call each if `sync_mode`, else its queue in memory."""
    from segment.analytics.client import Client

    app = Flask(__name__)
    segment = Client(os.environ["SEGMENT_WRITE_KEY"], host=os.environ["SEGMENT_HOST"], **options)

    @app.post("/webhook")
    def webhook() -> dict[str, Any]:
        keep_connection()
        event = request.get_json()
        segment.track(
            user_id=event["data"]["customer_id"],
            event="customerio:" + event["event_type"],
            properties=event["data"],
            context={"event_id": event["event_id"]},
            message_id=event["event_id"],
        )
        return {"status": "accepted"}

    return app


def keep_connection() -> None:
    """The relay's worker ends connections of strangers after five seconds."""
    request.environ["gunicorn.socket"].worth_keeping = True
