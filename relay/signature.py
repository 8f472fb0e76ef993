"""Did Customer.io sign these bytes, and recently enough? Pure."""

import hmac
import re

from relay.outcomes import Unauthorized

# Customer.io retries for seven days, and does not document whether it signs a
# retry again. If it doesn't, a narrow window would refuse genuine retries and hold up
# everything behind them. So: the seven days of the retries, and one for clocks. A request
# that is replayed in that time does little harm: its messageId at Segment is the same.
ACCEPTED_FOR = 8 * 24 * 3600  # seconds, into the past and into the future


def verify(body: bytes, timestamp: str, signature: str, keys: tuple[str, ...], now: float) -> None:
    """Return if one of `keys` signed exactly these bytes; raise Unauthorized if not.

    `timestamp` and `signature` are the headers X-CIO-Timestamp (unix seconds) and
    X-CIO-Signature (hex), "" where they are missing; any text is allowed. `now` is in
    unix seconds. Several keys are accepted so that a key can be rotated without refusing
    what is in flight. The rule is Customer.io's (docs.customer.io, "Securely verify requests").
    The error never carries the signature we expected: printed in a log, it would be a valid one.
    """
    if not timestamp or not signature:
        raise Unauthorized("missing")
    if not re.fullmatch(r"[0-9]{1,15}(\.[0-9]{1,9})?", timestamp):
        raise Unauthorized("bad_timestamp")
    # Compared as bytes: given a non-ASCII str, compare_digest raises TypeError, and a
    # forged header would be an error instead of a 422.
    given = signature.encode(errors="replace")
    for key in keys:
        if hmac.compare_digest(_expected(body, timestamp, key).encode(), given):
            break
    else:
        raise Unauthorized("mismatch")
    if abs(now - float(timestamp)) > ACCEPTED_FOR:
        raise Unauthorized("expired")


def sign(body: bytes, timestamp: str, key: str) -> dict[str, str]:
    """Return the headers with which Customer.io would send `body`, for samples."""
    return {"X-CIO-Timestamp": timestamp, "X-CIO-Signature": _expected(body, timestamp, key)}


def _expected(body: bytes, timestamp: str, key: str) -> str:
    # Signed as received. Parsing the timestamp and printing it back could change it
    # ("0123" becomes "123") and refuse a genuine request.
    signed = b"v0:" + timestamp.encode() + b":" + body
    return hmac.digest(key.encode(errors="surrogateescape"), signed, "sha256").hex()
