"""The log that all workers share: whole lines, text or JSON; repeated lines are rate-limited."""

import fcntl
import json
import logging
import os
import select
import socket
import stat
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import UTC, datetime
from functools import cache, partial
from threading import Timer

from gevent.monkey import get_original

STDOUT, STDERR = 1, 2
LINE = 4096  # bytes, the line break included: PIPE_BUF of Linux. Container runtimes cut lines from 8 KB on.
UNREAD = 1024 * 1024  # bytes of a dry run's output
REPEAT_AFTER = 10  # seconds
KINDS = 10  # different messages that are counted apart, for one reason

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
        kept = len(message)
        while len(text := json.dumps(line | more)) > LINE - 2:  # a traceback: where it begins, and where it ends
            kept //= 2
            line["message"] = message[: kept // 2] + " [...] " + message[-(kept // 2) - 1 :]
        return text


class Stream:
    """Standard error, one line at a time, without ever waiting for its reader.

    A line has at most LINE bytes, which a pipe takes whole or not at all. So the lines of several
    workers don't get mixed up, and no lock is needed. Lines that find no room are dropped and counted.
    """

    longest = LINE

    def __init__(self) -> None:
        self.formatter: logging.Formatter = TEXT
        self._fd = STDERR
        self._write = never_waiting(STDERR)
        self._cut = False  # whether the last line is
        self._dropped = 0  # lines
        os.register_at_fork(after_in_child=self._forget)

    def _forget(self) -> None:
        self._dropped = 0  # the parent's: it says so itself

    def stay(self) -> None:
        """Keep what is standard error now: `gunicorn -D` redirects it to /dev/null."""
        if self._fd == STDERR:
            self._fd = os.dup(STDERR)
            self._write = never_waiting(self._fd)

    def restore(self) -> None:
        """Make it the standard error of the program that is about to replace this one."""
        if self._fd != STDERR:
            os.dup2(self._fd, STDERR)

    def write(self, text: str) -> None:
        """Write a log record, or drop it."""
        self.flush()
        for piece in pieces_of(text.encode(errors="backslashreplace")):
            if self._dropped or not self._offer(piece):
                self._dropped += 1

    def flush(self) -> None:
        """Say how many lines were dropped, if there is room now. Nothing is buffered."""
        if self._dropped:
            words = f"{self._dropped} log lines were dropped: nobody read the log"
            record = logging.makeLogRecord({"levelno": logging.WARNING, "levelname": "WARNING", "msg": words})
            if self._offer(self.formatter.format(record).encode() + b"\n"):
                self._dropped = 0

    def _offer(self, line: bytes) -> bool:
        try:
            self.put(line)
        except OSError:  # no room; its reader is gone; a full disk
            return False
        return True

    def put(self, line: bytes) -> None:
        """Write a line. Raise BlockingIOError if it doesn't get in whole; then the next begins a line of its own."""
        data = b"\n" + line if self._cut else line
        written = self._write(data)
        self._cut = written < len(data)
        if self._cut:
            raise BlockingIOError


class Output:
    """Standard output for `print` in a dry run, in the order of the texts, without ever waiting for its reader.

    What finds no room is kept, and written with the next text or by worker.py, once a second. While UNREAD bytes
    are kept, texts are dropped.
    """

    def __init__(self) -> None:
        self._write = never_waiting(STDOUT)
        self._rest = b""

    def write(self, text: str) -> None:
        if len(self._rest) < UNREAD:
            self._rest += text.encode(errors="backslashreplace")
        self.flush()

    def flush(self) -> None:
        with suppress(OSError):  # no room; its reader is gone
            while self._rest:
                self._rest = self._rest[self._write(self._rest) :]


def never_waiting(fd: int) -> Callable[[bytes], int]:
    """Return a function that writes to `fd` as `os.write` does, but raises BlockingIOError instead of waiting.

    O_NONBLOCK would affect everybody who shares the descriptor. So a pipe or a terminal is opened again.
    """
    mode = os.fstat(fd).st_mode
    if stat.S_ISSOCK(mode):  # systemd's journal
        return partial(send, fd)
    if not stat.S_ISFIFO(mode) and not os.isatty(fd):
        return partial(os.write, fd)
    with suppress(OSError):  # no /proc, or a pipe of another user's
        flags = os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
        return partial(os.write, os.open(f"/proc/self/fd/{fd}", flags))
    with tempfile.TemporaryFile() as lock:
        return partial(write_if_room, fd, os.dup(lock.fileno()))


def send(fd: int, data: bytes) -> int:
    sock = get_original("socket", "socket")(fileno=fd)  # gevent's would make it non-blocking for everybody
    try:
        return int(sock.send(data, socket.MSG_DONTWAIT))
    finally:
        sock.detach()


def write_if_room(fd: int, lock: int, data: bytes) -> int:
    """Write to a pipe of another user's. The lock keeps other workers from taking the room between poll and write."""
    fcntl.lockf(lock, fcntl.LOCK_EX)  # nobody waits while they hold it
    try:
        poll = get_original("select", "poll")()
        poll.register(fd, select.POLLOUT)
        if not poll.poll(0):
            raise BlockingIOError
        return os.write(fd, data)
    finally:
        fcntl.lockf(lock, fcntl.LOCK_UN)


def pieces_of(record: bytes) -> Iterator[bytes]:
    """Return a log record, or its lines where it has more than LINE bytes; what is longer even so is cut off."""
    if len(record) < LINE:
        yield record
        return
    for line in record.splitlines():
        yield line[: LINE - 2] + b"\n"


@cache
def stream() -> Stream:
    """Return the log of this process and its relatives. gunicorn.conf.py calls it before it forks."""
    return Stream()


def set_up(level: str, form: str) -> None:
    """Send our lines and gunicorn's to the stream, in the same form: "text" or "json"."""
    formatter = stream().formatter = Json() if form == "json" else TEXT
    if not logging.root.handlers:
        logging.basicConfig(level=level.upper(), handlers=[logging.StreamHandler(stream())])
    for handler in logging.root.handlers + logging.getLogger("gunicorn.error").handlers:
        handler.setFormatter(formatter)
        if type(handler) is logging.StreamHandler:  # leave other handlers alone
            handler.setStream(stream())
    if form == "json":
        for handler in logging.getLogger("gunicorn.access").handlers:
            handler.setFormatter(formatter)


class Repeats:
    """Logs a reason at once, and then at most every REPEAT_AFTER seconds, with the number of times.

    A reason may have several words, like "Segment refuses it (400)" and "(413)": each has its own line and number.
    """

    def __init__(self, log: logging.Logger):
        self._log = log
        # How often each of its words came since the last line, for each reason that had one lately.
        self._counted: dict[tuple[str, str], Counter[tuple[int, str]]] = {}

    def log(self, level: int, message: str, outcome: str, reason: str) -> None:
        """Log `message` for this pair of labels: what became of the webhook, and why."""
        pair = outcome, reason
        if pair not in self._counted:
            self._write(pair, Counter([(level, message)]))
            return
        counted = self._counted[pair]
        known = (level, message) in counted or len(counted) < KINDS
        counted[level, message if known else f"{outcome}, in other words"] += 1

    def _write(self, pair: tuple[str, str], counted: Counter[tuple[int, str]]) -> None:
        self._counted[pair] = Counter()
        for (level, message), times in counted.items():
            again = f" ({times} times in {REPEAT_AFTER} s)" if times > 1 else ""
            self._log.log(level, message + again, extra={"reason": pair[1], "count": times})
        timer = Timer(REPEAT_AFTER, self._repeat, (pair,))
        timer.daemon = True
        timer.start()

    def _repeat(self, pair: tuple[str, str]) -> None:
        if counted := self._counted.pop(pair):
            self._write(pair, counted)
