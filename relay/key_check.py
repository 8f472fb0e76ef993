"""Tells a wrong write key, or a proxy in the way, from wrong events, when several in a row are rejected."""

from collections.abc import Callable
from threading import Lock
from time import monotonic
from typing import Any
from uuid import uuid4

from relay.outcomes import Rejected, RetryLater
from translate import NO_ECHO, event_name

IN_A_ROW = 5  # events rejected, and none accepted in between, before the key is in doubt
PROBE_EVERY = 10  # seconds, while Segment rejects the probe too


class KeyCheck:
    """Segment answers 400 to an event that it can't read, and to every event if the key is empty or short.

    The first is a dead letter; all of the second would be. So after IN_A_ROW dead letters an event
    of our own is sent, which has no fault: if Segment rejects that one too, it is the key.

    A refusal that isn't Segment's own comes from a proxy or a captive portal. It may dislike this one event, or stand
    in the way of all, so our event decides at once.
    """

    def __init__(self, probe: Callable[[float], None], clock: Callable[[], float] = monotonic):
        """`probe(deadline)` sends that event; it raises Rejected or RetryLater if Segment doesn't take it."""
        self._probe = probe
        self._clock = clock
        self._lock = Lock()
        self._rejected = 0  # in a row
        self._right_since = 0.0  # when the last probe that was accepted was sent, on the monotonic clock
        self._wrong_until = 0.0  # on the same

    def accepted(self) -> None:
        """Note that Segment has accepted an event."""
        self._rejected, self._wrong_until = 0, 0.0

    def rejected(self, error: Rejected, deadline: float) -> None:
        """Return if an event that was rejected by itself is at fault.

        Raise RetryLater if it isn't, or if that isn't known by `deadline` (on the monotonic clock).
        """
        if not error.may_be_for_all:
            return
        since = self._clock()
        if not self._lock.acquire(timeout=max(0, deadline - since)):
            raise RetryLater("timeout")
        try:
            # Requests that waited for the lock share the answer to the probe that was sent meanwhile.
            doubtful = self._rejected >= IN_A_ROW if error.by_segment else self._right_since < since
            if doubtful and not self._is_right(deadline):
                raise RetryLater(error.reason_for_all)
            self._rejected += 1
        finally:
            self._lock.release()

    def _is_right(self, deadline: float) -> bool:
        """Return whether Segment accepts a valid event; raise RetryLater if that isn't known."""
        now = self._clock()
        if now < self._wrong_until:
            return False
        try:
            self._probe(deadline)
        except Rejected:
            self._wrong_until = self._clock() + PROBE_EVERY
            return False
        self.accepted()
        self._right_since = now
        return True


def check_call(prefix: str, names: str) -> dict[str, Any]:
    """Return the `Client.track` arguments of a valid event."""
    return {
        "event": prefix + event_name({"event_type": "relay_check"}, names),
        "anonymous_id": "relay_check",
        "message_id": f"customerio-check-{uuid4()}",
        "properties": {},
        "context": {},
        "integrations": dict(NO_ECHO),
    }
