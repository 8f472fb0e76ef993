"""gunicorn's gevent worker, leaving without hanging up on anybody, and not logging what isn't HTTP."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

import gevent
from gunicorn.util import write_nonblock
from gunicorn.workers.ggevent import GeventWorker

# How long a worker that was told to leave keeps idle connections. A webhook may be on its way
# on one of them, and a reset would cost an hour; it is answered, with "Connection: close".
LINGER = 2  # seconds

NOT_HTTP = b'{"status": "rejected", "reason": "not an HTTP request"}'


class Worker(GeventWorker):
    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._idle: dict[gevent.Greenlet, gevent.Timeout] = {}

    def init_process(self) -> None:
        # Until gunicorn installs a worker's own handlers it has the arbiter's, which only take note:
        # told to leave in that moment, the worker would stay.
        for number in (signal.SIGTERM, signal.SIGQUIT, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
        super().init_process()

    @contextmanager
    def timeout_ctx(self) -> Iterator[None]:
        """Wait for the next request on a connection until keepalive ends, or LINGER does."""
        with gevent.Timeout(self.cfg.keepalive if self.alive else LINGER, False) as timeout:
            self._idle[gevent.getcurrent()] = timeout
            try:
                yield
            finally:
                del self._idle[gevent.getcurrent()]

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        super().handle_exit(sig, frame)
        gevent.spawn_later(LINGER, self._close_idle)

    def _close_idle(self) -> None:
        for connection, timeout in list(self._idle.items()):
            connection.kill(timeout, block=False)

    def handle_error(self, req: Any, client: Any, addr: Any, exc: BaseException) -> None:
        """Answer what isn't HTTP with 400, as gunicorn does, but in JSON, and without logging who sent what."""
        if not isinstance(exc, Exception):  # the worker leaves
            return
        self.log.warning("not an HTTP request: %s", type(exc).__name__)
        head = f"HTTP/1.1 400 Bad Request\r\nContent-Type: application/json\r\nContent-Length: {len(NOT_HTTP)}\r\n"
        with suppress(OSError):  # gone already
            write_nonblock(client, head.encode() + b"Connection: close\r\n\r\n" + NOT_HTTP)
