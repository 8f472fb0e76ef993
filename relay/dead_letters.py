"""Keep events that Segment can never take: JSON lines, on the log or in a file."""

import hashlib
import json
import time
from collections import deque
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from functools import partial
from time import monotonic
from typing import Any, Protocol, TypeVar

from gevent.monkey import get_original

from relay.letter_file import append
from relay.outcomes import RetryLater
from translate import NotAnObject, Undeliverable, parse

T = TypeVar("T")

TICK = 0.005  # seconds between two attempts, where waiting takes more than one
WRITERS = 4  # threads of a worker that write to the file at one time; a hung disk holds no more

# Characters of a letter in one of its parts. As JSON they take at most twice as many bytes.
PART = 1_900


class Log(Protocol):
    """Where letters go without a file: lines of at most `longest` bytes."""

    longest: int

    def put(self, line: bytes) -> None:
        """Write a line whole; raise BlockingIOError if there is no room for it now, and another OSError if never."""


class DeadLetters:
    """Where dead letters go: the file at `path`, or the log without one."""

    def __init__(self, path: str | None, log: Log):
        self._path = path
        self._log = log
        # Not a semaphore, whose lock belongs to gevent or to real threads: both need this one.
        self._free_writers = deque(range(WRITERS))

    def keep(self, body: bytes, reason: str, deadline: float) -> None:
        """Return once the event in `body` is kept.

        Raise RetryLater if it can't be, or isn't by `deadline` (on the monotonic clock).
        """
        try:
            letter = line(parse(body), reason)
        except (NotAnObject, Undeliverable, RecursionError):  # or nested too deeply to be written
            letter = line(body.decode(errors="surrogateescape"), reason)
        try:
            if self._path:
                self._append(self._path, letter.encode() + b"\n", deadline)
            else:
                # Bypass the logger: LOG_LEVEL must not hide it.
                for each in log_lines(letter, self._log.longest):
                    retry(partial(self._log.put, each), BlockingIOError, "dead_letter.unread", deadline)
        except OSError as error:
            raise RetryLater("dead_letter", f": {error.strerror}") from None

    def _append(self, path: str, content: bytes, deadline: float) -> None:
        """Append in a real thread, since a slow disk must not hold up the other webhooks.

        Thread and request look at each other's deque: gevent's locks can't be released from another
        thread, and those of real threads would stop all of gevent.
        """
        ended: deque[BaseException | None] = deque()

        def write() -> None:
            error: BaseException | None = None
            try:
                append(path, content, deadline)
            except BaseException as failure:  # noqa: BLE001 - the request raises it
                error = failure
            ended.append(error)
            self._free_writers.append(0)  # when it really ends, however long it hangs

        retry(self._free_writers.popleft, IndexError, "dead_letter.slow", deadline)
        try:
            get_original("_thread", "start_new_thread")(write, ())
        except BaseException:
            self._free_writers.append(0)
            raise
        error = retry(ended.popleft, IndexError, "dead_letter.slow", deadline)
        try:
            if error:
                raise error
        finally:
            del error  # or it and its traceback would keep each other, and the letter, alive


def retry(attempt: Callable[[], T], on: type[Exception], reason: str, deadline: float) -> T:
    """Return what `attempt` returns, tried again while it raises `on`. Raise RetryLater if it does at `deadline`."""
    while True:
        try:
            return attempt()
        except on:
            if monotonic() >= deadline:
                raise RetryLater(reason) from None
        time.sleep(TICK)


def line(event: Any, reason: str) -> str:
    """Return the line for a dead letter: {"event": ..., "reason": ..., "at": ISO 8601 UTC}."""
    return json.dumps({"event": event, "reason": reason, "at": datetime.now(UTC).isoformat(timespec="milliseconds")})


def log_lines(letter: str, longest: int) -> Iterator[bytes]:
    """Return the lines for a letter on the log: its own, or numbered parts, which ops/found.py puts together.

    The same event with the same reason has the same parts but for the time, and so the same id: where
    one attempt left a part out, the next one has it.
    """
    if len(letter) < longest - 1:
        yield letter.encode() + b"\n"
        return
    identity = hashlib.sha256(letter.rpartition('"at": ')[0].encode()).hexdigest()[:32]
    of = -(-len(letter) // PART)
    for part in range(of):
        text = letter[part * PART : (part + 1) * PART]
        yield json.dumps({"letter": identity, "part": part + 1, "of": of, "text": text}).encode() + b"\n"
