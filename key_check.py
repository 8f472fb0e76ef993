"""Tells a wrong write key from wrong events, when Segment rejects one after the other."""

from collections.abc import Callable
from threading import Lock
from time import monotonic
from typing import Any
from uuid import uuid4

from outcomes import Rejected, RetryLater
from translate import NO_ECHO, event_name

IN_A_ROW = 5  # events rejected, and none accepted in between, before the key is in doubt
PROBE_EVERY = 10  # seconds, while Segment rejects the probe too


class KeyCheck:
    """Segment answers 400 to an event that it can't read, and to every event if the key is empty or short.

    The first is a dead letter; all of the second would be. So after IN_A_ROW dead letters an event
    of our own is sent, which has no fault: if Segment rejects that one too, it is the key.
    """

    def __init__(self, probe: Callable[[float], None]):
        """`probe(deadline)` sends that event; it raises Rejected or RetryLater if Segment doesn't take it."""
        self._probe = probe
        self._lock = Lock()
        self._rejected = 0  # in a row
        self._wrong_until = 0.0  # on the monotonic clock

    def accepted(self) -> None:
        """Note that Segment has accepted an event."""
        self._rejected, self._wrong_until = 0, 0.0

    def rejected(self, deadline: float) -> None:
        """Return if an event that Segment rejected by itself is at fault.

        Raise RetryLater if the key is, or if that isn't known by `deadline` (on the monotonic clock).
        """
        if not self._lock.acquire(timeout=max(0, deadline - monotonic())):
            raise RetryLater("timeout")
        try:
            if self._rejected >= IN_A_ROW:
                self._probe_key(deadline)
            self._rejected += 1
        finally:
            self._lock.release()

    def _probe_key(self, deadline: float) -> None:
        if monotonic() >= self._wrong_until:
            try:
                self._probe(deadline)
                self.accepted()
                return
            except Rejected:
                self._wrong_until = monotonic() + PROBE_EVERY
        raise RetryLater("every_event")


def check_call(prefix: str, names: str) -> dict[str, Any]:
    """Return the `Client.track` arguments of an event that has no fault."""
    return {
        "event": prefix + event_name({"event_type": "relay_check"}, names),
        "anonymous_id": "relay_check",
        "message_id": f"customerio-check-{uuid4()}",
        "properties": {},
        "context": {},
        "integrations": dict(NO_ECHO),
    }
