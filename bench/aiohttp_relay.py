"""A relay written for speed in Python: aiohttp and uvloop, in two processes, waiting for Segment."""

import os
from typing import Any

import aiohttp
import uvloop
from aiohttp import web

SEGMENT = web.AppKey("segment", aiohttp.ClientSession)


async def webhook(request: web.Request) -> web.Response:
    event = await request.json()
    async with request.app[SEGMENT].post("/v1/batch", json=batch(event)) as answer:
        await answer.read()
    return web.json_response({"status": "delivered"}, status=200 if answer.status == 200 else 503)


def batch(event: dict[str, Any]) -> dict[str, Any]:
    call = {
        "type": "track",
        "userId": event["data"]["customer_id"],
        "event": "customerio:" + event["event_type"],
        "properties": event["data"],
        "context": {"event_id": event["event_id"]},
        "messageId": event["event_id"],
    }
    return {"batch": [call], "writeKey": os.environ["SEGMENT_WRITE_KEY"]}


async def start(app: web.Application) -> None:
    auth = aiohttp.BasicAuth(os.environ["SEGMENT_WRITE_KEY"])
    connector = aiohttp.TCPConnector(limit=0)
    app[SEGMENT] = aiohttp.ClientSession(os.environ["SEGMENT_HOST"], auth=auth, connector=connector)


def main() -> None:
    app = web.Application()
    app.router.add_post("/webhook", webhook)
    app.on_startup.append(start)
    os.fork()
    loop = uvloop.new_event_loop()
    web.run_app(
        app, host="127.0.0.1", port=int(os.environ["PORT"]), reuse_port=True, access_log=None, print=None, loop=loop
    )


if __name__ == "__main__":
    main()
