"""The log that all workers share: whole lines, text or JSON, and no line over and over again."""

import fcntl
import json
import logging
import os
import tempfile
from datetime import UTC, datetime
from functools import cache
from threading import Timer

STDERR = 2
REPEAT_AFTER = 10  # seconds

# As gunicorn's own lines look.
TEXT = logging.Formatter("%(asctime)s [%(process)d] [%(levelname)s] %(message)s", "[%Y-%m-%d %H:%M:%S %z]")


class Json(logging.Formatter):
    """One JSON object a line: `time`, `level`, `message`, and `reason` and `count` where there are any."""

    def format(self, record: logging.LogRecord) -> str:
        message = super().format(record)  # with a traceback, if there is one
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "message": message,
        }
        more = {name: getattr(record, name) for name in ("reason", "count") if hasattr(record, name)}
        return json.dumps(line | more)


class Stream:
    """Standard error, for one line at a time.

    A pipe takes 4,096 bytes at once. Longer lines of several workers would get mixed up, so each
    line holds a lock, which the kernel releases if the worker is killed.
    """

    def __init__(self) -> None:
        self._lock = tempfile.TemporaryFile()  # noqa: SIM115 - open as long as the process; it has no name

    def write(self, text: str) -> None:
        data = text.encode(errors="backslashreplace")
        fcntl.lockf(self._lock, fcntl.LOCK_EX)
        try:
            while data:
                data = data[os.write(STDERR, data) :]
        finally:
            fcntl.lockf(self._lock, fcntl.LOCK_UN)

    def flush(self) -> None:
        """Nothing is buffered."""


@cache
def stream() -> Stream:
    """Return the log of this process and its relatives. gunicorn.conf.py calls it before it forks."""
    return Stream()


def set_up(level: str, form: str) -> None:
    """Send our lines and gunicorn's to the stream, in the same form: "text" or "json"."""
    formatter = Json() if form == "json" else TEXT
    if not logging.root.handlers:
        logging.basicConfig(level=level.upper(), handlers=[logging.StreamHandler(stream())])
    for handler in logging.root.handlers + logging.getLogger("gunicorn.error").handlers:
        handler.setFormatter(formatter)
        if type(handler) is logging.StreamHandler:  # not to a file, nor to anything else that somebody wants it in
            handler.setStream(stream())
    if form == "json":
        for handler in logging.getLogger("gunicorn.access").handlers:
            handler.setFormatter(formatter)


class Repeats:
    """Logs a reason at once, and then at most every REPEAT_AFTER seconds, with the number of times."""

    def __init__(self, log: logging.Logger):
        self._log = log
        self._times: dict[tuple[str, str], int] = {}  # since its last line, for each reason that had one lately

    def __call__(self, level: int, message: str, outcome: str, code: str) -> None:
        """Log `message` for a reason: what became of the webhook, and why, both short codes."""
        reason = outcome, code
        if reason in self._times:
            self._times[reason] += 1
        else:
            self._write(level, message, reason, 1)

    def _write(self, level: int, message: str, reason: tuple[str, str], times: int) -> None:
        self._times[reason] = 0
        again = f" ({times} times in {REPEAT_AFTER} s)" if times > 1 else ""
        self._log.log(level, message + again, extra={"reason": reason[1], "count": times})
        timer = Timer(REPEAT_AFTER, self._repeat, (level, message, reason))
        timer.daemon = True
        timer.start()

    def _repeat(self, level: int, message: str, reason: tuple[str, str]) -> None:
        if times := self._times.pop(reason):
            self._write(level, message, reason, times)
