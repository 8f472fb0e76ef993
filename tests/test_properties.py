"""For any input whatever: a call that Segment takes, or the one documented error, and nothing else."""

import hashlib
import hmac
import json
import math
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.message import to_message
from relay.outcomes import Unauthorized
from relay.signature import ACCEPTED_FOR, verify
from translate import NO_ECHO, NotAnObject, Undeliverable, namespace, parse, translate

RECEIVED = datetime(2026, 11, 23, tzinfo=UTC)

# Lone surrogates, NaN, infinities, integers of any size, keys that mean something and keys that do not.
TEXT = st.text(st.characters(), max_size=20) | st.sampled_from(["", " ", "\ud800", "a@b.org", "A <a@b.org>", "1e999"])
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | TEXT
LARGE = st.builds(lambda text, times: text * times, TEXT, st.integers(0, 5_000))
JSON = st.recursive(
    SCALARS | LARGE, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4), max_leaves=12
)
DATA = st.fixed_dictionaries(
    {},
    optional={
        "customer_id": JSON,
        "identifiers": st.dictionaries(st.sampled_from(["id", "email", "cio_id"]), JSON) | JSON,
        "email_address": JSON,
        "recipient": JSON,
        "content": LARGE,
        "variables": JSON,
        "subject": JSON,
    },
)
ENVELOPE = {
    "event_id": JSON,
    "event_type": JSON,
    "object_type": st.sampled_from(["email", "slack"]) | JSON,
    "metric": st.sampled_from(["opened", "clicked"]) | JSON,
    "timestamp": st.integers(0, 4 * 10**12) | JSON,
    "data": DATA | st.builds(lambda a, b: a | b, DATA, st.dictionaries(TEXT, JSON, max_size=5)) | JSON,
    "traits": JSON,
    "library": JSON,
}
EVENTS = st.builds(
    lambda known, novel: novel | known,
    st.fixed_dictionaries({}, optional=ENVELOPE),
    st.dictionaries(TEXT, JSON, max_size=3),
)


def valid_for_segment(message):
    """Segment's rules, written down from its documentation and not from our code."""
    wire, identity = message.json, message.id
    assert wire.isascii()
    assert len(wire) <= 32_000
    message = json.loads(wire)
    assert isinstance(message, dict)  # never more than one event
    assert json.dumps(message, allow_nan=False) == wire
    json.dumps(message, allow_nan=False, ensure_ascii=False).encode("utf-8")  # no lone surrogate
    assert message["messageId"] == identity
    assert message["type"] == "track"
    assert isinstance(message["event"], str)
    assert message["event"]
    ids = (message["userId"], message["anonymousId"])
    assert any(isinstance(identity, str) and identity for identity in ids)
    assert all(identity is None or isinstance(identity, str) for identity in ids)
    assert isinstance(message["properties"], dict)
    assert isinstance(message["context"], dict)
    assert isinstance(message["context"].get("traits", {}), dict)
    assert 1 <= len(message["messageId"]) <= 100
    assert datetime.fromisoformat(message["timestamp"]).utcoffset().total_seconds() == 0
    assert message["integrations"] == NO_ECHO


def relayed(body):
    """Return the bytes that leave for a body, or the error."""
    try:
        event, settings = parse(body), {"received": RECEIVED, "namespace": namespace("k")}
        call = translate(event, **settings)
        message = to_message(call)
        named = translate(event, names="segment", **settings)
        valid_for_segment(to_message(named))
        assert repr(named | {"event": 0}) == repr(call | {"event": 0})  # as text, since NaN is not itself
    except (Undeliverable, NotAnObject) as error:
        return type(error), str(error)
    valid_for_segment(message)
    return message.json


@given(EVENTS)
def test_any_object_is_a_call_that_segment_takes_or_undeliverable(event):
    body = json.dumps(event).encode()
    first = relayed(body)
    assert first == relayed(body)
    if isinstance(first, tuple):
        assert first[0] is Undeliverable


@given(EVENTS)
def test_an_error_does_not_quote_the_event(event):
    secret = "not-to-be-quoted"
    event["data"] = {"subject": secret, "variables": {secret: secret * 4_000}}
    result = relayed(json.dumps(event).encode())
    if isinstance(result, tuple):
        assert secret not in result[1]


@given(st.binary(max_size=200) | EVENTS.map(lambda event: json.dumps(event).encode()[:-1]))
def test_any_bytes_are_an_event_or_an_error(body):
    relayed(body)


@given(st.integers(0, 1_500), st.sampled_from(["[", '{"a":']))
def test_any_depth(levels, opening):
    closing = "]" if opening == "[" else "}"
    value = opening * levels + "1" + closing * levels
    body = f'{{"metric": "m", "data": {{"customer_id": "1", "x": {value}}}}}'.encode()
    result = relayed(body)
    assert result == relayed(body)
    if levels <= 150:
        assert isinstance(result, str)


@given(st.lists(st.tuples(TEXT, st.integers(0, 40_000)), min_size=1, max_size=12))
def test_any_sizes(sizes):
    data = {"customer_id": "1"} | {name + "x": "y" * size for name, size in sizes}
    result = relayed(json.dumps({"metric": "m", "event_id": "1", "data": data}).encode())
    assert isinstance(result, str)
    size, omitted = len(json.dumps(data)), "omitted_properties" in json.loads(result)["context"]
    # What surrounds the data takes some 400 bytes.
    assert not (omitted and size <= 31_000)
    assert omitted or size <= 32_000


KEY, OTHER = "key", "other"
NOW = 1_700_000_000
BODIES = st.binary(max_size=100)


def signed(body, timestamp, key=KEY):
    return hmac.new(key.encode(), b"v0:" + timestamp.encode() + b":" + body, hashlib.sha256).hexdigest()


@given(BODIES, BODIES, st.integers(NOW - ACCEPTED_FOR, NOW + ACCEPTED_FOR))
def test_exactly_the_signed_bytes_pass(body, other, when):
    signature = signed(body, str(when))
    verify(body, str(when), signature, (OTHER, KEY), NOW)
    if other != body:
        with pytest.raises(Unauthorized):
            verify(other, str(when), signature, (OTHER, KEY), NOW)


@given(BODIES, st.integers(0, 63), st.sampled_from("0123456789abcdefABCDEFg é\x00"))
def test_no_other_signature_passes(body, position, character):
    right = signed(body, str(NOW))
    wrong = right[:position] + character + right[position + 1 :]
    if wrong != right:
        with pytest.raises(Unauthorized):
            verify(body, str(NOW), wrong, (KEY,), NOW)


@given(BODIES, st.text(), st.text())
def test_junk_in_headers_is_refused_and_nothing_else(body, timestamp, signature):
    with pytest.raises(Unauthorized) as refusal:
        verify(body, timestamp, signature, (KEY,), NOW)
    assert signed(body, str(NOW)) not in str(refusal.value)


@given(BODIES, st.floats(min_value=ACCEPTED_FOR + 1, max_value=1e12), st.sampled_from([1, -1]))
def test_outside_of_eight_days_nothing_passes(body, away, direction):
    when = str(max(0, math.floor(NOW + direction * away)))
    if abs(NOW - int(when)) > ACCEPTED_FOR:
        with pytest.raises(Unauthorized):
            verify(body, when, signed(body, when), (KEY,), NOW)
