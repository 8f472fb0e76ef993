"""The log that all workers share: each line whole, whatever its length."""

import fcntl
import logging
import os
import tempfile
from functools import cache

STDERR = 2

# As gunicorn's own lines look.
FORMAT = "%(asctime)s [%(process)d] [%(levelname)s] %(message)s"
DATES = "[%Y-%m-%d %H:%M:%S %z]"


class Stream:
    """Standard error, for one line at a time.

    A pipe takes 4,096 bytes at once. Longer lines of several workers would get mixed up, so each
    line holds a lock, which the kernel lets go of if its worker is killed.
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
        """Nothing is kept back."""


@cache
def stream() -> Stream:
    """Return the log of this process and its relatives. gunicorn.conf.py calls it before it forks."""
    return Stream()


def set_up(level: str) -> None:
    """Send our lines and gunicorn's to the stream, in the same form."""
    handler = logging.StreamHandler(stream())
    handler.setFormatter(logging.Formatter(FORMAT, DATES))
    logging.basicConfig(level=level.upper(), handlers=[handler])
    for gunicorns in logging.getLogger("gunicorn.error").handlers:
        if isinstance(gunicorns, logging.StreamHandler):
            gunicorns.setStream(stream())
