"""Gets the answer to one request over one connection, within one deadline and 64 KiB.

It uses the standard library alone, which gevent makes wait for others under gunicorn.
"""

import fcntl
import re
import socket
import termios
import time
from contextlib import suppress
from http.client import HTTPMessage, HTTPResponse, IncompleteRead
from time import monotonic
from typing import NamedTuple, Protocol

CONNECT_SECONDS = 1.0  # for each of Segment's addresses, so that the next one is tried within the deadline

# Segment's answers have a few hundred bytes. http.client alone would take a line and a hundred headers of 64 KiB each.
MAX_ANSWER = 65_536  # bytes, from the first status line to the last trailer
READ = 16_384  # bytes at a time
LENGTH = re.compile("[0-9]{1,18}")  # str.isdigit would take superscripts, too; http.client ignores too many digits


class Socket(Protocol):
    """The methods of a socket that are used here; Tls has them, too."""

    def fileno(self) -> int: ...
    def settimeout(self, seconds: float, /) -> None: ...
    def send(self, data: memoryview, /) -> int: ...
    def recv(self, size: int, /) -> bytes: ...


class Answer(NamedTuple):
    status: int
    headers: HTTPMessage
    body: bytes | None  # None if it is larger than any of Segment's
    reusable: bool  # the connection, as far as HTTP goes


class TooLarge(Exception):
    """An answer has more than MAX_ANSWER bytes."""


def remaining(deadline: float) -> float:
    """Return the seconds left; raise TimeoutError if there are none."""
    if (seconds := deadline - monotonic()) <= 0:
        raise TimeoutError
    return seconds


def connect(host: str, port: int, deadline: float) -> socket.socket:
    """Return a connection to the first address that takes one."""
    for family, kind, protocol, _, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
        sock = socket.socket(family, kind, protocol)
        try:
            sock.settimeout(min(CONNECT_SECONDS, remaining(deadline)))
            sock.connect(address)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        except OSError:
            sock.close()
            remaining(deadline)
        except BaseException:
            sock.close()
            raise
        else:
            return sock
    raise ConnectionError("no address takes a connection")


def send(sock: Socket, data: bytes, deadline: float) -> None:
    """Send all of it; raise TimeoutError after the deadline."""
    rest = memoryview(data)
    while rest:
        sock.settimeout(remaining(deadline))
        rest = rest[sock.send(rest) :]


class Incoming:
    """The incoming side of a connection, for HTTPResponse to read: at most MAX_ANSWER bytes, until the deadline.

    `buffer` has what arrived and was not read yet.
    """

    def __init__(self, sock: Socket, deadline: float):
        self._sock = sock
        self._deadline = deadline
        self._room = MAX_ANSWER
        self.buffer = bytearray()

    def makefile(self, mode: str) -> "Incoming":
        return self

    def readline(self, limit: int) -> bytes:
        while not (end := self.buffer.find(b"\n", 0, limit) + 1) and len(self.buffer) < limit and self._receive():
            pass
        return self._take(end or limit)

    def read(self, size: int) -> bytes:
        if size < 0:
            raise ValueError("a chunk has a negative size")
        while len(self.buffer) < size and self._receive():
            pass
        return self._take(size)

    def _take(self, size: int) -> bytes:
        taken = bytes(self.buffer[:size])
        del self.buffer[:size]
        return taken

    def _receive(self) -> bool:
        """Wait for more; return False at the end."""
        if not self._room:
            raise TooLarge
        if self._room < MAX_ANSWER:
            # recv doesn't wait while there is data: an answer without a pause would keep all others waiting.
            time.sleep(0)
        self._sock.settimeout(remaining(self._deadline))
        data = self._sock.recv(min(READ, self._room))
        self._room -= len(data)
        self.buffer += data
        return bool(data)

    def flush(self) -> None:
        pass

    def close(self) -> None:
        pass


def exchange(sock: Socket, request: bytes, deadline: float) -> Answer:
    """Send a request and return its answer.

    Raise TimeoutError if it isn't complete by the deadline, TooLarge if its head is, and OSError, HTTPException or
    ValueError if there is none.
    """
    send(sock, request, deadline)
    incoming = Incoming(sock, deadline)
    response = HTTPResponse(incoming, method="POST")  # type: ignore[arg-type]
    response.begin()
    if not_received(sock):  # an answer, but not to all of the upload
        raise ConnectionError("answered early")
    lengths = set(response.headers.get_all("Content-Length", ()))
    if len(lengths) > 1 or not all(map(LENGTH.fullmatch, lengths)):  # http.client takes the first, or none
        raise ConnectionError("the answer's length contradicts itself")
    if response.headers.defects:  # http.client ignores what follows a line that isn't a header
        raise ConnectionError("the answer's head is broken")
    body: bytes | None = b""
    try:
        while part := response.read(MAX_ANSWER):
            body += part  # type: ignore[operator]
    except TooLarge:
        body = None
    else:
        if response.length:
            raise IncompleteRead(b"")
    # A second answer may have arrived with the first.
    reusable = response.version == 11 and not response.will_close and not incoming.buffer
    # RFC 9112, 6.1: others may see another end.
    reusable = reusable and not (lengths and "Transfer-Encoding" in response.headers)
    return Answer(response.status, response.headers, body, reusable)


def not_received(sock: Socket) -> bool:
    """Return whether the other side answered before all of the upload had arrived there."""
    with suppress(OSError):  # not a system that tells
        return any(fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, bytes(4)))
    return False


def is_quiet(sock: Socket) -> bool:
    """Return whether nothing is left to read on the connection, not even its end."""
    sock.settimeout(0)
    try:
        sock.recv(1)  # what TLS has already read counts, too
    except BlockingIOError:
        return True
    except (OSError, TooLarge):
        pass
    return False
