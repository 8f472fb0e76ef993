"""The page at /, with what it fetches, /metrics and /delivering."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from uuid import uuid4

from flask import Blueprint, Response, abort, current_app, render_template, request
from markupsafe import escape

from config import DRY_RUN_ON, Config
from ops import samples
from ops.monitor.metrics import Metrics
from ops.page import advice
from ops.page.inspector import Inspector, Seen
from relay import signature
from relay.body import MAX_BODY
from relay.outcomes import DEAD_LETTERED, DELIVERED, DRY_RUN, IGNORED, REASONS, REJECTED, RETRIED, UNAUTHORIZED

T = TypeVar("T")

ADDRESS = "{address of the relay}"  # in the page, until it is known where it is read

STATIC = Path(__file__).parent / "static"

HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
        "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


# How the headers begin that proxies and tunnels add.
FORWARDED = (
    "x-forwarded",
    "forwarded",
    "via",
    "cf-",
    "x-real-",
    "x-client-",
    "true-client-",
    "x-original-",
    "x-envoy-",
)


class Bar(NamedTuple):
    """A part of the chart, which is 600 by 80."""

    outcome: str
    x: int
    y: float
    height: float


def once_a_second(make: Callable[[], T]) -> Callable[[], T]:
    """Return a function that returns what `make` returned at most a second ago, however often it is called."""
    latest: tuple[float, T] | None = None

    def cached() -> T:
        nonlocal latest
        if not latest or time.monotonic() - latest[0] > 1:
            latest = time.monotonic(), make()
        return latest[1]

    return cached


def blueprint(config: Config, metrics: Metrics, started: float, inspector: Inspector) -> Blueprint:
    """Return the routes of the page. `started` is in unix seconds."""
    pages = Blueprint("page", __name__, template_folder="templates")
    files = {path.name: path.read_bytes() for path in STATIC.iterdir()}

    # Rendered rarely, so that requests for these can't hold up webhooks.
    metrics_text = once_a_second(metrics.text)

    @once_a_second
    def page_texts() -> dict[bool, str]:
        """Return the page as it is for addresses that Customer.io reaches, and for others."""
        return {
            reachable: render_template("page.html", **_values(config, metrics, started, reachable))
            for reachable in (True, False)
        }

    @pages.get("/", provide_automatic_options=False)
    def page() -> Response:
        response = Response(page_texts()[not advice.is_private(_host())].replace(ADDRESS, escape(_address())))
        response.add_etag()
        return response.make_conditional(request)  # type: ignore[return-value]

    @pages.get("/static/<name>", provide_automatic_options=False)
    def static(name: str) -> Response:
        if name not in files:
            abort(404)
        kind = "text/javascript" if name.endswith(".js") else "text/css"
        return Response(files[name], content_type=f"{kind}; charset=utf-8")

    @pages.get("/metrics", provide_automatic_options=False)
    def prometheus() -> Response:
        return Response(metrics_text(), content_type="text/plain; version=0.0.4; charset=utf-8")

    @once_a_second
    def why_not() -> str:
        return advice.not_delivering(_health(metrics), time.time(), config)

    @pages.get("/delivering", provide_automatic_options=False)
    def delivering() -> Any:
        if reason := why_not():
            return {"status": "not delivering", "reason": reason}, 503
        return {"status": "delivering"}

    @pages.after_request
    def add_headers(response: Response) -> Response:
        response.headers.update(HEADERS)
        return response

    if config.dry_run:
        _add_inspector(pages, config, inspector)
    pages.add_app_template_filter(ago)
    pages.add_app_template_filter(instant)
    return pages


def _add_inspector(pages: Blueprint, config: Config, inspector: Inspector) -> None:
    """Add the routes that show webhooks, which a live relay doesn't have."""

    def find(number: int) -> Seen:
        return inspector.find(number) or abort(404)

    @pages.get("/webhooks", provide_automatic_options=False)
    def webhooks() -> Any:
        return {"webhooks": inspector.after(request.args.get("after", 0, int))}

    @pages.get("/webhooks/<int:number>", provide_automatic_options=False)
    def webhook(number: int) -> Any:
        return inspector.shown(find(number))

    @pages.get("/webhooks/<int:number>/<any(webhook, call, curl):part>", provide_automatic_options=False)
    def whole(number: int, part: str) -> Response:
        found = find(number)
        if part == "curl" and not found.whole:
            abort(404)
        text = inspector.curl(found, _address(), _at_home()) if part == "curl" else inspector.text(found, part)
        # A lone surrogate is written as its JSON escape.
        return Response(text.encode(errors="backslashreplace"), content_type="text/plain; charset=utf-8")

    @pages.get("/samples/<any({names}):name>".format(names=", ".join(samples.EVENTS)), provide_automatic_options=False)
    def sample(name: str) -> Any:
        return samples.sample(name, str(uuid4()), int(time.time()))

    @pages.post("/sample", provide_automatic_options=False)
    def send_sample() -> Any:
        if request.mimetype != "application/json":  # other sites can't send that one from a visitor's browser
            abort(415)
        request.max_content_length = MAX_BODY
        body = request.get_data()
        headers = signature.sign(body, str(int(time.time())), config.signing_keys[0]) if config.signing_keys else {}
        seen: dict[str, int] = {}  # observe() fills in its number
        # Through the real route, as if it came from outside.
        answer = current_app.test_client().post(
            "/webhook", data=body, headers=headers, environ_overrides={"relay.sample": seen}
        )
        return {"status": answer.status_code, "answer": answer.get_json(), **seen}


def _health(metrics: Metrics) -> advice.Health:
    return advice.Health(
        metrics.failures(outcome.label for outcome in (RETRIED, UNAUTHORIZED, REJECTED, DEAD_LETTERED)),
        metrics.failures(outcome.label for outcome in (DELIVERED, DRY_RUN)),
        metrics.failures([IGNORED.label]),
        metrics.per_minute(),
        metrics.failing_since(),
    )


def _values(config: Config, metrics: Metrics, started: float, reachable: bool) -> dict[str, Any]:
    """Return what the template needs; `reachable` says whether Customer.io could reach the reader's address."""
    now = time.time()
    health = _health(metrics)
    letters_in = "in the file that DEAD_LETTER_FILE names" if config.dead_letter_file else "on the log"
    troubles = advice.wrong_now(health, now, letters_in)
    last_delivered, first_genuine = metrics.last_delivered(), metrics.first_genuine()
    last_real_delivery = metrics.last_real_delivery()
    seen = advice.Progress(
        refused=any(trouble.reason in ("write_key", "every_event") for trouble in troubles),
        reachable=reachable,
        genuine=f"It arrived {ago(now - first_genuine)}, at {instant(first_genuine)}." if first_genuine else "",
        delivered=f"The last was accepted {ago(now - last_real_delivery)}." if last_real_delivery else "",
    )
    outcomes = metrics.outcomes()
    unused = (DELIVERED if config.dry_run else DRY_RUN).label, IGNORED.label
    shown = [outcome for outcome in REASONS if outcomes[outcome] or outcome not in unused]
    return {
        "address": ADDRESS,
        "dry_run": config.dry_run,
        "signatures": config.signatures,
        "started": started,
        "now": now,
        "troubles": troubles,
        "over": advice.over(health, now)[:6],
        "settings": [warning for warning in config.warnings if warning != DRY_RUN_ON],
        "outcomes": outcomes,
        "shown": shown,
        "titles": advice.TITLES,
        "chart": _chart({outcome: health.per_minute[outcome] for outcome in shown}),
        "delay": advice.delay(health),
        "last_delivered": last_delivered,
        "samples": samples.METRICS,
        "channels": samples.CHANNELS,
        "steps": advice.steps(config, seen),
    }


def _at_home() -> bool:
    """Return whether the reader is on this machine or network, with no proxy or tunnel in between.

    Only they get a signature: it is good for a live relay with the same key too.
    """
    forwarded = any(name.lower().startswith(FORWARDED) for name, _ in request.headers)
    return not forwarded and advice.is_private(request.remote_addr or "") and advice.is_private(_host())


def ago(seconds: float) -> str:
    """Say how long ago something was, in words."""
    return "just now" if seconds < 5 else f"{advice.duration(seconds)} ago"


def instant(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(seconds))


def _address() -> str:
    """Return the address for Customer.io, as the browser sees it: behind Heroku's router that is https."""
    scheme = request.headers.get("X-Forwarded-Proto", request.scheme).split(",")[0].strip()
    return f"{scheme if scheme in ('http', 'https') else 'https'}://{request.host}/webhook"


def _host() -> str:
    """Return the name or IP address in it."""
    host = request.host if "Host" in request.headers else ""  # werkzeug would take the server's own
    return host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]


def _chart(series: dict[str, list[float]]) -> dict[str, Any]:
    """Return the bars of a chart of the last hour, a stack for each minute, and the same in words."""
    totals = [sum(minute) for minute in zip(*series.values(), strict=True)]
    most = max([*totals, 1])
    bars = []
    tops = [80.0] * len(totals)
    for outcome, counts in series.items():
        for index, count in enumerate(counts):
            if count:
                height = max(round(78 * count / most, 1), 1.5)  # few among many stay visible
                tops[index] -= height
                bars.append(Bar(outcome, index * 10, round(tops[index], 1), height))
    words = [
        f"{advice.TITLES[outcome]}: {int(sum(counts)):,} in all, {int(max(counts)):,} at the most"
        for outcome, counts in series.items()
        if any(counts)
    ]
    return {"bars": bars, "most": int(max(totals, default=0)), "words": "; ".join(words) or "none"}
