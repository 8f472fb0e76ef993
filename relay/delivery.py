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
from typing import Generic, Protocol, TypeVar

from relay.message import Message
from relay.outcomes import RateLimited, Rejected, RetryLater, TransientError

T = TypeVar("T")

# Segment takes 2,500 events and 500 KB a request. Its own client stays at 100 and 475,000 bytes,
# as does the relay; 1,000 of them are for the envelope, with the time and the write key.
MAX_BATCH = 100  # messages
MAX_BATCH_BYTES = 474_000

MAX_UPLOADS = 15  # at once, in one worker
LOST_AFTER = 10  # seconds; no upload takes half as long

# A rejected upload is sent again in parts, until the event at fault stands alone. Ten parts find one among a hundred
# in three rounds, for each of which Segment may take 0.6 s.
PARTS = 10
MAX_SPLITS = 10  # uploads of parts at once, in one worker, besides the others: a rejected key rejects them all


class Pause(Protocol):
    """How long no worker may call Segment, in seconds."""

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
        """Tell the request: None if Segment has its message."""
        self.error = error
        self.done.set()

    def is_over(self) -> bool:
        """Return whether the request has its answer, or no time left for one."""
        return self.done.is_set() or self.deadline <= monotonic()


class Lane(Generic[T]):
    """A queue, and the uploads that empty it, a limited number at once.

    The lock guards the queue and the number of uploads, and is never held while anything waits.
    """

    def __init__(self, most: int, take: Callable[[deque[T]], list[Pending]], upload: Callable[[list[Pending]], None]):
        """`take` removes the next batch from the queue, and `upload` sends it. An empty batch: nothing is queued."""
        self._most = most
        self._take = take
        self._upload = upload
        self._lock = Lock()
        self._queue: deque[T] = deque()
        self._uploads: dict[object, float] = {}  # those in flight, with the time at which each began

    def add(self, *items: T) -> None:
        with self._lock:
            self._queue.extend(items)
        for _ in items:
            self._start_upload()

    def remove(self, item: T) -> None:
        """Remove an item, if it is still queued."""
        with self._lock, suppress(ValueError):
            self._queue.remove(item)

    def _start_upload(self) -> None:
        upload, now = object(), monotonic()
        with self._lock:
            if len(self._uploads) >= self._most:
                # A thread that gets no memory never starts, and so never reports its end.
                self._uploads = {other: began for other, began in self._uploads.items() if now - began < LOST_AFTER}
            if not self._queue or len(self._uploads) >= self._most:
                return
            self._uploads[upload] = now
        try:
            Thread(target=self._upload_queued, args=(upload,), daemon=True).start()
        except BaseException:
            self._upload_ended(upload)
            raise

    def _upload_ended(self, upload: object) -> None:
        with self._lock:
            self._uploads.pop(upload, None)

    def _upload_queued(self, upload: object) -> None:
        try:
            while batch := self._next_batch(upload):
                self._upload(batch)
        finally:
            self._upload_ended(upload)
            self._start_upload()  # for what is still queued, or was since the last look

    def _next_batch(self, upload: object) -> list[Pending]:
        with self._lock:
            self._uploads[upload] = monotonic()
            return self._take(self._queue)


class Delivery:
    """Deliver each message, sharing uploads with other waiting requests (group commit).

    A lone message goes at once. While MAX_UPLOADS uploads are out, messages queue up, and the
    next upload takes them all. There is no timer and nothing to tune. A message belongs to the
    request that waits for it: if a worker dies, so does the request, and Customer.io sends it again.

    If an upload is rejected, parts of it are sent until the event at fault stands alone. They have a lane of their
    own, so that they neither hold up the others nor become many.
    """

    def __init__(self, upload: Callable[[list[Message], float], None], pause: Pause):
        """`upload(messages, seconds)` returns if Segment has them; it raises RetryLater or Rejected if not."""
        self._upload = upload
        self._pause = pause
        self._webhooks = Lane(MAX_UPLOADS, take_fitting, self._upload_batch)
        self._parts = Lane(MAX_SPLITS, take_part, self._upload_batch)

    def deliver(self, message: Message, deadline: float) -> None:
        """Return once Segment has accepted `message`.

        Raise Rejected if Segment rejects this message, and RetryLater if it hasn't accepted it by
        `deadline` (on the monotonic clock).
        """
        pending = Pending(message, deadline)
        try:
            self._webhooks.add(pending)
            if not pending.done.wait(max(0, deadline - monotonic())):
                raise RetryLater("timeout")
            if pending.error:
                raise pending.error
        finally:
            if not pending.done.is_set():
                self._webhooks.remove(pending)  # don't send it: Customer.io sends it again
            del pending  # or error and traceback would keep each other, and the body, alive

    def _upload_batch(self, batch: list[Pending]) -> None:
        """Upload `batch` and tell each request how its own message fared."""
        messages = [pending.message for pending in batch]
        deadline = max(pending.deadline for pending in batch)
        try:
            try:
                self.attempt(messages, deadline)
            except TransientError:
                self.attempt(messages, deadline)  # once more
        except Rejected as rejected:
            if len(batch) > 1:
                self._parts.add(*parts(batch))
                return
            finish(batch, rejected)
        except Exception as failure:  # noqa: BLE001 - raised in deliver()
            finish(batch, failure)
        except BaseException:  # this thread dies, and no request gets a 200
            finish(batch, RetryLater("interrupted"))
            raise
        else:
            finish(batch, None)

    def attempt(self, messages: list[Message], deadline: float) -> None:
        """Upload once, unless Segment is not to be called; raise RetryLater or Rejected if it hasn't taken them."""
        if (pause := self._pause.remaining()) > 0:
            raise RateLimited(pause)
        if (seconds := deadline - monotonic()) <= 0:  # nobody waits for it any more
            raise RetryLater("timeout")
        try:
            self._upload(messages, seconds)
        except RateLimited as error:
            self._pause.extend(error.retry_after)
            raise RateLimited(self._pause.remaining()) from None


def finish(batch: list[Pending], error: Exception | None) -> None:
    for pending in batch:
        pending.finish(error)


def take_fitting(queue: deque[Pending]) -> list[Pending]:
    count = fitting(pending.message for pending in queue)
    return [queue.popleft() for _ in range(count)]


def take_part(queue: deque[list[Pending]]) -> list[Pending]:
    while queue:
        if part := [pending for pending in queue.popleft() if not pending.is_over()]:
            return part
    return []


def parts(batch: list[T]) -> list[list[T]]:
    """Return the parts of a rejected batch, to be sent one by one."""
    size = ceil(len(batch) / PARTS)
    return [batch[start : start + size] for start in range(0, len(batch), size)]


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
