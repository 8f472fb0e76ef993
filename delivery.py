"""Acknowledged delivery: the one place that calls segment-analytics-python.

Every webhook waits here until Segment has answered the upload that carried its event.
Webhooks that wait at the same time share uploads (group commit): what arrives in the same turn
of the event loop is translated and goes together. A turn takes as long as there is to do in
it, so a quiet relay sends each event at once, and a busier one larger batches, not more of them.

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
import urllib3
from gevent.event import AsyncResult
from requests.adapters import HTTPAdapter
from requests.structures import CaseInsensitiveDict
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

# At most so many uploads at once in a worker, each on a connection of its own. They start no closer
# together than this part of the time that Segment takes to answer one, so that a quiet relay has
# one to spare for whoever comes, however slow Segment is.
MAX_UPLOADS = 30

# Who shares an upload is answered, and comes back, at the same time: bunches in which each waits
# for all, and which only grow. So of so few who arrive together half go at once, half a pace later.
FEW = 20

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


class Session(HTTPAdapter):
    """What the client's `post` sends through, in place of a session of requests.

    That one prepares each request anew, searches the environment for proxies twice, lets a .netrc
    replace the write key, and follows redirects, which turns a POST into a GET whose 200 means
    nothing: half of what an upload costs. Here requests finds out once how to reach Segment
    (proxies, certificates), and urllib3 does the rest.
    """

    def __init__(self, host: str):
        super().__init__(pool_maxsize=MAX_UPLOADS)
        self._proxies = requests.utils.get_environ_proxies(host)
        self._verify = os.environ.get("REQUESTS_CA_BUNDLE") or os.environ.get("CURL_CA_BUNDLE") or True
        self._way: tuple[Any, str] | None = None  # urllib3's pool of connections, and the path to ask it for

    def post(self, url: str, data: str, headers: dict[str, str], timeout: float) -> requests.Response:
        """Return Segment's answer, read to its end; raise urllib3's HTTPError, or requests', if there is none."""
        connections, path = self._way = self._way or self._find(url)
        never = {"retries": False, "redirect": False, "assert_same_host": False}
        raw = connections.urlopen("POST", path, data, headers, **never, timeout=timeout, preload_content=False)
        response = requests.Response()
        response.raw, response.status_code, response.reason = raw, raw.status, raw.reason or ""
        response.headers = CaseInsensitiveDict(raw.headers)
        response.encoding = "utf-8"  # rather than a guess from the whole body, which takes long
        # Reading it to its end gives the connection back. An answer that ends in the midst of its head
        # looks like one without a length and without content, and is none: its 200 may be anybody's.
        if not response.content and raw.length_remaining is None and not raw.chunked:
            raise urllib3.exceptions.ProtocolError("the answer was cut off")
        return response

    def _find(self, url: str) -> tuple[Any, str]:
        request = requests.Request("POST", url).prepare()
        connections = self.get_connection_with_tls_context(request, self._verify, self._proxies)
        self.cert_verify(connections, url, self._verify, None)  # type: ignore[no-untyped-call]
        return connections, self.request_url(request, self._proxies)

    def close(self) -> None:
        """Close idle connections, and the others once they are free; the next ones look addresses up anew."""
        if self._way:
            self._way[0].close()
        self._way = None
        super().close()


class Uploader:
    """One upload, `post(messages, seconds)`, by the official client's code."""

    def __init__(self, write_key: str, host: str):
        self._write_key = write_key
        self._host = host
        self._opened = monotonic()
        segment._session = Session(host)

    def __call__(self, messages: list[Message], seconds: float) -> None:
        """Return if Segment answered 2xx to these messages; raise Refused, _Passing or NotAccepted if not."""
        if monotonic() - self._opened > RECONNECT_AFTER:
            self.reconnect()
        try:
            response = segment.post(self._write_key, self._host, timeout=seconds, batch=messages)
        except segment.APIError as error:
            raise self._verdict(error.status, error.response) from None
        except (requests.RequestException, urllib3.exceptions.HTTPError) as error:
            late = isinstance(error, requests.Timeout | urllib3.exceptions.TimeoutError)
            if late and not isinstance(error, urllib3.exceptions.NewConnectionError):  # refused is no timeout
                raise _Passing("Segment did not answer in time") from None
            self.reconnect()
            raise _Passing("the connection to Segment failed") from None
        # What is not Segment's API may answer 200 to anything: a captive portal, a proxy's page.
        text = response.content[:2_000].lstrip()
        if text.startswith(b"<"):
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
        if response.is_redirect:
            return NotAccepted("Segment's address redirects elsewhere: check SEGMENT_HOST")
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
    """A message to be, and the one who waits for it."""

    __slots__ = ("answer", "deadline", "make", "message", "size")

    def __init__(self, make: Callable[[], tuple[Message, int]], deadline: float):
        self.make = make
        self.message: Message = {}
        self.size = 0
        self.deadline = deadline
        self.answer: AsyncResult = AsyncResult()


class GroupCommit:
    """Hand each message to Segment, together with whatever else is waiting."""

    def __init__(self, post: Callable[[list[Message], float], None], write_key: str = ""):
        self._post = post
        self._write_key = write_key
        self._arrived: list[_Ticket] = []  # since the last turn
        self._queue: deque[_Ticket] = deque()  # messages, that wait for an upload
        self._out = 0  # uploads under way
        self._last_start = 0.0
        self._latency = 0.3  # of the last upload, in seconds; a guess until there is one
        self._turn_comes = False
        self._pacing = False

    def __repr__(self) -> str:
        return f"<GroupCommit {self._out} out, {len(self._queue)} waiting>"

    def deliver(self, make: Callable[[], tuple[Message, int]], deadline: float) -> Message:
        """Return a message once Segment has accepted it.

        `make` returns it and its size in bytes, as JSON. It is called with those of others who
        arrive in the same turn of the event loop, one right after the other, which takes the
        processor half as long as each by itself. What it raises is raised here. So is NotAccepted
        if Segment has not accepted the message by `deadline` (on the monotonic clock), or will
        not have by then; and Undeliverable if Segment refuses this very message.
        """
        ticket = _Ticket(make, deadline)
        self._arrived.append(ticket)
        self._soon()
        try:
            error = ticket.answer.get(timeout=max(deadline - monotonic(), 0))
        except gevent.Timeout:
            error = NotAccepted("Segment did not answer in time")
        finally:
            # Whatever ended the wait, nobody is left to answer: do not send it late.
            if not ticket.answer.ready():
                for line in (self._arrived, self._queue):
                    if ticket in line:
                        line.remove(ticket)
        if error:
            raise error
        return ticket.message

    def _soon(self) -> None:
        """Have a turn once all that is ready in the event loop has been seen to."""
        if not self._turn_comes:
            self._turn_comes = True
            gevent.spawn(self._turn)

    def _turn(self) -> None:
        """Make the messages of those who have arrived, and start the uploads that are due."""
        self._turn_comes = False
        nobody_waits = not self._queue
        arrived, self._arrived = self._arrived, []
        for ticket in arrived:
            try:
                ticket.message, ticket.size = ticket.make()
                self._refuse_early(ticket.deadline)
            except Exception as error:  # noqa: BLE001 - raised to who waits for it
                ticket.answer.set(error)
            else:
                self._queue.append(ticket)
        due = self._due(halve=nobody_waits and len(self._queue) <= FEW)
        for batch in due[1:]:
            gevent.spawn(self._send, batch, self._ended)
        if due:  # here and now: another greenlet would wait its turn behind all that is going on
            self._send(due[0], self._ended)

    def _refuse_early(self, deadline: float) -> None:
        if pause.remaining() > 0:
            raise _paused()
        if self._out >= MAX_UPLOADS:
            # Each upload that ends makes room for MAX_BATCH of those before us; then comes our own.
            turns = 1 + len(self._queue) / (MAX_BATCH * MAX_UPLOADS)
            if monotonic() + turns * self._latency > deadline:
                raise NotAccepted("Segment is slower than events arrive")

    def _due(self, halve: bool) -> list[list[_Ticket]]:
        """Take what goes now off the queue, and see to it that the rest goes a pace later."""
        most = ceil(len(self._queue) / 2) if halve else MAX_BATCH
        due = []
        while self._queue and self._out < MAX_UPLOADS:
            wait = self._last_start + self._latency / MAX_UPLOADS - monotonic()
            if self._out and wait > 0 and len(self._queue) < MAX_BATCH:
                if not self._pacing:
                    self._pacing = True
                    gevent.spawn_later(wait, self._go_on)
                break
            self._out += 1
            self._last_start = monotonic()
            due.append(self._next_batch(most))
        return due

    def _go_on(self) -> None:
        self._pacing = False
        self._turn()

    def _ended(self, started: float) -> None:
        self._latency = monotonic() - started
        self._out -= 1
        if self._queue:
            self._soon()

    def _next_batch(self, most: int) -> list[_Ticket]:
        batch = next(batches(self._queue, lambda ticket: ticket.size, self._write_key))[:most]
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
