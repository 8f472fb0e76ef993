"""The relay in thirty lines: Flask, Segment's client, the mapping. docs/design.md says what it lacks."""

import os
from datetime import UTC, datetime

from flask import Flask, request
from segment.analytics.client import Client


def create_app() -> Flask:
    app = Flask(__name__)
    host = os.environ.get("SEGMENT_HOST", "https://api.segment.io")
    segment = Client(os.environ["SEGMENT_WRITE_KEY"], host=host, sync_mode=True)

    @app.post("/webhook")
    def webhook() -> dict[str, str]:
        event = request.get_json()
        data = event["data"]
        segment.track(
            user_id=data.get("customer_id") or data["identifiers"]["id"],
            event=f"customerio:{event.get('event_type') or event['object_type'] + '_' + event['metric']}",
            properties=data,
            context={"event_id": event["event_id"]},
            timestamp=datetime.fromtimestamp(event["timestamp"], UTC),
            message_id=event["event_id"],
        )
        return {"status": "delivered"}

    return app
