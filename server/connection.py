"""A client's connection, which can't hold up the others."""

import os
from contextlib import suppress
from socket import MSG_PEEK, SHUT_RD, SHUT_WR
from time import monotonic
from typing import Any

import gevent
from gevent.socket import socket
from gunicorn.http.errors import LimitRequestHeaders

from relay.outcomes import RetryLater

MAX_HEAD = 64 * 1024  # bytes, from a request's first line to its last field
FREE_HEAD = 8 * 1024  # bytes; what is above that counts towards MAX_HEADS, which is for a whole worker
MAX_HEADS = 16 * 1024 * 1024  # bytes; gunicorn keeps each of them twice
FIELD = 128  # bytes that each field counts for in addition; its Python objects take about twice as many
MAX_READ = 64 * 1024  # bytes; gunicorn would read a megabyte of a body ahead
HEAD_SECONDS = 5  # from its first byte to its last; Customer.io gives up after 4
SEND_SECONDS = 3  # for a client to make room for our answer
DISCARD_SECONDS = 1  # for the rest of a body that isn't read


class Connection(socket):
    """A client's connection, which takes over the descriptor of `client`."""

    _heads = 0  # bytes that all of them hold of heads above FREE_HEAD

    def __init__(self, client: socket):
        super().__init__(client.family, client.type, client.proto, fileno=client.detach())
        self._head = b""  # of an answer
        self._recvs = 0  # of the next request
        self._head_size = 0
        self._deadline: float | None = None  # for more of its head, on the monotonic clock
        self.ended = 0.0  # until when its rest is still read, once its end was decided
        self.opened = monotonic()
        self.worth_keeping = False  # it has carried a webhook that is Customer.io's

    def expect_request(self, seconds: float) -> None:
        """Expect a request within `seconds`. Once some of it has come, HEAD_SECONDS count for the rest of its head."""
        self.forget_head()
        self._recvs = 0
        self._deadline = monotonic() + seconds

    def forget_head(self) -> None:
        """Make room for another head: this one is answered."""
        Connection._heads -= max(self._head_size - FREE_HEAD, 0)
        self._head_size = 0

    def request_came(self) -> None:
        """Stop the clock for the head. The application bounds the body."""
        self._deadline = None

    def recv(self, size: int, *args: Any) -> bytes:
        # recv doesn't wait while there is data: a client that sends without a pause would keep all
        # others, and every deadline, waiting. Two reads are enough for a usual webhook.
        if self._recvs > 1:
            gevent.sleep(0)
        size = min(size, MAX_READ)
        data = self._read(size, *args) if self._deadline is None else self._recv_head(self._deadline, size, *args)
        self._recvs += 1
        return data

    def _read(self, *args: Any) -> bytes:
        data: bytes = super().recv(*args)
        # Some of a request came just when the connection was ended. From then on recv doesn't wait any more.
        while not data and self._recvs and monotonic() < self.ended:
            gevent.sleep(0.01)
            data = super().recv(*args)
        return data

    def _recv_head(self, deadline: float, *args: Any) -> bytes:
        # gunicorn keeps all that has come, and looks through it again with each packet.
        if self._head_size > MAX_HEAD:
            raise LimitRequestHeaders("the head is too large")
        self.settimeout(max(deadline - monotonic(), 0.001))
        try:
            data = self._read(*args)
        except TimeoutError:
            return b""  # gunicorn takes it for the client's end, and closes the connection
        finally:
            self.settimeout(None)
        if not data and self._recvs and self.ended:  # by us, and without an answer it would cost an hour
            raise RetryLater("body")
        if not self._recvs:
            self._deadline = monotonic() + HEAD_SECONDS
        self._hold_head(len(data))
        return data

    def count_fields(self, number: int) -> None:
        """Count what the fields of a head that has come take beside their bytes."""
        self._hold_head(number * FIELD)

    def _hold_head(self, size: int) -> None:
        before = max(self._head_size - FREE_HEAD, 0)
        self._head_size += size
        Connection._heads += max(self._head_size - FREE_HEAD, 0) - before
        if Connection._heads > MAX_HEADS and self._head_size > FREE_HEAD:
            raise RetryLater("busy")

    def yield_if_pipelined(self) -> None:
        """Let the others go first if this request was pipelined behind the previous one."""
        if not self._recvs:
            gevent.sleep(0)

    def sendall(self, data: bytes, flags: int = 0) -> None:
        """Send all of `data`, the head of an answer with what follows; raise TimeoutError if the client doesn't read.

        gunicorn sends head and body one after the other. A worker killed in between leaves half an
        answer, and a proxy that has passed the head on can only break the connection: an hour.
        """
        if not self._head and data.startswith(b"HTTP/1.") and data.endswith(b"\r\n\r\n"):
            self._head = data
            return
        data, self._head = self._head + data, b""
        self.settimeout(SEND_SECONDS)
        try:
            super().sendall(data, flags)
        finally:
            self.settimeout(None)

    def flush(self) -> None:
        """Send the head of an answer that has no body."""
        if self._head:
            self.sendall(b"")

    def is_idle(self) -> bool:
        """Return whether nothing of the next request has arrived."""
        if self._recvs:
            return False
        before = self.gettimeout()  # that of the waiting reader
        self.settimeout(0)
        try:
            return not super().recv(1, MSG_PEEK)
        except OSError:  # nothing there
            return True
        finally:
            self.settimeout(before)

    def stop_reading(self, seconds: float) -> None:
        """End the wait for a request: at once if nothing of it has come, otherwise after `seconds`."""
        self.ended = monotonic() + seconds
        # Shut down a duplicate: doing it to the socket itself makes gevent raise in the waiting reader.
        with suppress(OSError), socket(self.family, self.type, self.proto, os.dup(self.fileno())) as twin:
            twin.shutdown(SHUT_RD)

    def drain(self) -> None:
        """Read what is left of a body for a while: closed at once, the connection might take our answer with it."""
        with suppress(OSError), gevent.Timeout(DISCARD_SECONDS, False):
            self.shutdown(SHUT_WR)
            while super().recv(65536):
                gevent.sleep(0)
