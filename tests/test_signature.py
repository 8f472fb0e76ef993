"""signature.py: exactly the bytes that were signed, by a key of ours, within eight days."""

import pytest

from relay.outcomes import Unauthorized
from relay.signature import verify

# Made by: printf 'v0:%s:%s' 1585250199 '{"metric":"opened"}' | openssl dgst -sha256 -hmac 'first key'
BODY = b'{"metric":"opened"}'
WHEN = "1585250199"
BY_FIRST = "62292b05a8a9f28976274328bd7b741f836a14e2893aa5b2adee425ec107cec3"
BY_SECOND = "c23b4ab9b34490109d3f1a94e9d0863ad7702d725f44c8bcbcb36a6dc9e3145e"
KEYS = ("first key", "second key")
NOW = 1585250200.0
DAY = 24 * 3600


def test_a_signature_made_by_openssl_passes():
    verify(BODY, WHEN, BY_FIRST, KEYS, NOW)


def test_a_key_can_be_rotated():
    verify(BODY, WHEN, BY_SECOND, KEYS, NOW)
    with pytest.raises(Unauthorized):
        verify(BODY, WHEN, BY_SECOND, ("first key",), NOW)


def test_a_key_need_not_be_ascii():
    # printf 'v0:%s:%s' 1585250199 '{"metric":"opened"}' | openssl dgst -sha256 -hmac 'clé'
    verify(BODY, WHEN, "2537bcdcf1707fd82bd8ba843f29c29f630993a618108ec033943e4d9c4f933c", ("clé",), NOW)


@pytest.mark.parametrize(
    "after", [0, 7.9 * DAY, -7.9 * DAY], ids=["now", "a retry, days later", "a clock that is ahead"]
)
def test_accepted_for_eight_days(after):
    verify(BODY, WHEN, BY_FIRST, KEYS, NOW + after)


REFUSED = {
    "another body": (b'{"metric": "opened"}', WHEN, BY_FIRST, "mismatch"),
    "an empty body": (b"", WHEN, BY_FIRST, "mismatch"),
    "another timestamp": (BODY, "1585250198", BY_FIRST, "mismatch"),
    "the same number written otherwise": (BODY, "01585250199", BY_FIRST, "mismatch"),
    "a timestamp with a sign": (BODY, "+1585250199", BY_FIRST, "bad_timestamp"),
    "a timestamp in digits of another script": (BODY, "١٥٨٥٢٥٠١٩٩", BY_FIRST, "bad_timestamp"),
    "a timestamp that isn't a number": (BODY, "yesterday", BY_FIRST, "bad_timestamp"),
    "a timestamp beyond all measure": (BODY, "9" * 400, BY_FIRST, "bad_timestamp"),
    "a timestamp that is infinite": (BODY, "inf", BY_FIRST, "bad_timestamp"),
    "no timestamp": (BODY, "", BY_FIRST, "missing"),
    "no signature": (BODY, WHEN, "", "missing"),
    "half a signature": (BODY, WHEN, BY_FIRST[:32], "mismatch"),
    "a signature and more": (BODY, WHEN, BY_FIRST + "00", "mismatch"),
    "a signature in capitals": (BODY, WHEN, BY_FIRST.upper(), "mismatch"),
    "two signatures": (BODY, WHEN, BY_FIRST + "," + BY_SECOND, "mismatch"),
    "a signature with a version": (BODY, WHEN, "v0=" + BY_FIRST, "mismatch"),
    "a signature that is not ASCII": (BODY, WHEN, "é" * 64, "mismatch"),
    "a signature with a lone surrogate": (BODY, WHEN, "\udcff" * 64, "mismatch"),
}


@pytest.mark.parametrize(("body", "timestamp", "signature", "code"), REFUSED.values(), ids=REFUSED.keys())
def test_refuses(body, timestamp, signature, code):
    with pytest.raises(Unauthorized) as refusal:
        verify(body, timestamp, signature, KEYS, NOW)
    assert refusal.value.reason == code
    assert BY_FIRST not in str(refusal.value)
    assert BY_SECOND not in str(refusal.value)


@pytest.mark.parametrize("days", [8.1, -8.1], ids=["past", "future"])
def test_refuses_after_eight_days(days):
    with pytest.raises(Unauthorized, match="eight days") as refusal:
        verify(BODY, WHEN, BY_FIRST, KEYS, NOW + days * DAY)
    assert refusal.value.reason == "expired"


def test_an_old_timestamp_says_nothing_about_a_signature_that_is_wrong():
    with pytest.raises(Unauthorized, match="no configured key"):
        verify(BODY, WHEN, "00" * 32, KEYS, NOW + 9 * DAY)


def test_without_keys_nothing_passes():
    with pytest.raises(Unauthorized):
        verify(BODY, WHEN, BY_FIRST, (), NOW)
