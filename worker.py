"""gunicorn's gevent worker: webhooks on a short way, answers in JSON, and nobody hung up on when it leaves."""

import select
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from http import HTTPStatus
from time import time
from types import FrameType
from typing import Any

import gevent
from gevent import monkey
from gunicorn.util import http_date, write_nonblock
from gunicorn.workers.ggevent import GeventWorker

# A worker that was told to leave keeps idle connections for so long: a webhook may be on
# its way on one of them, and a reset would cost an hour. It is answered, with
# "Connection: close".
LINGER = 2  # seconds


class Worker(GeventWorker):
    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._idle: dict[gevent.Greenlet, gevent.Timeout] = {}

    def init_process(self) -> None:
        # Until gunicorn installs a worker's own handlers it has the arbiter's, which only take note.
        # Told to leave in that moment it would stay, serve, and be killed in the midst of it.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        super().init_process()

    def patch(self) -> None:
        super().patch()
        # urllib3 asks poll() whether an idle connection is still open. gevent's poll goes once
        # around the event loop to say so, which under load takes longer than the upload.
        select.poll = monkey.get_original("select", "poll")  # type: ignore[misc]

    @contextmanager
    def timeout_ctx(self) -> Iterator[None]:
        """Wait for the next request on a connection until keepalive ends, or our lingering does."""
        with gevent.Timeout(self.cfg.keepalive if self.alive else LINGER, False) as timeout:
            self._idle[gevent.getcurrent()] = timeout
            try:
                yield
            finally:
                del self._idle[gevent.getcurrent()]

    def handle_request(self, listener_name: Any, req: Any, sock: Any, addr: Any) -> Any:
        """Answer a webhook straight from gunicorn's parser; leave everything else to WSGI.

        For what it makes of a request (an environment, a response object, contexts, a route, two
        writes) a webhook has no use, and it takes longer than all that the relay does.
        """
        webhook = getattr(self.wsgi, "webhook", None)  # app.py's
        headers = dict(req.headers)
        if not webhook or (req.method, req.path) != ("POST", "/webhook") or "EXPECT" in headers:
            return super().handle_request(listener_name, req, sock, addr)
        answer = webhook(req.body, headers)
        close = not self.alive or req.should_close()
        content = answer.content()
        more = {
            "Date": _date(int(time())),
            "Content-Length": len(content),
            "Connection": "close" if close else "keep-alive",
        }
        lines = [f"{name}: {value}\r\n" for name, value in (answer.headers() | more).items()]
        head = f"HTTP/1.1 {answer.code} {HTTPStatus(answer.code).phrase}\r\n{''.join(lines)}\r\n"
        sock.sendall(head.encode() + content)
        if close:
            raise StopIteration  # to gunicorn's loop: no more requests on this connection
        return True

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        super().handle_exit(sig, frame)
        gevent.spawn_later(LINGER, self._close_idle)

    def _close_idle(self) -> None:
        for connection, timeout in list(self._idle.items()):
            connection.kill(timeout, block=False)

    def handle_error(self, req: Any, client: Any, addr: Any, exc: BaseException) -> None:
        """Answer what is not HTTP with 400, as gunicorn does, without logging who sent what."""
        if not isinstance(exc, Exception):  # it is told to leave
            return
        self.log.warning("not an HTTP request: %s", type(exc).__name__)
        body = b'{"status": "rejected", "reason": "not an HTTP request"}'
        head = f"HTTP/1.1 400 Bad Request\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
        with suppress(OSError):  # gone already
            write_nonblock(client, head.encode() + b"\r\nConnection: close\r\n\r\n" + body)


@lru_cache(maxsize=1)
def _date(now: int) -> str:
    return str(http_date(now))
