"""Keeps what Segment can never take: whole, one JSON line each, on the log or in a file."""

import fcntl
import json
import logging
import os
import sys
from datetime import UTC, datetime
from typing import Any

import gevent

from translate import Undeliverable, parse

log = logging.getLogger("relay")


def line(event: Any, reason: str) -> str:
    """Return the line for a dead letter: {"event": ..., "reason": ..., "at": ISO 8601 UTC}."""
    return json.dumps({"event": event, "reason": reason, "at": datetime.now(UTC).isoformat(timespec="milliseconds")})


def file_problem(path: str) -> str | None:
    """Return what keeps `path` from being appended to, or None; makes the file if there is none."""
    try:
        os.close(_open(path))
    except (OSError, ValueError) as error:
        return getattr(error, "strerror", None) or "not a path"
    return None


def keep(body: bytes, reason: str, path: str | None) -> Any:
    """Return the event in `body` once it is kept, in the file `path` or on the log; raise OSError if it can't be."""
    event: Any
    try:
        event = parse(body)
        letter = line(event, reason)
    except (Undeliverable, RecursionError):  # nested too deeply to be read, or to be written
        event = body.decode(errors="replace")
        letter = line(event, reason)
    if path:
        # In a thread of its own: a slow disk must not hold up the other webhooks.
        gevent.get_hub().threadpool.apply(_append, (path, letter.encode() + b"\n"))
        log.warning("dead letter kept in %s: %s", path, reason)
    else:
        # Past the logger: it is part of the log whatever LOG_LEVEL says.
        sys.stderr.write(letter + "\n")
        sys.stderr.flush()
    return event


def _open(path: str) -> int:
    # For the owner alone: dead letters are the one place where personal data is kept.
    return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)


def _append(path: str, content: bytes) -> None:
    """Append `content` and flush it to disk, or leave the file as it was and raise OSError."""
    # Opened anew each time, so that the file may be moved away at any moment.
    file = _open(path)
    try:
        fcntl.flock(file, fcntl.LOCK_EX)  # other workers append too
        size = os.fstat(file).st_size
        try:
            if os.write(file, content) != len(content):
                raise OSError("the disk is full")
            os.fsync(file)
        except OSError:
            os.ftruncate(file, size)
            raise
    finally:
        os.close(file)
