"""Fakes on loopback of the two APIs that `check` asks, with the errors that the real ones have.

Written from the documentation: Segment's Public API (github.com/segmentio/public-api-sdk-python) and
Customer.io's App API (docs.customer.io/integrations/api/app). Neither was reached from here.

A fault is what happens to every question instead of a proper answer:

    401, 403, 429, 500 ...   that status, any number ("429:7": with Retry-After: 7)
    hang     never an answer                    close    closed without an answer
    html     200 and a web page                 list     200 and JSON, not an object
    redirect 302 to the same question           empty    200 and an object with nothing in it
    drip     a 200 that never ends, byte by byte        bytes    200 and these bytes
    drip-head  the same with its head

`python proof/fake_apis.py` runs both and a fake Segment, and prints the settings for `check`.
"""

import json
import ssl
import threading
import time
from collections import deque
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple, Self
from urllib.parse import parse_qsl, urlsplit

from fake_segment import FakeSegment
from harness import KEYS, WRITE_KEY

TOKEN = "a-token-of-the-tests"  # noqa: S105 - of the fakes alone
PAGE = b"<!doctype html><title>Sign in</title>"
MINUTE = timedelta(minutes=1)

Answer = tuple[int, dict[str, Any]]


class FakeApi:
    """An API that answers GET requests with a token."""

    def __init__(self, port: int = 0, tls: ssl.SSLContext | None = None) -> None:
        self.token = TOKEN
        self.fault: str | bytes | None = None
        self.faults: deque[str | bytes | None] = deque()  # one each for the next questions
        self.requests: list[tuple[str, dict[str, str], dict[str, str]]] = []  # path, query, headers
        self._stopped = threading.Event()
        api = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                api._serve(self)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self._server.daemon_threads = True
        if tls:
            self._server.socket = tls.wrap_socket(self._server.socket, server_side=True)
        self.url = f"http{'s' if tls else ''}://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.001,), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(10)

    def answer(self, path: str, query: dict[str, str], headers: dict[str, str]) -> Answer:
        raise NotImplementedError

    def _serve(self, request: BaseHTTPRequestHandler) -> None:
        url = urlsplit(request.path)
        query = dict(parse_qsl(url.query))
        headers = {name.lower(): value for name, value in request.headers.items()}
        self.requests.append((url.path, query, headers))
        fault = (self.faults.popleft() if self.faults else self.fault) or ""
        status, body, more = 200, b"", {}
        match fault if isinstance(fault, bytes) else fault.split(":"):
            case bytes(body):
                pass
            case ["hang"]:
                self._stopped.wait()
                return
            case ["drip" | "drip-head"]:
                request.wfile.write(b"HTTP/1.0 200 OK\r\nX: " + b"\r\n\r\n" * (fault == "drip"))
                with suppress(OSError):
                    while not self._stopped.wait(0.05):
                        request.wfile.write(b" ")
                return
            case ["close"]:
                return
            case ["html"]:
                body = PAGE
            case ["list"]:
                body = b"[]"
            case ["empty"]:
                body = b"{}"
            case ["redirect"]:
                status, more = 302, {"Location": self.url + request.path}
            case [number, *retry_after] if number.isdigit():
                status, more = int(number), dict.fromkeys(("Retry-After",) if retry_after else (), *retry_after)
                body = error(status)
            case _ if headers.get("authorization") != f"Bearer {self.token}":
                status, body = 401, error(401)
            case _:
                status, answer = self.answer(url.path, query, headers)
                body = json.dumps(answer).encode()
        request.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(body)), **more}.items():
            request.send_header(name, value)
        request.end_headers()
        request.wfile.write(body)


def error(status: int) -> bytes:
    return json.dumps({"errors": [{"type": "on-demand", "message": "on demand", "status": status}]}).encode()


class Happened(NamedTuple):
    """What Segment reports of one minute."""

    event: str
    total: int = 1
    reason: str = ""  # why it was dropped; "" if it was received
    minutes_ago: int = 0


class FakeSegmentApi(FakeApi):
    """Segment's Public API: the sources of a workspace, and the delivery overview of each.

    Documented: pages of 1 to 1,000; no write keys without the Source Admin permission; by the minute
    at most four hours, at most 48 hours ago. Not documented is how far the reports lag: here they
    have the events of `segment` after `lag` questions about them.
    """

    def __init__(self, segment: FakeSegment | None = None, port: int = 0, tls: ssl.SSLContext | None = None) -> None:
        super().__init__(port, tls)
        self.sources = [source("Website", ["another-key"]), source("Customer.io relay", [WRITE_KEY])]
        self.page = 1000  # the most sources or rows on a page
        self.source_admin = True
        self.business_plan = True
        self.plain_lists = False  # `data` is the list itself
        self.beside = False  # `pagination` stands beside `data`
        self.happened: list[Happened] = []
        self.lag = 0
        self.late: list[Happened] = []  # reported after the first two questions
        self.drops = ""  # why the events of `segment` are dropped
        self._segment = segment
        self._asked = 0

    def answer(self, path: str, query: dict[str, str], headers: dict[str, str]) -> Answer:
        kind = path.removeprefix("/delivery-overview/")
        version = "v1" if kind == path else "v1beta"
        if not 1 <= int(query.get("pagination.count", 0)) <= 1000:
            return 422, {"errors": [{"type": "validation", "field": "pagination.count"}]}
        if headers.get("accept") != f"application/vnd.segment.{version}+json":
            return 404, {"errors": [{"type": "not-found", "message": "no such version"}]}
        if path == "/sources":
            return self._page("sources", [self._shown(source) for source in self.sources], query)
        if kind not in ("successfully-received", "failed-on-ingest"):
            return 404, {"errors": [{"type": "not-found"}]}
        return self._overview(kind == "failed-on-ingest", query)

    def _shown(self, source: dict[str, Any]) -> dict[str, Any]:
        return source if self.source_admin else source | {"writeKeys": []}

    def _overview(self, dropped: bool, query: dict[str, str]) -> Answer:
        if not self.business_plan:
            return 403, {"errors": [{"type": "forbidden"}]}
        if query.get("sourceId") not in [source["id"] for source in self.sources]:
            return 404, {"errors": [{"type": "not-found", "field": "sourceId"}]}
        now = datetime.now(UTC)
        since, until = (datetime.fromisoformat(query[name]) for name in ("startTime", "endTime"))
        group = query.get("groupBy.0")
        sound = timedelta() < until - since <= timedelta(hours=4) and now - since < timedelta(hours=48)
        groups = (None, "eventName", "eventType", *(["discardReason"] if dropped else []))
        if not sound or query.get("granularity") != "MINUTE" or group not in groups:
            return 422, {"errors": [{"type": "validation"}]}
        self._asked += 1
        happened = self.happened + (self.late if self._asked > 2 else [])
        happened += self._of_segment() if self._asked > self.lag else []
        counts: dict[str | None, dict[datetime, int]] = {}
        for event in happened:
            minute = (now - event.minutes_ago * MINUTE).replace(second=0, microsecond=0)
            if bool(event.reason) == dropped and since - MINUTE < minute <= until:  # those that have begun
                names = {"eventName": event.event, "eventType": "track", "discardReason": event.reason}
                series = counts.setdefault(names[group] if group else None, {})
                series[minute] = series.get(minute, 0) + event.total
        rows = [
            ({group: name} if group else {})
            | {
                "total": sum(series.values()),
                "series": [
                    {"time": f"{minute:%Y-%m-%dT%H:%M:%SZ}", "count": count} for minute, count in series.items()
                ],
            }
            for name, series in counts.items()
        ]
        return self._page("dataset", rows, query)

    def _of_segment(self) -> list[Happened]:
        kept = self._segment.kept.values() if self._segment else ()
        return [Happened(message["event"], reason=self.drops) for message in list(kept)]

    def _page(self, name: str, items: list[dict[str, Any]], query: dict[str, str]) -> Answer:
        start = int(query.get("pagination.cursor", "0"))
        end = start + min(self.page, int(query["pagination.count"]))
        pagination: dict[str, Any] = {"current": str(start), "totalEntries": len(items)}
        if end < len(items):
            pagination["next"] = str(end)
        if self.plain_lists:
            return 200, {"data": items[start:end], "pagination": pagination}
        if self.beside:
            return 200, {"data": {name: items[start:end]}, "pagination": pagination}
        return 200, {"data": {name: items[start:end], "pagination": pagination}}


def source(name: str, keys: list[str], enabled: bool = True) -> dict[str, Any]:
    """Return a source as Segment describes it."""
    slug = name.lower().replace(" ", "-")
    return {"id": f"id-{slug}", "slug": slug, "name": name, "enabled": enabled, "writeKeys": keys, "settings": {}}


class FakeCustomerioApi(FakeApi):
    """Customer.io's App API: the reporting webhooks; ten questions a second."""

    def __init__(self, port: int = 0) -> None:
        super().__init__(port)
        self.webhooks: list[dict[str, Any]] = []
        self.limit = 10  # questions a second
        self._times: deque[float] = deque()

    def answer(self, path: str, query: dict[str, str], headers: dict[str, str]) -> Answer:
        now = time.monotonic()
        while self._times and now - self._times[0] >= 1:
            self._times.popleft()
        if len(self._times) >= self.limit:
            return 429, {"meta": {"error": "too many requests"}}
        self._times.append(now)
        if path != "/v1/reporting_webhooks":
            return 404, {"meta": {"error": "not found"}}
        return 200, {"reporting_webhooks": self.webhooks}


def webhook(endpoint: str, events: list[str], **changes: Any) -> dict[str, Any]:
    """Return a reporting webhook as Customer.io describes it."""
    return {
        "id": 1,
        "name": "Relay",
        "type": "webhook",
        "endpoint": endpoint,
        "disabled": False,
        "full_resolution": True,
        "with_content": False,
        "events": events,
    } | changes


if __name__ == "__main__":
    with FakeSegment(8099) as segment, FakeSegmentApi(segment, 8101) as segment_api, FakeCustomerioApi(8102) as app_api:
        segment_api.lag = 8
        segment_api.happened = [
            Happened("customerio:email_opened", 1_184, minutes_ago=2),
            Happened("customerio:email_opened", 96, "source_disabled", minutes_ago=191),
        ]
        app_api.webhooks = [
            webhook("https://relay.example.com/webhook", ["email_delivered", "email_opened", "email_clicked"])
        ]
        for name, value in {
            **KEYS,
            "SEGMENT_HOST": segment.url,
            "SEGMENT_PUBLIC_API_URL": segment_api.url,
            "SEGMENT_PUBLIC_API_TOKEN": TOKEN,
            "CUSTOMERIO_APP_API_URL": app_api.url,
            "CUSTOMERIO_APP_API_KEY": TOKEN,
        }.items():
            print(f"export {name}={value}", flush=True)
        threading.Event().wait()
