"""The mapping: a Customer.io reporting event -> the arguments of Segment's `Client.track`. Pure."""

import hashlib
import json
import re
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple, TypeGuard

# Keys of `context` that Segment gives a meaning (segment.com/docs, Spec: Common Fields),
# and our own. An unknown envelope key of that name moves to context.customerio.
RESERVED = frozenset(
    (
        "active app campaign channel consent customerio device direct externalIds groupId instanceId "
        "integration integrations ip library locale location network omitted_properties os page referrer screen "
        "timezone traits userAgent userAgentData"
    ).split()
)

# Customer.io is itself a Segment destination. Without this an opened email would come
# back to Customer.io as an event, and could set off the campaign that sends the next one.
# The names are those of Segment's catalogue, the classic destination's first; it only counts one that it doesn't know.
NO_ECHO = dict.fromkeys(
    ("Customer.io", "Actions Customerio", "Customer.io Actions", "Customer.io (Actions)"),
    False,
)

# Properties with the person's email address, in order of preference; `recipient` holds it in an email's events.
ADDRESSES = ("identifiers.email", "email_address", "recipient")

# The channels that Customer.io documents, with their words in SEGMENT names. Others will come.
CHANNELS = {
    "customer": "Customer",
    "email": "Email",
    "push": "Push",
    "sms": "SMS",
    "whatsapp": "WhatsApp",
    "slack": "Slack",
    "webhook": "Webhook",
    "in_app": "In-App",
}

# The names of events: Customer.io's own (email_clicked), or those that Segment's Customer.io source, its email spec and
# Customer.io's source "Journeys Message Metrics" (docs.customer.io) agree on (Email Link Clicked).
CUSTOMERIO, SEGMENT = "customerio", "segment"
NAMES = (CUSTOMERIO, SEGMENT)
PREFIX = "customerio:"

# What differs from the metric in title case.
METRICS = {"clicked": "Link Clicked", "dropped": "Suppressed", "spammed": "Marked as Spam"}
IN_APP_METRICS = METRICS | {"clicked": "Clicked"}

# What changes about a person has no channel in its name, though one may have caused it.
PERSON_CHANGES = {
    "subscribed": "Subscribed",
    "unsubscribed": "Unsubscribed",
    "cio_subscription_preferences_changed": "Subscription Preferences Changed",
    "subscription_preferences_changed": "Subscription Preferences Changed",  # as a webhook's settings call it
}

EMAIL = re.compile(r"[^@\s,;:<>]+@[^@\s,;:<>/?#]+")
NAMED = re.compile(r"[^<>]*<\s*([^<>\s]+)\s*>\s*")
# One address of a list; a quoted name and a comment may contain commas.
LISTED = re.compile(r"""(?:"[^"]*"|\([^()]*\)|<[^<>]*>|[^,;])++""")
# What may stand beside it: a quoted name, a comment, and before the first the name of a group.
BESIDE = re.compile(r"""^[^"(<:@]*:(?!//)|"[^"]*"(?!@)|\([^()]*\)""")
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
    "segment_rejects.on_the_way": "it is refused on the way to Segment{}",
} | NOT_AN_OBJECT  # what the key has signed is genuine

IGNORED = {"mapping": "the mapping leaves it out{}"}


class Ended(Exception):
    """A webhook that ends without a delivery.

    `reason` is a key of `sentences`: a label of the metrics, perhaps with a variant behind a dot. `str()` is its
    sentence, in which `detail` takes the place of {}. None of them quotes the event.
    """

    sentences: dict[str, str]

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(self.sentences[reason].format(detail))
        self.reason, self.detail = reason, detail

    @property
    def label(self) -> str:
        return self.reason.partition(".")[0]


class Untranslatable(Ended):
    """What can't become a track call."""


class Undeliverable(Untranslatable):
    """A genuine event that Segment can't take."""

    sentences = UNDELIVERABLE


class Ignored(Untranslatable):
    """A genuine event that the mapping leaves out on purpose; `what` says which, and quotes no event."""

    sentences = IGNORED

    def __init__(self, what: str):
        super().__init__("mapping", f": {what}")


class NotAnObject(Untranslatable):
    """The body is not a JSON object, which Customer.io never sends."""

    sentences = NOT_AN_OBJECT


def parse(body: bytes) -> dict[str, Any]:
    """Return the event in `body`; raise NotAnObject, or Undeliverable where it nests too deeply to be read."""
    # Replace invalid bytes: half a character in a subject must not hold up a week of events.
    text = body.decode("utf-8-sig", errors="replace")
    try:
        try:
            # Take an event with a raw control character in a string.
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
    prefix: str = PREFIX,
    names: str = CUSTOMERIO,
    omit: frozenset[str] = frozenset(),
    echo: bool = False,
) -> dict[str, Any]:
    """Return the keyword arguments of `Client.track` for one Customer.io event.

    The same event always gives the same call, `message_id` included (but for `received`,
    which stands in for a timestamp that cannot be read): when Customer.io delivers an
    event twice, Segment can tell, and keeps one. `names` is one of NAMES. `omit` names
    properties to leave out, "a.b" the `b` in `a`; they don't identify the person either.
    Raises Undeliverable when the event has no name, or names nobody, and Ignored when it
    is of a kind that is not wanted.
    """
    properties = properties_of(event, omit)
    name = event_name(event, names)
    person = person_of(event, properties)

    return {
        "user_id": person.user_id,
        "anonymous_id": person.anonymous_id,
        "event": prefix + name,
        "properties": properties,
        "context": _context(event, person.email),
        "timestamp": occurred_at(event) or received,
        "integrations": {} if echo else dict(NO_ECHO),
        "message_id": _message_id(event, namespace),
    }


def _context(event: dict[str, Any], email: str | None) -> dict[str, Any]:
    """Return the context: what the event has besides its name, `data` and timestamp, and who made the call."""
    placed = {
        "event_type": _is_text(event.get("event_type")),
        "data": isinstance(event.get("data"), dict),
        "timestamp": occurred_at(event) is not None,
    }
    context: dict[str, Any] = {}
    for key, value in event.items():
        if placed.get(key):
            continue
        if key in RESERVED:
            context.setdefault("customerio", {})[key] = value
        else:
            context[key] = value
    context["integration"] = {"name": "Customer.io"}
    if email:
        context["traits"] = {"email": email}
    return context


class Kind(NamedTuple):
    """What happened, in lower case with `_` for blanks; `channel` is "" if the event names none."""

    channel: str
    metric: str


class Person(NamedTuple):
    """Who an event is about: user_id or anonymous_id, and the email address if it is known."""

    user_id: str | None
    anonymous_id: str | None
    email: str | None


def event_name(event: dict[str, Any], names: str = CUSTOMERIO) -> str:
    """Return the name of an event, without a prefix; `names` is one of NAMES. Raise Undeliverable if it has none."""
    legacy, channel, metric = _words(event)
    name = legacy or (f"{channel}_{metric}" if channel else metric)
    if names != SEGMENT:
        return name
    channel, metric = kind(event)
    if metric in PERSON_CHANGES and not _is_of_an_email(event, channel, metric):
        return PERSON_CHANGES[metric]
    metrics = IN_APP_METRICS if channel == "in_app" else METRICS
    words = CHANNELS.get(channel) or _title(channel), metrics.get(metric) or _title(metric)
    return " ".join(filter(None, words)) or name  # which may have nothing but `_`


def _is_of_an_email(event: dict[str, Any], channel: str, metric: str) -> bool:
    """Return whether an email counts an unsubscription; email/unsubscribed may also be a person's change."""
    return (channel, metric) == ("email", "unsubscribed") and bool(
        _is_text(event.get("event_type")) or _id(properties_of(event).get("delivery_id"))
    )


def kind(event: dict[str, Any]) -> Kind:
    """Return channel and metric of an event, of the legacy form by its name. Raise Undeliverable if it has no name."""
    legacy, channel, metric = map(_key, _words(event))
    if not legacy:
        return Kind(channel, metric)
    # Without the `_`, which in_app has too, a name can be split only where one of the two is known.
    for known in CHANNELS:
        if legacy.startswith(f"{known}_"):
            return Kind(known, legacy.removeprefix(f"{known}_"))
    for known in PERSON_CHANGES:
        if f"_{legacy}".endswith(f"_{known}"):
            return Kind(legacy.removesuffix(known).removesuffix("_"), known)
    channel, _, metric = legacy.rpartition("_")
    return Kind(channel, metric)


def _words(event: dict[str, Any]) -> tuple[str, str, str]:
    """Return event_type, object_type and metric; "" for what the event does without."""
    legacy, channel, metric = event.get("event_type"), event.get("object_type"), event.get("metric")
    if _is_text(legacy):
        return legacy, "", ""
    if not _is_text(metric):
        raise Undeliverable("no_name", ": neither event_type nor metric is a text")
    if channel is None or channel == "":
        return "", "", metric
    if not _is_text(channel):
        raise Undeliverable("no_name", ": object_type is not a text")
    return "", channel, metric


def _key(text: str) -> str:
    return "_".join(text.lower().replace("_", " ").split())


def _title(key: str) -> str:
    return " ".join(map(str.capitalize, key.split("_")))


def properties_of(event: dict[str, Any], omit: Iterable[str] = ()) -> dict[str, Any]:
    """Return the properties of the call: `data` without what `omit` names, or {} if it isn't an object."""
    properties = event.get("data")
    if not isinstance(properties, dict):
        return {}
    try:
        for name in sorted(omit):  # not in the order of a set, which differs from worker to worker
            properties = _without(properties, name)
    except RecursionError:
        raise Undeliverable("too_deep") from None
    return properties


def _without(value: Any, name: str) -> Any:
    """Return `value` without the property `name`, or `value` itself if there is none.

    "a.b" is the property of that name or, if there is none, the `b` in the object `a`, or in each object of a list.
    """
    if isinstance(value, list):
        items = [_without(item, name) for item in value]
        return items if any(new is not old for new, old in zip(items, value, strict=True)) else value
    if not isinstance(value, dict):
        return value
    if name in value:
        return {key: item for key, item in value.items() if key != name}
    for dot in reversed([place for place, character in enumerate(name) if character == "."]):
        outer, inner = name[:dot], name[dot + 1 :]
        if outer in value and (rest := _without(value[outer], inner)) is not value[outer]:
            return value | {outer: rest}
    return value


def person_of(event: dict[str, Any], properties: dict[str, Any]) -> Person:
    """Return who an event is about, by those of its properties that may be used. Raise Undeliverable if it's nobody.

    id to userId, and email to anonymousId where there is no id, is what Customer.io's own
    Segment integration does.
    """
    identifiers = properties.get("identifiers")
    if not isinstance(identifiers, dict):
        identifiers = {}
    emails = [identifiers.get("email"), properties.get("email_address")]
    if _is_about_email(event):  # elsewhere `recipient` is a phone number, a Slack channel, a URL or a person's id
        emails.append(properties.get("recipient"))
    addresses = [_address(value) for value in emails if _is_text(value)]
    email = next((address for address in addresses if EMAIL.fullmatch(address)), None)

    user_id = _id(properties.get("customer_id")) or _id(identifiers.get("id"))
    if user_id:
        return Person(user_id, None, email)
    anonymous_id = next(iter(addresses), None) or _id(identifiers.get("cio_id"))
    if anonymous_id:
        return Person(None, anonymous_id, email)
    raise Undeliverable("names_nobody")


def _is_about_email(event: dict[str, Any]) -> bool:
    try:
        return kind(event).channel == "email"
    except Undeliverable:  # it has no name
        return False


def _is_text(value: Any) -> TypeGuard[str]:
    return isinstance(value, str) and bool(value.strip())


def _id(value: Any) -> str | None:
    """Return an id unchanged ("0200102" keeps its zero), or None if it isn't one."""
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return value if _is_text(value) else None


def _address(text: str) -> str:
    """Return the address of "Name <address>", the first of a list of them, and any other text as it is.

    Its case stays: in lower case, people who are known already would become others.
    """
    parts = (BESIDE.sub("", found[0]).strip() for found in LISTED.finditer(text))
    first = next((part for part in parts if "@" in part), "")
    for one in (first, text):
        named = NAMED.fullmatch(one)
        address = named[1] if named else one
        if EMAIL.fullmatch(address):
            return address
    return address


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
        basis, identity = "id", event_id
    else:
        try:
            # Not the bytes of the body: the same event, replayed from a dead letter, has others.
            basis, identity = "event", json.dumps(event, sort_keys=True)
        except RecursionError:
            raise Undeliverable("too_deep") from None
    digest = hashlib.sha256(identity.encode("utf-8", "surrogatepass")).hexdigest()
    # The colon keeps these apart from plain ids, which have none.
    return f"customerio-{namespace}-{basis}:{digest}"
