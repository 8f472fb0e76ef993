"""Says in words what lies between a webhook and its track call. Pure."""

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from config import Config
from translate import Undeliverable, event_name, occurred_at, person_of, properties_of

# What people look for first; the rest follows.
READING_ORDER = ("event", "userId", "anonymousId", "timestamp", "properties", "context", "integrations", "messageId")

MOST_NAMES = 12  # in one sentence: they come from outside


def in_reading_order(call: Mapping[str, Any]) -> dict[str, Any]:
    """Return the same call; of userId and anonymousId the one that is null goes last."""
    keys = [key for key in READING_ORDER if call.get(key) is not None]
    return {key: call[key] for key in keys} | dict(call)


def subject(event: dict[str, Any], config: Config) -> tuple[str, str]:
    """Return the name of an event that became no call, and whom it names, as far as it says; "" for what it doesn't."""
    name = person = ""
    with suppress(Undeliverable):
        name = event_name(event, config.event_names)
    with suppress(Undeliverable):
        user_id, anonymous_id, _ = person_of(event, properties_of(event, config.omit_properties))
        person = user_id or anonymous_id or ""
    return name, person


def changes(event: dict[str, Any], call: Mapping[str, Any], whole: bool, config: Config) -> list[str]:
    """Return a sentence for each thing that was left out, changed or added.

    `whole` says whether every byte of the webhook was UTF-8.
    """
    data, context = properties_of(event), call["context"]
    left_out = context.get("omitted_properties", [])
    said = []
    if left_out:
        said.append(f"Left out, because Segment takes 32 KB an event: {_names(left_out)}.")
    if omitted := [name for name in sorted(config.omit_properties) if properties_of(event, [name]) is not data]:
        said.append(f"Left out, because OMIT_PROPERTIES says so: {_names(omitted)}.")
    said += _about_time(event) + _about_person(event, call)
    if not isinstance(event.get("data"), dict):
        said.append("data is not an object, so there are no properties; it is kept in context.data.")
    moved = context.get("customerio") or {}
    kept = {name: value for name, value in event.items() if name not in moved}
    if names := sorted(moved.keys() & event.keys()):
        said.append(
            f"Moved to context.customerio, because Segment gives the name a meaning of its own: {_names(names)}."
        )
    if altered := _altered(call["properties"], data) + _altered(context, kept) + _altered(moved, event):
        said.append(f"Changed, because strict JSON has neither NaN, infinity nor half a character: {_names(altered)}.")
    if not whole:
        said.append("Bytes that are not UTF-8 were replaced by �.")
    if ":" in call["messageId"]:
        said.append(_about_id(event))
    return said or ["Nothing was left out or changed."]


def _about_time(event: dict[str, Any]) -> list[str]:
    if occurred_at(event):
        return []
    if "timestamp" not in event:
        return ["There is no timestamp: the time of arrival stands in for it."]
    return ["The timestamp can't be read: the time of arrival stands in for it. It is kept in context.timestamp."]


def _about_id(event: Mapping[str, Any]) -> str:
    event_id = event.get("event_id")
    if event_id is None or event_id == "":
        return "There is no event_id: the messageId is a digest of the whole event."
    if isinstance(event_id, str) and event_id.strip():
        return "The event_id is too long or has characters of its own: the messageId has a digest of it."
    return "The event_id is not an id: the messageId is a digest of the whole event."


def _about_person(event: dict[str, Any], call: Mapping[str, Any]) -> list[str]:
    if call.get("userId") is not None:
        return []
    kind = "the email address" if call["context"].get("traits") else "what else identifies the person"
    omitted = person_of(event, properties_of(event)).user_id
    why = "OMIT_PROPERTIES leaves no id of the person" if omitted else "The person has no id"
    return [f"{why}: to Segment they are anonymous, and anonymousId is {kind}."]


def _altered(made: Mapping[str, Any], given: Mapping[str, Any]) -> list[str]:
    """Return the names of what isn't as it was given."""
    return [name for name, value in made.items() if name in given and given[name] != value]


def _names(names: list[str]) -> str:
    shown = ", ".join(name[:60] for name in names[:MOST_NAMES])
    return shown if len(names) <= MOST_NAMES else f"{shown} and {len(names) - MOST_NAMES} more"
