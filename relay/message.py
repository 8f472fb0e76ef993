"""Makes the messages that Segment accepts: strict JSON, and not too large.

segment-analytics-python makes every one (`Client.track`); what it would make that Segment refuses is changed before.
"""

import json
import math
import re
from typing import Any, NamedTuple

from segment.analytics.client import Client

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

LONG_IDENTIFIER = 1_000  # bytes

# Cap the list of what was left out: its names come from outside.
MAX_OMITTED_NAMES = 40
MAX_OMITTED_NAME = 60  # characters

NOT_STRICT = re.compile(r"NaN|Infinity|\\ud[89a-f]")

# It sends nothing. A message doesn't have the write key in it: an upload does.
_client = Client("unused", send=False)


class Message(NamedTuple):
    """A track call as Segment gets it."""

    id: str  # its messageId
    json: str  # ASCII


class Part(NamedTuple):
    """What a call can lose."""

    rank: int  # 0 for bulk, which goes first, 2 for what has the name of an identifier
    size: int  # bytes of JSON
    owner: dict[str, Any]  # the call's properties or context
    name: str
    label: str  # in context.omitted_properties


def to_message(call: dict[str, Any]) -> Message:
    """Return the message for these keyword arguments of `Client.track`.

    It is strict JSON of at most MAX_EVENT_BYTES: an event that is too large loses its bulk,
    listed in `context.omitted_properties`. Raise Undeliverable for an event that is too
    large even so, or nested too deeply.
    """
    try:
        text, size = _track(call)
        if NOT_STRICT.search(text):
            call = scrub(call)
            text, size = _track(call)
        if size > MAX_EVENT_BYTES:
            text, size = _track(shrink(call, size - MAX_EVENT_BYTES))
    except RecursionError:
        raise Undeliverable("too_deep") from None
    if size > MAX_EVENT_BYTES:
        raise Undeliverable("too_large")
    return Message(call["message_id"], text)


def _track(call: dict[str, Any]) -> tuple[str, int]:
    """Return the client's message as JSON, and its size in bytes.

    If the call is too large for the client, return the call's own JSON, and about the size that the message would have.
    """
    # The client writes context.library into the dict it is given.
    call = call | {"context": dict(call["context"])}
    try:
        _, message = _client.track(**call)
    except RecursionError:  # is a RuntimeError
        raise
    except RuntimeError:  # above 32,768 bytes; the error quotes the event
        text = json.dumps(call, default=str)
        return text, len(text) + 200  # a message is some 150 bytes longer
    text = json.dumps(message)
    return text, len(text)


def scrub(value: Any) -> Any:
    """Return `value` as strict JSON allows it: with null for NaN and infinities, and lone surrogates replaced.

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
            if not essential or size > LONG_IDENTIFIER:
                rank = 2 if essential else 0 if bulk else 1
                parts.append(Part(rank, size, owner, name, label + name))
    parts.sort(key=lambda part: (part.rank, -part.size))

    omitted = 0
    named: list[str] = []
    excess += len('"omitted_properties": [], "and 1000000 more", ')
    for part in parts:
        if excess <= 0:
            break
        del part.owner[part.name]
        omitted += 1
        excess -= part.size
        if len(named) < MAX_OMITTED_NAMES:
            named.append(part.label[:MAX_OMITTED_NAME])
            excess += len(json.dumps(named[-1])) + len(", ")
    if excess > 0:
        raise Undeliverable("too_large")
    if omitted > len(named):
        named.append(f"and {omitted - len(named)} more")
    context["omitted_properties"] = named
    return call | {"properties": properties, "context": context}
