"""gunicorn's gevent worker: it ends idle connections gracefully, and logs malformed requests without quoting them."""

import logging
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

import gevent
from gunicorn.util import write_nonblock
from gunicorn.workers.ggevent import GeventWorker

from connection import Connection
from logs import Repeats, stream

# How long a stopping worker keeps idle connections. A webhook may be on its way on one of them,
# and a reset would cost an hour; it is answered, with "Connection: close".
LINGER = 2  # seconds
# A request takes 3.5 s at most. After that, what is still only half a request is cut.
LAST_CALL = 4  # seconds

NOT_HTTP = b'{"status":"rejected","reason":"not an HTTP request"}\n'


class Worker(GeventWorker):
    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._log_sparingly = Repeats(logging.getLogger("relay"))
        self._connections: dict[gevent.Greenlet, Connection] = {}
        self._expecting: set[Connection] = set()  # those whose next request isn't complete

    def init_process(self) -> None:
        # Until gunicorn installs a worker's own handlers it has the arbiter's, which only record the
        # signal: a worker told to stop at that moment would stay.
        for number in (signal.SIGTERM, signal.SIGQUIT, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
        super().init_process()

    def notify(self) -> None:
        super().notify()
        stream().flush()

    def handle(self, listener: Any, client: Any, addr: Any) -> None:
        greenlet = gevent.getcurrent()
        self._connections[greenlet] = Connection(client)
        try:
            super().handle(listener, self._connections[greenlet], addr)
        finally:
            del self._connections[greenlet]

    @contextmanager
    def timeout_ctx(self) -> Iterator[None]:
        """Wait for a connection's next request until keepalive ends, or LINGER does."""
        connection = self._connections[gevent.getcurrent()]
        connection.expect_request()
        self._expecting.add(connection)
        try:
            with gevent.Timeout(self.cfg.keepalive if self.alive else LINGER, False):
                yield
        finally:
            self._expecting.discard(connection)

    def handle_request(self, listener_name: Any, req: Any, sock: Connection, addr: Any) -> Any:
        # Where a body is not read to its end, the connection ends after the answer, and the answer
        # says so. gunicorn would read the rest, however much that is.
        must_close, body = req.should_close(), req.body  # not req: it would keep itself alive
        req.should_close = lambda: must_close or unread(body)
        sock.give_turn()
        try:
            try:
                super().handle_request(listener_name, req, sock, addr)
            finally:
                sock.flush()
        except TimeoutError:  # the client doesn't read its answer
            raise StopIteration from None
        finally:
            if unread(req.body):
                sock.discard()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        super().handle_exit(sig, frame)
        gevent.spawn_later(LINGER, self._close, idle_only=True)
        gevent.spawn_later(LINGER + LAST_CALL, self._close, idle_only=False)

    def _close(self, idle_only: bool) -> None:
        for connection in list(self._expecting):
            if not idle_only or connection.is_idle():
                connection.end()

    def handle_error(self, req: Any, client: Any, addr: Any, exc: BaseException) -> None:
        """Answer malformed requests with 422, in JSON, and without logging who sent what."""
        if not isinstance(exc, Exception):  # shutting down
            return
        self._log_sparingly(logging.WARNING, f"not an HTTP request: {type(exc).__name__}", "rejected", "not_http")
        head = "HTTP/1.1 422 Unprocessable Content\r\nContent-Type: application/json\r\n"
        head += f"Content-Length: {len(NOT_HTTP)}\r\nConnection: close\r\n\r\n"
        with suppress(OSError):  # the client has disconnected
            write_nonblock(client, head.encode() + NOT_HTTP)


def unread(body: Any) -> bool:
    """Say whether some of a request's body is still to be read, or can't be."""
    return bool(body.failed or getattr(body.reader, "length", 0) or getattr(body.reader, "parser", None))
