"""Shared, acknowledged delivery: a message waits for Segment's answer to the upload that carries it.

It uses `threading`: gunicorn's gevent worker turns the threads into greenlets; elsewhere they are
real ones. This module knows neither HTTP nor Segment's client.
"""

from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from math import ceil
from threading import Event, Lock, Thread
from time import monotonic
from typing import NamedTuple, Protocol

# Segment takes 2,500 events and 500 KB a request. Its own client stays at 100 and 475,000 bytes,
# as does the relay; 1,000 of them are for the envelope, with the time and the write key.
MAX_BATCH = 100  # messages
MAX_BATCH_BYTES = 474_000

MAX_UPLOADS = 15  # at once, in one worker; the halves of a rejected one come on top
LOST_AFTER = 10  # seconds; no upload takes half as long


class RetryLater(Exception):
    """Segment doesn't have the event, and may take it later.

    `str()` says why, in words; `code` says it for metrics; `retry_after` is in seconds.
    """

    def __init__(self, reason: str, code: str, retry_after: float = 1):
        super().__init__(reason)
        self.code = code
        self.retry_after = max(1, ceil(retry_after))


def timed_out() -> RetryLater:
    return RetryLater("Segment did not answer in time", "timeout")


class TransientError(RetryLater):
    """A failure that a second attempt may fix: a 5xx, a 408, a dropped connection."""


class RateLimited(RetryLater):
    """Segment answered 429: no worker calls it for some seconds."""

    def __init__(self, seconds: float):
        super().__init__("Segment is limiting the rate", "rate_limited", seconds)


class Rejected(Exception):
    """Segment refuses the upload for good, because of at least one event in it (or of the key)."""

    def __init__(self, reason: str, status: int):
        super().__init__(reason)
        self.status = status


class Message(NamedTuple):
    """A track call as Segment gets it."""

    id: str  # its messageId
    json: str  # ASCII


class Pause(Protocol):
    """For how many seconds no worker may call Segment."""

    def remaining(self) -> float: ...
    def extend(self, seconds: float) -> None: ...


class Pending:
    """A message and the request waiting for it."""

    def __init__(self, message: Message, deadline: float):
        self.message = message
        self.deadline = deadline
        self.error: Exception | None = None
        self.done = Event()

    def finish(self, error: Exception | None) -> None:
        self.error = error
        self.done.set()


class Delivery:
    """Deliver each message, sharing uploads with whoever else is waiting (group commit).

    A lone message goes at once. While MAX_UPLOADS uploads are out, messages queue up, and the
    next upload takes them all. There is no timer and nothing to tune. A message belongs to the
    request that waits for it: if a worker dies, so does the request, and Customer.io sends it again.

    The lock guards the queue and the number of uploads, and is never held while anything waits.
    """

    def __init__(self, upload: Callable[[list[Message], float], None], pause: Pause):
        """`upload(messages, seconds)` returns if Segment has them; it raises RetryLater or Rejected if not."""
        self._upload = upload
        self._pause = pause
        self._lock = Lock()
        self._queue: deque[Pending] = deque()
        self._uploads: dict[object, float] = {}  # those in flight, with the time at which each began

    def deliver(self, message: Message, deadline: float) -> None:
        """Return once Segment has accepted `message`.

        Raise Rejected if Segment rejects this message, and RetryLater if it hasn't accepted it by
        `deadline` (on the monotonic clock).
        """
        pending = Pending(message, deadline)
        try:
            with self._lock:
                self._queue.append(pending)
            self._start_upload()
            if not pending.done.wait(max(0, deadline - monotonic())):
                raise timed_out()
            if pending.error:
                raise pending.error
        finally:
            if not pending.done.is_set():
                self._leave(pending)
            del pending  # or error and traceback would keep each other, and the body, alive

    def _leave(self, pending: Pending) -> None:
        """Don't send a message whose request is gone: Customer.io sends it again."""
        with self._lock, suppress(ValueError):
            self._queue.remove(pending)

    def _start_upload(self) -> None:
        upload, now = object(), monotonic()
        with self._lock:
            if len(self._uploads) >= MAX_UPLOADS:
                # A thread that finds no memory to begin with never says that it has ended.
                self._uploads = {other: began for other, began in self._uploads.items() if now - began < LOST_AFTER}
            if not self._queue or len(self._uploads) >= MAX_UPLOADS:
                return
            self._uploads[upload] = now
        try:
            Thread(target=self._send_queued, args=(upload,), daemon=True).start()
        except BaseException:
            self._upload_ended(upload)
            raise

    def _upload_ended(self, upload: object) -> None:
        with self._lock:
            self._uploads.pop(upload, None)

    def _send_queued(self, upload: object) -> None:
        try:
            while batch := self._next_batch(upload):
                self._send(batch)
        finally:
            self._upload_ended(upload)
            self._start_upload()  # for what is still queued, or was since the last look

    def _next_batch(self, upload: object) -> list[Pending]:
        with self._lock:
            self._uploads[upload] = monotonic()
            count = fitting(pending.message for pending in self._queue)
            return [self._queue.popleft() for _ in range(count)]

    def _send(self, batch: list[Pending]) -> None:
        """Upload `batch` and tell each request how its own message fared."""
        # Assume failure: if this thread dies, no request gets a 200.
        error: Exception | None = RetryLater("the upload was interrupted", "interrupted")
        messages = [pending.message for pending in batch]
        deadline = max(pending.deadline for pending in batch)
        try:
            try:
                self.upload(messages, deadline)
            except TransientError:
                self.upload(messages, deadline)  # once more
            error = None
        except Rejected as rejected:
            if len(batch) == 1:
                error = rejected
            else:  # halve until the event at fault stands alone
                middle = len(batch) // 2
                for half in (batch[:middle], batch[middle:]):
                    Thread(target=self._send, args=(half,), daemon=True).start()
                batch = []
        except Exception as failure:  # noqa: BLE001 - raised in deliver()
            error = failure
        finally:
            for pending in batch:
                pending.finish(error)

    def upload(self, messages: list[Message], deadline: float) -> None:
        """Upload once, unless Segment is not to be called; raise RetryLater or Rejected if it hasn't taken them."""
        if (pause := self._pause.remaining()) > 0:
            raise RateLimited(pause)
        if (seconds := deadline - monotonic()) <= 0:  # nobody waits for it any more
            raise timed_out()
        try:
            self._upload(messages, seconds)
        except RateLimited as error:
            self._pause.extend(error.retry_after)
            raise RateLimited(self._pause.remaining()) from None


def fitting(messages: Iterable[Message]) -> int:
    """Return how many of the first messages one upload can carry: at least one, if there are any."""
    room = MAX_BATCH_BYTES
    count = 0
    for message in messages:
        room -= len(message.json) + len(", ")
        if count and (room < 0 or count == MAX_BATCH):
            break
        count += 1
    return count
