"""The page at /, and /metrics: what an operator, and whoever tries the relay, wants to see."""

import json
import secrets
import time
from collections import deque
from collections.abc import Callable
from typing import Any, TypeVar
from urllib.parse import urlsplit
from uuid import uuid4

from flask import Blueprint, Response, abort, current_app, redirect, render_template, request
from markupsafe import escape

import signature
from config import SEGMENT_HOST, Config
from delivery import Message
from ops import samples
from ops.metrics import Metrics

T = TypeVar("T")

ADDRESS = "{address of the relay}"  # in the page, until it is known where it is read

EU_HOST = "https://events.eu1.segmentapis.com"

# In a dry run only, which is on the machine of whoever tries it: the last webhooks and their calls.
_shown: deque[tuple[str, str, str]] = deque(maxlen=20)


def show(event: Any, became: Message | str) -> None:
    """Show a webhook of a dry run, with its track call or the reason why it is a dead letter."""
    if isinstance(became, str):
        _shown.appendleft((f"a dead letter: {became}", pretty(event), ""))
        return
    call = json.loads(became.json)
    print(f"track call:\n{pretty(call)}", flush=True)
    _shown.appendleft((call["event"], pretty(event), pretty(call)))


def pretty(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, indent=2, ensure_ascii=False)


def once_a_second(make: Callable[[], T]) -> Callable[[], T]:
    """Return a function that returns what `make` returned at most a second ago, however often it is called."""
    latest: tuple[float, T] | None = None

    def cached() -> T:
        nonlocal latest
        if not latest or time.monotonic() - latest[0] > 1:
            latest = time.monotonic(), make()
        return latest[1]

    return cached


def blueprint(config: Config, metrics: Metrics, started: float) -> Blueprint:
    """Return the routes of the page. `started` is in unix seconds."""
    pages = Blueprint("page", __name__, template_folder="templates")

    # Whoever asks for these, and however often, webhooks come first.
    metrics_text = once_a_second(metrics.text)

    @once_a_second
    def page_text() -> tuple[str, str]:
        nonce = secrets.token_urlsafe(16)
        html = render_template(
            "page.html",
            nonce=nonce,
            address=ADDRESS,
            signed=bool(config.signing_keys),
            destination=_destination(config),
            dry_run=config.dry_run,
            started=started,
            now=time.time(),
            chart=_chart(metrics.per_minute()),
            warnings=config.warnings,
            shown=list(_shown) if config.dry_run else [],
            outcomes=metrics.outcomes(),
            last_delivered=metrics.last_delivered(),
            failures=metrics.failures(),
        )
        return html, nonce

    @pages.get("/", provide_automatic_options=False)
    def page() -> Response:
        html, nonce = page_text()
        response = Response(html.replace(ADDRESS, escape(_address())))
        response.headers["Content-Security-Policy"] = (
            f"default-src 'none'; style-src 'nonce-{nonce}'; script-src 'nonce-{nonce}'; connect-src 'self'; "
            "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
        )
        response.headers["X-Content-Type-Options"] = "nosniff"
        response.headers["Referrer-Policy"] = "no-referrer"
        response.headers["Cache-Control"] = "no-store"
        return response

    @pages.post("/sample", provide_automatic_options=False)
    def send_sample() -> Any:
        if not config.dry_run:
            abort(404)
        body = json.dumps(samples.sample("email_delivered", str(uuid4()), int(time.time()))).encode()
        headers = signature.sign(body, str(int(time.time())), config.signing_keys[0]) if config.signing_keys else {}
        # Through the real route, as if it came from outside.
        current_app.test_client().post("/webhook", data=body, headers=headers)
        return redirect("/", 303)

    @pages.get("/metrics", provide_automatic_options=False)
    def prometheus() -> Response:
        return Response(metrics_text(), content_type="text/plain; version=0.0.4; charset=utf-8")

    pages.add_app_template_filter(ago)
    pages.add_app_template_filter(instant)
    return pages


def ago(seconds: float) -> str:
    """Say how long ago something was, in words."""
    for size, name in ((86_400, "day"), (3_600, "hour"), (60, "minute")):
        if seconds >= size:
            number = int(seconds // size)
            return f"{number} {name}{'s' if number > 1 else ''} ago"
    return "just now" if seconds < 5 else f"{int(seconds)} seconds ago"


def instant(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(seconds))


def _address() -> str:
    """Return the address for Customer.io, as the browser sees it: behind Heroku's router that is https."""
    scheme = request.headers.get("X-Forwarded-Proto", request.scheme).split(",")[0].strip()
    return f"{scheme if scheme in ('http', 'https') else 'https'}://{request.host}/webhook"


def _destination(config: Config) -> str:
    if config.dry_run:
        return "nowhere: this is a dry run, track calls are only shown"
    known = {SEGMENT_HOST: "Segment, in the US", EU_HOST: "Segment, in the EU"}
    return known.get(config.segment_host, f"another host, {urlsplit(config.segment_host).hostname}")


def _chart(counts: list[int]) -> dict[str, Any]:
    """Return the bars of an SVG of 600 by 80: x, y and height each."""
    most = max([*counts, 1])
    bars = [
        (index * 10, round(80 - 78 * count / most, 1), round(78 * count / most, 1))
        for index, count in enumerate(counts)
    ]
    return {"bars": bars, "most": most, "total": sum(counts)}
