"""What an answer of Segment means for an upload. Pure."""

import json
from types import SimpleNamespace
from typing import Any, Protocol

from segment.analytics.request import parse_retry_after

from relay.outcomes import RateLimited, Rejected, RetryLater, TransientError

REDIRECTS = (301, 302, 303, 307, 308)


class Headers(Protocol):
    def get(self, name: str, /) -> str | None: ...


def interpret(status: int, headers: Headers, body: bytes | None) -> None:
    """Return if this answer says that Segment has the upload; otherwise raise what it means.

    `body` is None if it is larger than any of Segment's. Segment's own answers are JSON objects, those of a proxy
    or a captive portal in its place are not.
    """
    answer = json_object(body or b"")
    if status >= 600:
        raise RetryLater("not_segment")
    if status == 429:
        raise RateLimited(parse_retry_after(SimpleNamespace(headers=headers)) or 1)
    if status >= 500 or status == 408 or status < 200:  # after a 1xx the answer is still to come
        raise TransientError(f"segment_{status}")
    if status in (400, 413):
        raise Rejected(status, by_segment=answer is not None)
    if status in REDIRECTS and headers.get("Location") is not None:
        raise RetryLater("redirect")
    if status == 407 or (status >= 400 and answer is None):  # only a proxy asks for a proxy's login
        raise RetryLater("not_segment")
    if status in (401, 403):
        raise RetryLater("write_key", f" ({status})")
    if status >= 300:
        raise RetryLater(f"segment_{status}")
    if body == b"":  # http.client accepts a truncated head
        raise TransientError("connection")
    if answer is None:
        raise RetryLater("not_segment")
    if answer.get("success") is not True:
        raise TransientError("not_success")


def json_object(body: bytes) -> dict[str, Any] | None:
    """Return the JSON object that `body` is, or None if it isn't one."""
    try:
        answer = json.loads(body)
    except (ValueError, RecursionError):
        return None
    return answer if isinstance(answer, dict) else None
