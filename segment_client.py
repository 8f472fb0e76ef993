"""Segment: what it accepts, one upload, and what each of its answers means.

segment-analytics-python makes every message (`Client.track`). The upload itself goes through an
`HTTPAdapter`, the layer of requests below its sessions: the client's own `post` has one session for
the whole process, which follows redirects and lets a .netrc replace the write key.
tests/test_segment_client.py verifies that both send the same bytes.
"""

import fcntl
import json
import math
import os
import re
import termios
from base64 import b64encode
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime
from time import monotonic
from typing import Any

import gevent
import requests
from requests.adapters import HTTPAdapter
from segment.analytics.client import Client
from segment.analytics.request import parse_retry_after
from segment.analytics.version import VERSION
from urllib3.exceptions import HTTPError

from delivery import Message
from outcomes import RateLimited, Rejected, RetryLater, TransientError
from translate import Undeliverable

# Segment rejects an event above 32 KB. Its clients disagree on whether that is 32,768 or 32,000
# bytes: use the smaller.
MAX_EVENT_BYTES = 32_000

# An event that is too large loses these first: message bodies, and all attributes of a person.
BULK = ("content", "headers", "variables")

# ... and never these, which say what the event is about: message, person and campaign.
IDENTIFYING = frozenset(
    (
        "action_id broadcast_id campaign_id campaign_name content_id customer_id delivery_id email_address "
        "email_id identifiers inbound_event_id journey_id link_id message_id message_name newsletter_id "
        "parent_action_id recipient template_id transactional_message_id trigger_event_id trigger_id"
    ).split()
)
CONTEXT_KEPT = ("event_id", "integration", "metric", "object_type", "traits")

# Cap the list of what was left out: its names come from outside.
MAX_OMITTED_NAMES = 40
MAX_OMITTED_NAME = 60  # characters

# "Re-resolve at least every 24 hours" (Segment, HTTP Tracking API): its addresses change.
RECONNECT_AFTER = 3_600  # seconds

CONNECT_SECONDS = 1.0  # for each of Segment's addresses, so that the next one is tried within the deadline

NOT_STRICT = re.compile(r"NaN|Infinity|\\ud[89a-f]")


class Body:
    """The body of an upload, which knows whether it was sent to its end.

    Segment may answer early and hang up. urllib3 then returns that answer as if the whole upload
    had been sent.
    """

    def __init__(self, text: str):
        self._data = text.encode()
        self.sent = False

    def __len__(self) -> int:
        return len(self._data)

    def __iter__(self) -> Iterator[bytes]:
        yield self._data
        self.sent = True


class SegmentClient:
    """One Segment source: makes its messages, and uploads them."""

    def __init__(self, write_key: str, host: str):
        self._client = Client(write_key or "dry-run", send=False)
        self._write_key = json.dumps(write_key)
        self._request = requests.Request(
            "POST",
            f"{host}/v1/batch",
            headers={
                **requests.utils.default_headers(),
                "Content-Type": "application/json",
                "User-Agent": f"analytics-python/{VERSION}",
                "Authorization": "Basic " + b64encode(f"{write_key}:".encode()).decode(),
            },
        ).prepare()
        self._idle: list[tuple[HTTPAdapter, float]] = []  # each with the time it was opened
        self._proxies = requests.utils.get_environ_proxies(host)
        self._ca_bundle = os.environ.get("REQUESTS_CA_BUNDLE") or os.environ.get("CURL_CA_BUNDLE") or True

    def to_message(self, call: dict[str, Any]) -> Message:
        """Return the message for these keyword arguments of `Client.track`.

        It is strict JSON of at most MAX_EVENT_BYTES: an event that is too large loses its bulk,
        listed in `context.omitted_properties`. Raise Undeliverable for an event that is too
        large even so, or nested too deeply.
        """
        try:
            text = self._track(call)
            if NOT_STRICT.search(text):
                call = scrub(call)
                text = self._track(call)
            if len(text) > MAX_EVENT_BYTES:
                text = self._track(shrink(call, len(text) - MAX_EVENT_BYTES))
        except RecursionError:
            raise Undeliverable("too_deep") from None
        if len(text) > MAX_EVENT_BYTES:
            raise Undeliverable("too_large")
        return Message(call["message_id"], text)

    def _track(self, call: dict[str, Any]) -> str:
        """Return the client's message as JSON.

        If the call is too large for the client, return a text of about the same length.
        """
        # The client writes context.library into the dict it is given.
        call = call | {"context": dict(call["context"])}
        try:
            _, message = self._client.track(**call)
        except RecursionError:  # is a RuntimeError
            raise
        except RuntimeError:  # above 32,768 bytes; the error quotes the event
            return json.dumps(call, default=str) + " " * 200  # a message is some 150 bytes longer
        return json.dumps(message)

    def upload(self, messages: list[Message], seconds: float) -> None:
        """Return if Segment answers within `seconds` that it has all `messages`.

        Raise Rejected if it never takes them as they are, RateLimited if it wants no calls for
        a while, TransientError if another attempt may help, and RetryLater for everything else.
        """
        adapter, opened = self._take_adapter()
        try:
            self._post(adapter, messages, seconds)
        except BaseException:
            # After a failure, another answer might still arrive on this connection.
            adapter.close()
            raise
        self._idle.append((adapter, opened))

    def _take_adapter(self) -> tuple[HTTPAdapter, float]:
        """Return an adapter that nobody else uses, so that no two uploads share a connection."""
        while self._idle:
            adapter, opened = self._idle.pop()
            if monotonic() - opened < RECONNECT_AFTER:
                return adapter, opened
            adapter.close()
        return HTTPAdapter(pool_connections=1, pool_maxsize=1), monotonic()

    def _post(self, adapter: HTTPAdapter, messages: list[Message], seconds: float) -> None:
        sent_at = json.dumps(datetime.now(UTC).isoformat())
        batch = ", ".join(message.json for message in messages)
        body = Body(f'{{"batch": [{batch}], "sentAt": {sent_at}, "writeKey": {self._write_key}}}')
        request = self._request.copy()
        request.prepare_body(body, None)
        answered = False
        try:
            # A socket's timeout starts anew with each byte; this one also ends an answer that comes byte by byte.
            with gevent.Timeout(seconds, False):
                response = adapter.send(
                    request,
                    stream=True,
                    timeout=(min(CONNECT_SECONDS, seconds), seconds),
                    verify=self._ca_bundle,
                    proxies=self._proxies,
                )
                early = not body.sent or not_received(response)
                _ = response.content  # to its end
                answered = True
        except requests.ReadTimeout:
            pass
        except (OSError, HTTPError):  # requests' errors are OSErrors; some of urllib3's get past it
            self._reconnect()
            raise disconnected() from None
        if not answered:
            raise RetryLater("timeout")
        if early:  # an answer, but not to all of the upload
            raise disconnected()
        check(response)

    def _reconnect(self) -> None:
        """Close idle connections: they may be as dead as the one that failed."""
        while self._idle:
            self._idle.pop()[0].close()


def disconnected() -> TransientError:
    return TransientError("connection")


def not_received(response: requests.Response) -> bool:
    """Say whether some of the upload has not even arrived at the other side, which answers all the same."""
    sock = getattr(response.raw.connection, "sock", None)  # None once the other side has hung up
    with suppress(OSError):  # not a system that tells
        return sock is not None and any(fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, bytes(4)))
    return False


def check(response: requests.Response) -> None:
    """Return if Segment says that it has the upload; raise what its answer means if not."""
    status = response.status_code
    if status in (400, 413):
        raise Rejected(status)
    if status == 429:
        raise RateLimited("rate_limited", retry_after=parse_retry_after(response) or 1)
    if status in (401, 403):
        raise RetryLater("write_key", f" ({status})")
    if status >= 500 or status == 408 or status < 200:  # after a 1xx the answer is still to come
        raise TransientError(f"segment_{status}")
    if response.is_redirect:
        raise RetryLater("redirect")
    if not 200 <= status < 300:
        raise RetryLater(f"segment_{status}")
    if not response.content:  # http.client accepts a truncated head
        raise disconnected()
    try:
        answer = json.loads(response.content)
    except ValueError:
        answer = None
    if not isinstance(answer, dict):  # a captive portal or a proxy answers 200 to anything
        raise RetryLater("not_segment")
    if answer.get("success") is not True:
        raise TransientError("not_success")


def scrub(value: Any) -> Any:
    """Return `value` as strict JSON allows it: NaN and infinities null, lone surrogates replaced.

    Raise RecursionError if it nests too deeply.
    """
    if isinstance(value, str):
        return value.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {scrub(key): scrub(item) for key, item in value.items()}
    if isinstance(value, list):
        return [scrub(item) for item in value]
    return value


def shrink(call: dict[str, Any], excess: int) -> dict[str, Any]:
    """Return `call` without its largest parts, at least `excess` bytes (as JSON) shorter.

    Bulk goes first, then the largest. What identifies the message, the person and the campaign
    stays. `context.omitted_properties` names what went (parts of the context as "context.name").
    Raise Undeliverable if nothing more can be left out.
    """
    properties, context = dict(call["properties"]), dict(call["context"])
    parts = []
    for owner, label in ((properties, ""), (context, "context.")):
        for name, value in owner.items():
            size = len(json.dumps({name: value}))
            bulk = owner is properties and name in BULK
            essential = name in IDENTIFYING or (owner is context and name in CONTEXT_KEPT)
            # No identifier is this long, whatever its name.
            if not essential or size > 1_000:
                parts.append((essential, not bulk, -size, label + name, owner, name))
    parts.sort(key=lambda part: part[:3])

    omitted = 0
    named: list[str] = []
    excess += len('"omitted_properties": [], "and 1000000 more", ')
    for *_, negative_size, label, owner, name in parts:
        if excess <= 0:
            break
        del owner[name]
        omitted += 1
        excess += negative_size
        if len(named) < MAX_OMITTED_NAMES:
            named.append(label[:MAX_OMITTED_NAME])
            excess += len(json.dumps(named[-1])) + len(", ")
    if excess > 0:
        raise Undeliverable("too_large")
    if omitted > len(named):
        named.append(f"and {omitted - len(named)} more")
    context["omitted_properties"] = named
    return call | {"properties": properties, "context": context}
