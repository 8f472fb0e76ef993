"""gunicorn's gevent worker: it ends idle connections gracefully, and answers what gunicorn can't read."""

import json
import logging
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache, partial
from http import HTTPStatus
from time import monotonic
from types import FrameType
from typing import Any

import gevent
from gevent.server import StreamServer
from gunicorn.http.body import ChunkedReader
from gunicorn.http.errors import ParseException
from gunicorn.workers.ggevent import GeventWorker

from relay.outcomes import ENDS, NotHttp, RetryLater
from server.connection import FREE_HEAD, Connection
from server.log import Output, Repeats, stream
from server.shared import WORKER_COLUMNS, of_service

# How long a stopping worker keeps idle connections. A webhook may be on its way on one of them,
# and a reset would cost an hour; it is answered, with "Connection: close".
LINGER = 2  # seconds
# How long to keep a connection that has not carried a genuine webhook: strangers could otherwise hold all of a
# worker's connections. Proxies' health checks usually come more often.
STRANGER = 5  # seconds
# Strangers who come all at once would have new webhooks wait as long. When more than this share of a worker's
# connections is in use, strangers get one to two seconds, head included.
CROWDED = 0.9
STRANGER_IN_A_CROWD = 1  # seconds
# How much longer for the rest of a request's head, if some of it has come by then.
LAST_CALL = 2  # seconds

# New connections that a worker accepts in a row. With gunicorn's 1, new webhooks waited for seconds while 200
# connections loaded the page. With gevent's 100, one worker might take all connections that a proxy opens together.
MAX_ACCEPT = 8

STOPS = signal.SIGTERM, signal.SIGQUIT, signal.SIGINT

# Ends any request that hangs: a thread that gets no memory never starts, and its caller would wait forever.
LONGEST = 8  # seconds, for a request and its answer


class Worker(GeventWorker):
    _keeps_none = False  # with --keep-alive 0

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._repeats = Repeats(logging.getLogger("relay"))
        self._connections: dict[gevent.Greenlet, Connection] = {}
        self._expecting: set[Connection] = set()  # those whose next request isn't complete
        self._keeps_none = not self.cfg.keepalive

    def init_process(self) -> None:
        StreamServer.max_accept = MAX_ACCEPT
        self.cfg.set("workers", 1)  # in this process: for more, gunicorn replaces max_accept
        self.cfg.set("keepalive", self.cfg.keepalive or STRANGER)  # with 0, gunicorn waits for a request without end
        super().init_process()

    def init_signals(self) -> None:
        super().init_signals()
        for number in (signal.SIGHUP, signal.SIGUSR2):  # for the arbiter; `pkill -HUP gunicorn` would end the workers
            signal.signal(number, signal.SIG_IGN)

    def notify(self) -> None:
        """Tell the arbiter that this worker is alive; if the arbiter is gone, stop as on SIGTERM."""
        if self.ppid != (parent := os.getppid()):  # type: ignore[has-type]
            self.ppid = parent  # or gunicorn exits at once
            if self.alive:
                self.log.warning("The arbiter is gone, worker leaving (pid: %s)", self.pid)
                self.handle_exit(signal.SIGTERM, None)
        super().notify()
        stream().flush()
        if isinstance(sys.stdout, Output):
            sys.stdout.flush()
        if len(self._connections) > CROWDED * self.worker_connections:
            self._make_room()

    def _make_room(self) -> None:
        for connection in list(self._expecting):
            if not connection.worth_keeping and monotonic() - connection.opened > STRANGER_IN_A_CROWD:
                connection.stop_reading(0)

    def handle(self, listener: Any, client: Any, addr: Any) -> None:
        greenlet = gevent.getcurrent()
        self._connections[greenlet] = Connection(client)
        try:
            super().handle(listener, self._connections[greenlet], addr)
        finally:
            self._connections.pop(greenlet).forget_head()

    @contextmanager
    def timeout_ctx(self) -> Iterator[None]:
        """Wait for a connection's next request: until keepalive ends, unless it is a stranger's or we stop."""
        connection = self._connections[gevent.getcurrent()]
        kept = self.cfg.keepalive if connection.worth_keeping else min(STRANGER, self.cfg.keepalive)
        connection.expect_request(kept if self.alive else LINGER)
        self._expecting.add(connection)
        try:
            yield
        finally:
            self._expecting.discard(connection)
            connection.request_came()

    def handle_request(self, listener_name: Any, req: Any, sock: Connection, addr: Any) -> Any:
        sock.count_fields(len(req.headers))
        # If a body is not read to its end, the answer closes the connection. gunicorn would read the rest,
        # however long.
        must_close = self._keeps_none or bool(sock.ended) or req.should_close()
        body = req.body  # not req: it would keep itself alive
        # A stranger's occasional requests would otherwise keep the connection for good.
        req.should_close = lambda: (
            must_close or unread(body) or not (sock.worth_keeping or monotonic() - sock.opened < STRANGER)
        )
        if script_name := os.environ.get("SCRIPT_NAME", "").rstrip("/"):
            # For gunicorn: it has no answer to a path without it, and takes /web for the beginning of /webhook.
            below = req.path.startswith(f"{script_name}/")
            req.headers.append(("SCRIPT_NAME", script_name if below else ""))
        if isinstance(body.reader, ChunkedReader):
            body.reader.limit_trailer_section = body.reader.limit_chunk_size_line = FREE_HEAD
        sock.yield_if_pipelined()
        try:
            try:
                with gevent.Timeout(LONGEST, RuntimeError("it hangs")):
                    super().handle_request(listener_name, req, sock, addr)
            finally:
                sock.flush()
        except TimeoutError:  # the client doesn't read its answer
            raise StopIteration from None
        except StopIteration:
            if unread(body):
                sock.drain()
            raise

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        super().handle_exit(sig, frame)
        gevent.spawn_later(LINGER, self._end_idle)
        gevent.spawn_later(LINGER + LAST_CALL, self._end_all)

    def _end_idle(self) -> None:
        for connection in list(self._expecting):
            if connection.is_idle():
                connection.stop_reading(LAST_CALL)

    def _end_all(self) -> None:
        for connection in list(self._expecting):
            connection.stop_reading(0)

    def handle_error(self, req: Any, client: Connection, addr: Any, exc: BaseException) -> None:
        """Answer what gunicorn can't read, or fails on, in JSON, and without logging who sent what."""
        if not isinstance(exc, Exception):  # shutting down
            return
        name = type(exc).__name__
        if isinstance(exc, ParseException):
            # Neither 400, 431 nor 501: after 400 Customer.io waits an hour, and a proxy may have caused it.
            self._refuse(client, NotHttp("not_http"), logging.WARNING, f": {name}")
        elif isinstance(exc, RetryLater):
            self._refuse(client, exc, logging.WARNING)
        else:
            self._refuse(client, RetryLater("internal"), logging.ERROR, f": unexpected {name} in gunicorn")

    def _refuse(self, client: Connection, error: NotHttp | RetryLater, level: int, more: str = "") -> None:
        status, outcome = ENDS[type(error)]
        of_service().counts.row[WORKER_COLUMNS[outcome.label, error.label]] += 1
        body = json.dumps({"status": outcome.word, "reason": str(error)}, separators=(",", ":")) + "\n"
        head = f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\nContent-Type: application/json\r\n"
        retry = f"Retry-After: {error.retry_after}\r\n" if isinstance(error, RetryLater) else ""
        with suppress(OSError):  # the client has disconnected
            client.sendall(f"{head}Content-Length: {len(body)}\r\n{retry}Connection: close\r\n\r\n{body}".encode())
            client.drain()
        self._repeats.log(level, f"answered {status}: {error}{more}", outcome.label, error.label)


@cache
def keep_signals_of_forks() -> None:
    """Let a worker end that is told to stop as soon as it is forked.

    Until gunicorn installs a worker's own handlers it has the arbiter's, which only record a signal: it would stay.
    """

    def in_child() -> None:
        for number in STOPS:
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)

    os.register_at_fork(
        before=partial(signal.pthread_sigmask, signal.SIG_BLOCK, STOPS),
        after_in_parent=partial(signal.pthread_sigmask, signal.SIG_UNBLOCK, STOPS),
        after_in_child=in_child,
    )


def unread(body: Any) -> bool:
    """Return whether part of a request's body is unread, or unreadable."""
    return bool(body.failed or getattr(body.reader, "length", 0) or getattr(body.reader, "parser", None))
