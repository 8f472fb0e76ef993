"""Reads a webhook's body: whole, in time, and within the memory that a worker has for bodies."""

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock
from typing import IO

import gevent
from flask import Request

from relay.outcomes import BodyTooLarge, RetryLater

MAX_BODY = 8 * 1024 * 1024  # bytes; even a whole email is far smaller
MAX_HELD = 8 * MAX_BODY  # bytes of all bodies that a worker holds at once, not counting the first FREE of each
FREE = 8 * 1024  # bytes: a usual webhook fits, however many large bodies strangers send
PIECE = 16 * 1024  # bytes; of a body that stalls, less than one is held and not counted


class Bodies:
    """Bounds the memory for the bodies that a worker holds. Strangers send bodies too."""

    def __init__(self) -> None:
        self._held = 0  # bytes
        self._lock = Lock()

    @contextmanager
    def hold(self, request: Request, seconds: float) -> Iterator[bytes]:
        """Read the body of `request`, and hold it as long as the context lasts.

        Raise BodyTooLarge above MAX_BODY, and RetryLater if it doesn't arrive whole, doesn't
        arrive within `seconds`, or finds no memory left.
        """
        expected = request.content_length or 0
        if expected > MAX_BODY:
            raise BodyTooLarge("too_large")
        pieces: list[bytes] = []
        try:
            with gevent.Timeout(seconds, RetryLater("body.slow")):
                self._read(request.stream, pieces)
            body = b"".join(pieces)
            pieces[:] = [body]  # don't hold everything twice
            if len(body) < expected:
                raise RetryLater("body")
            yield body
        finally:
            self._give_room_back(sum(map(len, pieces)))

    def _read(self, stream: IO[bytes], pieces: list[bytes]) -> None:
        size = 0
        while piece := self._next_piece(stream):
            pieces.append(piece)
            try:
                self._take_room(counted(size + len(piece)) - counted(size))
            except BaseException:
                pieces.pop()  # what is released is what was held, even when memory ran out
                raise
            size += len(piece)
            if size > MAX_BODY:
                raise BodyTooLarge("too_large")

    def _next_piece(self, stream: IO[bytes]) -> bytes:
        try:
            return stream.read(PIECE)
        except (RetryLater, MemoryError):
            raise
        except Exception:  # noqa: BLE001 - gunicorn has an error for each way in which chunks can be wrong
            raise RetryLater("body") from None

    def _take_room(self, size: int) -> None:
        with self._lock:
            if self._held + size > MAX_HELD:
                raise RetryLater("busy")
            self._held += size

    def _give_room_back(self, size: int) -> None:
        with self._lock:
            self._held -= counted(size)


def counted(size: int) -> int:
    """Return how much of a body of that size counts towards MAX_HELD."""
    return max(size - FREE, 0)
