"""The client as it is by default: a queue in memory, and an answer before Segment has anything."""

import os

from flask import Flask, request
from segment.analytics.client import Client

app = Flask(__name__)
segment = Client(os.environ["SEGMENT_WRITE_KEY"], host=os.environ["SEGMENT_HOST"], max_queue_size=1_000_000)


@app.post("/webhook")
def webhook():
    event = request.get_json()
    segment.track(
        user_id=event["data"]["customer_id"],
        event="customerio:" + event["event_type"],
        properties=event["data"],
        context={"event_id": event["event_id"]},
        message_id=event["event_id"],
    )
    return {"status": "accepted"}
