"""The page at /, and /metrics: what an operator, and whoever tries the relay, wants to see."""

import json
import secrets
import time
from collections import deque
from typing import Any
from urllib.parse import urlsplit
from uuid import uuid4

from flask import Flask, Response, abort, redirect, render_template, request

import metrics
import samples
import signature
from config import SEGMENT_HOST, Config

EU_HOST = "https://events.eu1.segmentapis.com"

# In a dry run only, which is on the machine of who tries it: the last webhooks and their calls.
_seen: deque[tuple[str, str, str]] = deque(maxlen=20)


def seen(event: Any, became: dict[str, Any] | str) -> None:
    """Remember a webhook for the page of a dry run, with its track call or the reason why it has none."""
    title, call = (became, "") if isinstance(became, str) else (str(became["event"]), _pretty(became))
    _seen.appendleft((title, _pretty(event), call))


def _pretty(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, indent=2, ensure_ascii=False)


def register(app: Flask, config: Config) -> None:
    @app.get("/", provide_automatic_options=False)
    def page() -> Response:
        nonce = secrets.token_urlsafe(16)
        summary = metrics.summary()
        html = render_template(
            "page.html",
            nonce=nonce,
            address=_address(),
            signed=bool(config.signing_keys),
            destination=_destination(config),
            dry_run=config.dry_run,
            started=metrics.STARTED,
            now=time.time(),
            chart=_chart(metrics.per_minute()),
            warnings=config.warnings,
            seen=list(_seen) if config.dry_run else [],
            **summary,
        )
        response = Response(html)
        response.headers["Content-Security-Policy"] = (
            f"default-src 'none'; style-src 'nonce-{nonce}'; script-src 'nonce-{nonce}'; connect-src 'self'; "
            "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
        )
        response.headers["X-Content-Type-Options"] = "nosniff"
        response.headers["Referrer-Policy"] = "no-referrer"
        response.headers["Cache-Control"] = "no-store"
        return response

    @app.post("/sample", provide_automatic_options=False)
    def send_sample() -> Any:
        if not config.dry_run:
            abort(404)
        body = json.dumps(samples.sample("email_delivered", str(uuid4()), int(time.time()))).encode()
        headers = signature.sign(body, str(int(time.time())), config.signing_keys[0]) if config.signing_keys else {}
        # Through the real route, as if it came from outside.
        app.test_client().post("/webhook", data=body, headers=headers)
        return redirect("/", 303)

    @app.get("/metrics", provide_automatic_options=False)
    def prometheus() -> Response:
        return Response(metrics.text(), content_type="text/plain; version=0.0.4; charset=utf-8")

    @app.template_filter()
    def ago(seconds: float) -> str:
        """Say how long ago something was, in words."""
        for size, name in ((86_400, "day"), (3_600, "hour"), (60, "minute")):
            if seconds >= size:
                number = int(seconds // size)
                return f"{number} {name}{'s' if number > 1 else ''} ago"
        return "just now" if seconds < 5 else f"{int(seconds)} seconds ago"

    @app.template_filter()
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
