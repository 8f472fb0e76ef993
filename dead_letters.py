"""Keep events that Segment can never take: JSON lines, on the log or in a file."""

import errno
import fcntl
import hashlib
import json
import os
import time
from collections import deque
from collections.abc import Iterator
from datetime import UTC, datetime
from time import monotonic
from typing import Any

from gevent.monkey import get_original

import logs
from ops.preflight import open_private
from outcomes import RetryLater
from translate import NotAnObject, Undeliverable, parse

WRITERS = 4  # threads of a worker that write to the file at one time; a hung disk holds no more

# Characters of a letter in one of its parts. As JSON they take at most twice as many bytes.
PART = 1_900


class DeadLetters:
    """Where dead letters go: the file at `path`, or the log without one."""

    def __init__(self, path: str | None):
        self._path = path
        self._log = logs.stream()
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
                self._log.keep(log_lines(letter), deadline)
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

        first(self._free_writers, deadline)
        try:
            get_original("_thread", "start_new_thread")(write, ())
        except BaseException:
            self._free_writers.append(0)
            raise
        error = first(ended, deadline)
        try:
            if error:
                raise error
        finally:
            del error  # or it and its traceback would keep each other, and the letter, alive


def first(items: deque[Any], deadline: float) -> Any:
    """Take the first item as soon as there is one. Raise RetryLater if there is none by `deadline`."""
    while True:
        try:
            return items.popleft()
        except IndexError:
            if monotonic() >= deadline:
                raise RetryLater("dead_letter.slow") from None
        time.sleep(logs.TICK)


def line(event: Any, reason: str) -> str:
    """Return the line for a dead letter: {"event": ..., "reason": ..., "at": ISO 8601 UTC}."""
    return json.dumps({"event": event, "reason": reason, "at": datetime.now(UTC).isoformat(timespec="milliseconds")})


def log_lines(letter: str) -> Iterator[bytes]:
    """Return the lines for a letter on the log: its own, or numbered parts, which ops/found.py puts together.

    The same event with the same reason has the same parts but for the time, and so the same id: where
    one attempt left a part out, the next one has it.
    """
    if len(letter) < logs.LINE - 1:
        yield letter.encode() + b"\n"
        return
    identity = hashlib.sha256(letter.rpartition('"at": ')[0].encode()).hexdigest()[:32]
    of = -(-len(letter) // PART)
    for part in range(of):
        text = letter[part * PART : (part + 1) * PART]
        yield json.dumps({"letter": identity, "part": part + 1, "of": of, "text": text}).encode() + b"\n"


def append(path: str, content: bytes, deadline: float) -> None:
    """Append `content` as a line of its own and flush it to disk, or leave the file as it was and raise OSError.

    After `deadline` nobody waits for it, and the event will come again: write nothing, and raise too.
    """
    # Opened anew each time, so that the file may be moved away at any moment.
    file = open_private(path)
    try:
        fcntl.flock(file, fcntl.LOCK_EX)  # other workers append too
        if monotonic() >= deadline:
            raise TimeoutError(errno.ETIMEDOUT, "the disk is too slow")
        size = os.fstat(file).st_size
        if size and os.pread(file, 1, size - 1) != b"\n":  # a worker was killed while it wrote
            content = b"\n" + content
        try:
            if os.write(file, content) != len(content):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(file)
            if not os.fstat(file).st_nlink:  # replaced or removed since it was opened, and nobody would find the letter
                raise OSError(errno.ESTALE, "the file was removed meanwhile")
        except OSError:
            os.ftruncate(file, size)
            raise
    finally:
        os.close(file)
