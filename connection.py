"""A client's connection, which can't hold up the others."""

import os
from contextlib import suppress
from socket import MSG_PEEK, SHUT_RD, SHUT_WR
from typing import Any

import gevent
from gevent.socket import socket

SEND_SECONDS = 3  # for a client to make room for our answer
DISCARD_SECONDS = 1  # for what is left of a body that nobody wants


class Connection(socket):
    """A client's connection, in the place of the one that it is made from."""

    def __init__(self, client: socket):
        super().__init__(client.family, client.type, client.proto, fileno=client.detach())
        self._head = b""  # of an answer
        self.expect_request()

    def expect_request(self) -> None:
        self._reads = 0  # of the next request

    def recv(self, *args: Any) -> bytes:
        # recv doesn't wait while there is data: a client that sends without a pause would keep all
        # others, and every deadline, waiting. Two reads are enough for a usual webhook.
        if self._reads > 1:
            gevent.sleep(0)
        data: bytes = super().recv(*args)
        self._reads += 1
        return data

    def give_turn(self) -> None:
        """Let the others go first if this request came along with the one before, unasked."""
        if not self._reads:
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
        """Say whether nothing of a next request has arrived."""
        if self._reads:
            return False
        self.settimeout(0)
        try:
            return not super().recv(1, MSG_PEEK)
        except OSError:  # nothing there
            return True
        finally:
            self.settimeout(None)

    def end(self) -> None:
        """Have whoever waits for a request see the end of the connection."""
        # Through a twin: gevent ends the wait for a socket that is shut down itself with an error.
        with suppress(OSError), socket(self.family, self.type, self.proto, os.dup(self.fileno())) as twin:
            twin.shutdown(SHUT_RD)

    def discard(self) -> None:
        """Read what is left of a body for a while: closed at once, the connection might take our answer with it."""
        with suppress(OSError), gevent.Timeout(DISCARD_SECONDS, False):
            self.shutdown(SHUT_WR)
            while super().recv(65536):
                gevent.sleep(0)
