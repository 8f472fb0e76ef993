"""Keep events that Segment can never take: one JSON line each, on the log or in a file."""

import errno
import fcntl
import json
import os
from datetime import UTC, datetime
from threading import BoundedSemaphore
from time import monotonic
from typing import Any

import gevent

import logs
from delivery import RetryLater
from ops.preflight import open_private
from translate import Undeliverable, parse

# gevent has ten threads, which look up names too: a hung disk must not hold them all.
WRITERS = 4


class DeadLetters:
    """Where dead letters go: the file at `path`, or the log without one."""

    def __init__(self, path: str | None):
        self._path = path
        self._log = logs.stream()
        self._writers = BoundedSemaphore(WRITERS)

    def keep(self, body: bytes, reason: str, deadline: float) -> None:
        """Return once the event in `body` is kept.

        Raise RetryLater if it can't be, or isn't by `deadline` (on the monotonic clock).
        """
        try:
            letter = line(parse(body), reason)
        except (Undeliverable, RecursionError):  # nested too deeply to be read, or to be written
            letter = line(body.decode(errors="replace"), reason)
        if self._path:
            try:
                self._append(letter.encode() + b"\n", deadline)
            except OSError as error:
                raise RetryLater(f"the dead letter could not be kept: {error.strerror}", "dead_letter") from None
        else:
            # Bypass the logger: LOG_LEVEL must not hide it.
            self._log.write(letter + "\n")

    def _append(self, content: bytes, deadline: float) -> None:
        """Append in a thread, since a slow disk must not hold up the other webhooks."""
        with gevent.Timeout(max(0, deadline - monotonic()), RetryLater("the disk is too slow", "dead_letter")):
            self._writers.acquire()
            try:
                write = gevent.get_hub().threadpool.spawn(failure_of_append, self._path, content, deadline)
            except BaseException:
                self._writers.release()
                raise
            write.rawlink(lambda _: self._writers.release())  # when it really ends, however long it hangs
            if error := write.get():
                raise error


def line(event: Any, reason: str) -> str:
    """Return the line for a dead letter: {"event": ..., "reason": ..., "at": ISO 8601 UTC}."""
    return json.dumps({"event": event, "reason": reason, "at": datetime.now(UTC).isoformat(timespec="milliseconds")})


def failure_of_append(path: str, content: bytes, deadline: float) -> OSError | None:
    """Return the failure, for gevent logs the whole traceback of what its threads raise."""
    try:
        append(path, content, deadline)
    except OSError as error:
        return error
    return None


def append(path: str, content: bytes, deadline: float) -> None:
    """Append `content` and flush it to disk, or leave the file as it was and raise OSError.

    After `deadline` nobody waits for it, and the event will come again: do nothing.
    """
    if monotonic() > deadline:
        return
    # Opened anew each time, so that the file may be moved away at any moment.
    file = open_private(path)
    try:
        fcntl.flock(file, fcntl.LOCK_EX)  # other workers append too
        size = os.fstat(file).st_size
        try:
            if os.write(file, content) != len(content):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(file)
        except OSError:
            os.ftruncate(file, size)
            raise
    finally:
        os.close(file)
