"""The mapping: a Customer.io reporting event -> the arguments of Segment's `Client.track`. Pure."""

import hashlib
import json
import re
from datetime import UTC, datetime, timedelta
from typing import Any, TypeGuard

# Keys of `context` that Segment gives a meaning (segment.com/docs, Spec: Common Fields),
# and our own. An unknown envelope key of that name moves to context.customerio.
RESERVED = frozenset(
    (
        "active app campaign channel consent customerio device externalIds groupId instanceId integration "
        "integrations ip library locale location network omitted_properties os page referrer screen timezone "
        "traits userAgent userAgentData"
    ).split()
)

# Customer.io is itself a Segment destination. Without this an opened email would come
# back to Customer.io as an event, and could set off the campaign that sends the next one.
NO_ECHO = {"Customer.io": False, "Customer.io (Actions)": False}

EMAIL = re.compile(r"[^@\s,;:<>]+@[^@\s,;:<>/?#]+")
NUMBER = re.compile(r"\s*[0-9]{1,30}(\.[0-9]{0,30})?([eE][+-]?[0-9]{1,3})?\s*", re.ASCII)
PLAIN_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


NOT_AN_OBJECT = {
    "not_json": "the body is not JSON{}",
    "not_object": "the body is not a JSON object",
}
UNDELIVERABLE = {
    "no_name": "it has no name{}",
    "names_nobody": "it names nobody: no id, no email address, no cio_id",
    "too_deep": "it is nested too deeply",
    "too_large": "it cannot be made to fit into 32,000 bytes",
    "segment_rejects": "Segment refuses it{}",
} | NOT_AN_OBJECT  # what the key has signed is genuine


class Untranslatable(ValueError):
    """What can't become a track call. `reason` is a key of `sentences`, `str()` its sentence: neither quotes it."""

    sentences: dict[str, str]

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(self.sentences[reason].format(detail))
        self.reason, self.detail = reason, detail


class Undeliverable(Untranslatable):
    """A genuine event that Segment can't take."""

    sentences = UNDELIVERABLE


class NotAnObject(Untranslatable):
    """The body is not a JSON object, which Customer.io never sends."""

    sentences = NOT_AN_OBJECT


def parse(body: bytes) -> dict[str, Any]:
    """Return the event in `body`; raise NotAnObject, or Undeliverable where it nests too deeply to be read."""
    # Replace invalid bytes: half a character in a subject must not hold up a week of events.
    text = body.decode("utf-8-sig", errors="replace")
    try:
        try:
            # A raw control character within a text is no reason to refuse an event.
            event = json.loads(text, strict=False)
        except json.JSONDecodeError as error:
            raise NotAnObject("not_json", f": {error.msg} at character {error.pos}") from None
        except ValueError:  # an integer of more digits than int() takes: as a float it is infinite
            event = json.loads(
                text, strict=False, parse_int=lambda digits: int(digits) if len(digits) < 4_000 else float(digits)
            )
    except RecursionError:
        if text.lstrip(" \t\r\n").startswith("{"):
            raise Undeliverable("too_deep") from None
        raise NotAnObject("not_object") from None
    if not isinstance(event, dict):
        raise NotAnObject("not_object")
    return event


def namespace(write_key: str) -> str:
    """Return eight characters that differ for different write keys and do not disclose them.

    Segment drops a repeated messageId whatever source or workspace it comes from; without
    this, a staging and a production relay would swallow each other's events.
    """
    return hashlib.sha256(b"customerio-to-segment:" + write_key.encode(errors="surrogateescape")).hexdigest()[:8]


def translate(
    event: dict[str, Any],
    *,
    received: datetime,
    namespace: str = "",
    prefix: str = "customerio:",
    omit: frozenset[str] = frozenset(),
    echo: bool = False,
) -> dict[str, Any]:
    """Return the keyword arguments of `Client.track` for one Customer.io event.

    The same event always gives the same call, `message_id` included (but for `received`,
    which stands in for a timestamp that cannot be read): when Customer.io delivers an
    event twice, Segment can tell, and keeps one. `omit` names properties to leave
    out; they don't identify the person either.
    Raises Undeliverable when the event has no name, or names nobody.
    """
    data = event.get("data")
    properties = data if isinstance(data, dict) else {}
    if omit:
        properties = {name: value for name, value in properties.items() if name not in omit}
    name, placed = _name(event)
    user_id, anonymous_id, email = _person(properties, about_email=name.startswith("email_"))
    when = occurred_at(event)

    context: dict[str, Any] = {}
    for key, value in event.items():
        if key in placed or (key == "data" and isinstance(data, dict)) or (key == "timestamp" and when):
            continue
        if key in RESERVED:
            context.setdefault("customerio", {})[key] = value
        else:
            context[key] = value
    context["integration"] = {"name": "Customer.io"}
    if email:
        context["traits"] = {"email": email}

    return {
        "user_id": user_id,
        "anonymous_id": anonymous_id,
        "event": prefix + name,
        "properties": properties,
        "context": context,
        "timestamp": when or received,
        "integrations": {} if echo else dict(NO_ECHO),
        "message_id": _message_id(event, namespace),
    }


def _name(event: dict[str, Any]) -> tuple[str, set[str]]:
    """Return the event's name, and the keys of the envelope that it covers."""
    legacy, channel, metric = event.get("event_type"), event.get("object_type"), event.get("metric")
    if _is_text(legacy):
        return legacy, {"event_type"}
    if not _is_text(metric):
        raise Undeliverable("no_name", ": neither event_type nor metric is a text")
    if channel is None or channel == "":
        return metric, {"object_type", "metric"}
    if not _is_text(channel):
        raise Undeliverable("no_name", ": object_type is not a text")
    return f"{channel}_{metric}", {"object_type", "metric"}


def _person(data: dict[str, Any], about_email: bool) -> tuple[str | None, str | None, str | None]:
    """Return userId, anonymousId (one of them is None) and email address (or None) of who the event is about.

    id to userId, and email to anonymousId where there is no id, is what Customer.io's own
    Segment integration does.
    """
    identifiers = data.get("identifiers")
    if not isinstance(identifiers, dict):
        identifiers = {}
    # Elsewhere `recipient` is a phone number, a Slack channel, a URL or a person's id.
    emails = [identifiers.get("email"), data.get("email_address"), data.get("recipient") if about_email else None]
    addresses = [_address(value) for value in emails if _is_text(value)]
    email = next((address for address in addresses if EMAIL.fullmatch(address)), None)

    user_id = _id(data.get("customer_id")) or _id(identifiers.get("id"))
    if user_id:
        return user_id, None, email
    anonymous_id = next(iter(addresses), None) or _id(identifiers.get("cio_id"))
    if anonymous_id:
        return None, anonymous_id, email
    raise Undeliverable("names_nobody")


def _is_text(value: Any) -> TypeGuard[str]:
    return isinstance(value, str) and bool(value.strip())


def _id(value: Any) -> str | None:
    """Return an id unchanged ("0200102" keeps its zero), or None if it isn't one."""
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return value if _is_text(value) else None


def _address(text: str) -> str:
    """Return the address of "Name <address>", which the legacy form has, and any other text as it is."""
    named = re.fullmatch(r"[^<>]*<([^<>\s]+)>\s*", text)
    return named[1] if named else text


def occurred_at(event: dict[str, Any]) -> datetime | None:
    """Return the instant of an event's `timestamp`, in seconds or milliseconds, or None if it can't be read."""
    timestamp = event.get("timestamp")
    if isinstance(timestamp, str) and NUMBER.fullmatch(timestamp):
        timestamp = float(timestamp) if re.search("[.eE]", timestamp) else int(timestamp)
    if isinstance(timestamp, bool) or not isinstance(timestamp, int | float):
        return None
    try:
        # 1e11 is March 1973 in milliseconds, and the year 5138 in seconds.
        milliseconds = timestamp if timestamp >= 1e11 else timestamp * 1000
        return EPOCH + timedelta(milliseconds=milliseconds) if milliseconds >= 0 else None
    except (OverflowError, ValueError):  # beyond the year 9999; NaN
        return None


def _message_id(event: dict[str, Any], namespace: str) -> str:
    """Return the same messageId, of 1 to 100 characters, for every delivery of the same event."""
    event_id = _id(event.get("event_id"))
    if event_id and PLAIN_ID.fullmatch(event_id):
        return f"customerio-{namespace}-{event_id}"
    if event_id:
        kind, identity = "id", event_id
    else:
        try:
            # Not the bytes of the body: the same event, replayed from a dead letter, has others.
            kind, identity = "event", json.dumps(event, sort_keys=True)
        except RecursionError:
            raise Undeliverable("too_deep") from None
    digest = hashlib.sha256(identity.encode("utf-8", "surrogatepass")).hexdigest()
    # The colon keeps these apart from plain ids, which have none.
    return f"customerio-{namespace}-{kind}:{digest}"
