"""The ceiling: parse the JSON, answer."""

from flask import Flask, request

app = Flask(__name__)


@app.post("/webhook")
def webhook():
    return {"status": "received", "event_id": request.get_json()["event_id"]}
