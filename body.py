"""Reads a webhook's body: whole, in time, and within the memory that a worker has for bodies."""

from threading import Lock

import gevent
from flask import Request

from delivery import RetryLater

MAX_BODY = 8 * 1024 * 1024  # bytes; a whole email is far below
MAX_HELD = 8 * MAX_BODY  # bytes of all the bodies that a worker holds at one time
PIECE = 64 * 1024  # bytes

NOT_WHOLE = "the body did not arrive whole"


class BodyTooLarge(Exception):
    """The body is above MAX_BODY."""


class Bodies:
    """The bodies of the webhooks that a worker is at work on. Strangers send them too."""

    def __init__(self) -> None:
        self._held = 0  # bytes
        self._lock = Lock()

    def read(self, request: Request, seconds: float) -> bytes:
        """Return the body of `request`, and hold it until `release`.

        Raise BodyTooLarge above MAX_BODY, and RetryLater if it doesn't arrive whole, doesn't
        arrive within `seconds`, or finds no memory left.
        """
        expected = request.content_length or 0
        if expected > MAX_BODY:
            raise BodyTooLarge
        pieces: list[bytes] = []
        try:
            with gevent.Timeout(seconds, RetryLater("it took too long", "body")):
                while piece := request.stream.read(PIECE):
                    pieces.append(self._hold(piece))
                    if sum(map(len, pieces)) > MAX_BODY:
                        raise BodyTooLarge
            if sum(map(len, pieces)) < expected:
                raise RetryLater(NOT_WHOLE, "body")
            return b"".join(pieces)
        except BaseException as error:
            self.release(*pieces)
            if not isinstance(error, Exception) or isinstance(error, RetryLater | BodyTooLarge | MemoryError):
                raise
            # gunicorn has an error for each way in which chunks can be wrong.
            raise RetryLater(NOT_WHOLE, "body") from None

    def _hold(self, piece: bytes) -> bytes:
        with self._lock:
            if self._held + len(piece) > MAX_HELD:
                raise RetryLater("too many large webhooks at once", "busy")
            self._held += len(piece)
        return piece

    def release(self, *bodies: bytes) -> None:
        """Let go of bodies."""
        with self._lock:
            self._held -= sum(map(len, bodies))
