"""TLS over a connection, which holds up nobody, even if the other side never pauses."""

import socket
import ssl
import time
from collections.abc import Callable
from contextlib import suppress
from time import monotonic
from typing import TypeVar

from relay.exchange import MAX_ANSWER, READ, TooLarge, remaining

T = TypeVar("T")


class Tls:
    """A connection under TLS, with the methods of a socket that the relay uses.

    One call of an SSLSocket takes handshake messages for as long as they arrive: no timeout ends it, and no other
    greenlet runs meanwhile. So OpenSSL reads from memory here, and each call receives MAX_ANSWER bytes at most.
    """

    def __init__(self, sock: socket.socket, context: ssl.SSLContext, host: str, deadline: float):
        """Take over `sock`. Raise OSError or TooLarge unless it is `host` that answers there by `deadline`."""
        self._sock = sock
        self._deadline: float | None = deadline
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_hostname=host)
        self.fileno, self.close = sock.fileno, sock.close
        self._call(self._tls.do_handshake)

    def settimeout(self, seconds: float) -> None:
        """Bound each of the next calls; with 0 none waits."""
        self._deadline = monotonic() + seconds if seconds else None

    def send(self, data: memoryview) -> int:
        """Send all of it."""
        return self._call(lambda: self._tls.write(data))

    def recv(self, size: int) -> bytes:
        with suppress(ssl.SSLEOFError):  # closed without TLS's own end: the answer says whether it is complete
            return self._call(lambda: self._tls.read(size))
        return b""

    def _call(self, step: Callable[[], T]) -> T:
        room = MAX_ANSWER
        while True:
            try:
                return step()
            except ssl.SSLWantReadError:
                pass
            finally:  # after an error, too: an alert
                if data := self._outgoing.read():
                    self._bound()
                    self._sock.sendall(data)
            if not room:
                raise TooLarge
            if room < MAX_ANSWER:
                time.sleep(0)  # recv doesn't wait while there is data
            self._bound()
            data = self._sock.recv(min(READ, room))
            room -= len(data)
            if data:
                self._incoming.write(data)
            else:
                self._incoming.write_eof()

    def _bound(self) -> None:
        self._sock.settimeout(remaining(self._deadline) if self._deadline else 0)
