"""Acknowledged delivery: the one place that calls segment-analytics-python.

Every webhook waits here until Segment has answered the upload that carried its event.
Webhooks that wait at the same time share uploads (group commit). Several uploads may be
out at once, started at a pace that follows from what Segment takes to answer: so a
busier relay sends larger batches, not more of them, and a quiet one sends each event at once.

Everything runs in greenlets of one thread (gunicorn's gevent worker), so that nothing
between two waits needs a lock. What is queued belongs to requests that are waiting for
it: a killed worker loses both, nobody was told 200, and Customer.io sends them again.
"""

import json
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from math import ceil
from re import compile as regex
from time import monotonic
from typing import Any, TypeVar

import gevent
import requests
from gevent.event import AsyncResult
from segment.analytics import request as segment
from segment.analytics.client import Client

import pause
from translate import MAX_EVENT_BYTES, Undeliverable, scrub, shrink

Message = dict[str, Any]
T = TypeVar("T")

# Segment's limits for one request are 2,500 events and 500 KB. The official client stays
# at 100 and 475,000, and so do we.
MAX_BATCH = 100
MAX_BODY_BYTES = 475_000
ENVELOPE_BYTES = 200  # {"batch": [...], "sentAt": "...", "writeKey": ...} without the key

# At most so many uploads at once: as many as the client's session keeps connections for.
MAX_UPLOADS = 10

# The next upload starts after a tenth of the time that Segment takes to answer one: so long, at
# the most, a webhook waits for its turn. Above so many webhooks at once in a worker, after a
# third: an upload costs as much as three webhooks, and fewer of them make all answers sooner.
BUSY = 80
MAX_PACE = 0.1  # seconds, however slow Segment is: those who wait have a deadline

# Segment's documentation: its addresses change, look them up again once a day. We reconnect hourly.
RECONNECT_AFTER = 3_600  # seconds

NOT_STRICT = regex(r"NaN|Infinity|\\ud[89a-f]")


class NotAccepted(Exception):
    """Segment does not have the event, and may take it later. `str()` says why; `retry_after` is in seconds."""

    def __init__(self, reason: str, retry_after: int = 1):
        super().__init__(reason)
        self.retry_after = retry_after


class Refused(Exception):
    """Segment answered 400 or 413: something in the batch is at fault."""


class _Passing(NotAccepted):
    """What a second attempt may well mend: 5xx, a dropped connection, no answer yet."""


def shaper(write_key: str) -> Callable[[dict[str, Any]], tuple[Message, int]]:
    """Return the function that turns arguments of `Client.track` into (message, bytes as JSON).

    The client's own `track` shapes the message. What it would send and Segment would
    refuse, or drop after a 200, is mended or raised as Undeliverable.
    """
    client = Client(write_key or "dry-run", send=False)

    def shape(call: dict[str, Any]) -> tuple[Message, int]:
        try:
            message, wire = track(call)
            if NOT_STRICT.search(wire):
                call = scrub(call)
                message, wire = track(call)
            if len(wire) > MAX_EVENT_BYTES:
                # A message above 32,768 bytes the client refuses, so that wire is the call itself,
                # some 150 bytes shorter than the message that it would have become.
                call = shrink(call, len(wire) - MAX_EVENT_BYTES + (0 if message else 200))
                message, wire = track(call)
            if not message or len(wire) > MAX_EVENT_BYTES:
                raise Undeliverable(f"it cannot be made to fit into {MAX_EVENT_BYTES:,} bytes")
        except RecursionError:
            raise Undeliverable("it is nested too deeply") from None
        return message, len(wire)

    def track(call: dict[str, Any]) -> tuple[Message, str]:
        # The client writes context.library into the dict it is given.
        try:
            message: Message = client.track(**call | {"context": dict(call["context"])})[1]
        except RecursionError:  # is a RuntimeError
            raise
        except RuntimeError:  # too large; its text quotes the event
            return {}, json.dumps(call, default=str)
        return message, json.dumps(message)

    return shape


class Uploader:
    """One upload, `post(messages, seconds)`, by the official client's code."""

    def __init__(self, write_key: str, host: str):
        self._write_key = write_key
        self._host = host
        self._opened = monotonic()
        session = segment._session
        # Not trust_env, which would have the session look for a .netrc, whose entry replaces
        # the write key, and search the whole environment twice a request. The rest of what
        # it honours is looked up here, once.
        session.trust_env = False
        session.verify = os.environ.get("REQUESTS_CA_BUNDLE") or os.environ.get("CURL_CA_BUNDLE") or True
        self._proxies = requests.utils.get_environ_proxies(host)
        # A followed redirect would turn our POST into a GET, whose 200 means nothing.
        session.max_redirects = 0

    def __call__(self, messages: list[Message], seconds: float) -> None:
        """Return if Segment answered 2xx to these messages; raise Refused, _Passing or NotAccepted if not."""
        if monotonic() - self._opened > RECONNECT_AFTER:
            self.reconnect()
        try:
            response = segment.post(self._write_key, self._host, timeout=seconds, proxies=self._proxies, batch=messages)
        except segment.APIError as error:
            raise self._verdict(error.status, error.response) from None
        except requests.TooManyRedirects:
            raise NotAccepted("Segment's address redirects elsewhere: check SEGMENT_HOST") from None
        except requests.Timeout:
            raise _Passing("Segment did not answer in time") from None
        except requests.RequestException:
            self.reconnect()
            raise _Passing("the connection to Segment failed") from None
        # What is not Segment's API may answer 200 to anything: a captive portal, a proxy's page.
        text = response.content[:2_000].lstrip()
        if response.history or response.request.method != "POST" or text.startswith(b"<"):
            raise NotAccepted("what answered is not Segment: check SEGMENT_HOST and proxies")
        if b'"success":false' in text.replace(b" ", b""):
            raise _Passing("Segment answered that it failed")

    def reconnect(self) -> None:
        """Close idle connections, so that the next ones are opened to addresses looked up anew."""
        self._opened = monotonic()
        segment._session.close()

    def _verdict(self, status: int, response: requests.Response) -> Exception:
        if status in (400, 413):
            return Refused(f"Segment refuses it ({status})")
        if status == 429:
            pause.extend(segment.parse_retry_after(response) or 1)
            return _paused()
        if status in (401, 403):
            return NotAccepted(f"Segment refuses the write key ({status}): check SEGMENT_WRITE_KEY")
        if status >= 500 or status == 408:
            return _Passing(f"Segment answered {status}")
        return NotAccepted(f"Segment answered {status}")


def _paused() -> NotAccepted:
    return NotAccepted("Segment is limiting the rate", retry_after=max(1, ceil(pause.remaining())))


def batches(items: Iterable[T], size: Callable[[T], int], write_key: str) -> Iterator[list[T]]:
    """Yield `items` in order, in lists that are each at most one upload; `size` is an item's bytes as JSON."""
    whole = MAX_BODY_BYTES - ENVELOPE_BYTES - len(json.dumps(write_key))
    batch: list[T] = []
    room = whole
    for item in items:
        room -= size(item) + len(", ")
        if batch and (room < 0 or len(batch) == MAX_BATCH):
            yield batch
            batch, room = [], whole - size(item) - len(", ")
        batch.append(item)
    if batch:
        yield batch


class _Ticket:
    """A message, and the one who waits for it."""

    __slots__ = ("answer", "deadline", "message", "size")

    def __init__(self, message: Message, size: int, deadline: float):
        self.message = message
        self.size = size
        self.deadline = deadline
        self.answer: AsyncResult = AsyncResult()


class GroupCommit:
    """Hand each message to Segment, together with whatever else is waiting."""

    def __init__(self, post: Callable[[list[Message], float], None], write_key: str = ""):
        self._post = post
        self._write_key = write_key
        self._queue: deque[_Ticket] = deque()
        self._at_once = 0  # webhooks that wait for their answer
        self._out = 0  # uploads under way
        self._last_start = 0.0
        self._latency = 0.05  # of the last upload, in seconds; a guess until there is one
        self._pacing = False

    def __repr__(self) -> str:
        return f"<GroupCommit {self._out} out, {len(self._queue)} waiting>"

    def deliver(self, message: Message, size: int, deadline: float) -> None:
        """Return once Segment has accepted `message`, which is `size` bytes as JSON.

        Raises NotAccepted if it has not by `deadline` (on the monotonic clock), or will not
        have by then; Undeliverable if Segment refuses this very message.
        """
        if pause.remaining() > 0:
            raise _paused()
        if self._out >= MAX_UPLOADS:
            # Each upload that ends makes room for MAX_BATCH of those before us; then comes our own.
            turns = 1 + len(self._queue) / (MAX_BATCH * MAX_UPLOADS)
            if monotonic() + turns * self._latency > deadline:
                raise NotAccepted("Segment is slower than events arrive")
        ticket = _Ticket(message, size, deadline)
        self._queue.append(ticket)
        self._at_once += 1
        try:
            self._start_uploads()
            error = ticket.answer.get(timeout=max(deadline - monotonic(), 0))
        except gevent.Timeout:
            error = NotAccepted("Segment did not answer in time")
        finally:
            self._at_once -= 1
            # Whatever ended the wait, nobody is left to answer: do not send it late.
            if not ticket.answer.ready() and ticket in self._queue:
                self._queue.remove(ticket)
        if error:
            raise error

    def _start_uploads(self) -> None:
        for batch in self._due():
            gevent.spawn(self._send, batch, self._ended)

    def _due(self) -> list[list[_Ticket]]:
        """Take the batches whose time has come off the queue, and see to it that the next one's will."""
        due = []
        while self._queue and self._out < MAX_UPLOADS:
            pace = min(self._latency / (10 if self._at_once <= BUSY else 3), MAX_PACE)
            wait = self._last_start + pace - monotonic()
            if self._out and wait > 0 and len(self._queue) < MAX_BATCH:
                if not self._pacing:
                    self._pacing = True
                    gevent.spawn_later(wait, self._go_on)
                break
            self._out += 1
            self._last_start = monotonic()
            due.append(self._next_batch())
        return due

    def _go_on(self) -> None:
        self._pacing = False
        due = self._due()
        for batch in due[1:]:
            gevent.spawn(self._send, batch, self._ended)
        if due:  # here and now: another greenlet would wait its turn behind all that is going on
            self._send(due[0], self._ended)

    def _ended(self, started: float) -> None:
        self._latency = monotonic() - started
        self._out -= 1
        self._start_uploads()

    def _next_batch(self) -> list[_Ticket]:
        batch = next(batches(self._queue, lambda ticket: ticket.size, self._write_key))
        for _ in batch:
            self._queue.popleft()
        return batch

    def _send(self, batch: list[_Ticket], ended: Callable[[float], None] = lambda started: None) -> None:
        """Upload `batch`, tell each waiter how their own message fared, and then call `ended`.

        Returns when the first attempt ends; what is left to do then, others do.
        """
        started = monotonic()

        def settle(error: Exception | None) -> None:
            if isinstance(error, Refused) and len(batch) > 1:
                middle = len(batch) // 2
                gevent.spawn(self._send, batch[:middle])
                gevent.spawn(self._send, batch[middle:])
            else:
                for ticket in batch:
                    ticket.answer.set(Undeliverable(str(error)) if isinstance(error, Refused) else error)
            ended(started)

        deadline = max(ticket.deadline for ticket in batch)
        _Upload(self._post, [ticket.message for ticket in batch], deadline, settle).attempt()


class _Upload:
    """One batch on its way to Segment: at most two attempts, and then one call of `settle`.

    A second attempt is made when the first fails in passing, or has no answer after half of the
    time. The first may still succeed while the second is out: Segment knows the messages by
    their messageId, and keeps one of each.
    """

    def __init__(
        self,
        post: Callable[[list[Message], float], None],
        messages: list[Message],
        deadline: float,
        settle: Callable[[Exception | None], None],
    ):
        self._post = post
        self._messages = messages
        self._deadline = deadline
        self._settle: Callable[[Exception | None], None] | None = settle
        self._attempts: list[gevent.Greenlet] = []
        self._second_chance = True
        self._unanswered = 0
        self._clock = gevent.spawn_later(self._seconds_left() / 2, self._at_half_time)

    def _seconds_left(self) -> float:
        return max(self._deadline - monotonic(), 0.001)

    def attempt(self) -> None:
        self._unanswered += 1
        self._attempts.append(gevent.getcurrent())
        # Not accepted until proven otherwise: however this ends, GreenletExit included,
        # nobody may be told that all went well.
        outcome: Exception | None = NotAccepted("interrupted before Segment answered")
        try:
            if pause.remaining() > 0:
                raise _paused()
            self._post(self._messages, self._seconds_left())
            outcome = None
        except Exception as error:  # noqa: BLE001 - told to every waiter, whose webhook answers 503
            outcome = error
        finally:
            self._unanswered -= 1
            self._judge(outcome)

    def _judge(self, outcome: Exception | None) -> None:
        if isinstance(outcome, _Passing) and self._second_chance:
            self._second_chance = False
            self.attempt()
        elif not (isinstance(outcome, _Passing) and self._unanswered):
            self._end(outcome)

    def _at_half_time(self) -> None:
        if self._second_chance:
            self._second_chance = False
            gevent.spawn(self.attempt)
        gevent.sleep(self._seconds_left())
        self._end(_Passing("Segment did not answer in time"))

    def _end(self, outcome: Exception | None) -> None:
        settle, self._settle = self._settle, None
        if settle:
            # This also ends an answer that arrives byte by byte, for which no socket times out.
            for greenlet in {*self._attempts, self._clock}:
                if greenlet is not gevent.getcurrent():
                    greenlet.kill(block=False)
            settle(outcome)
