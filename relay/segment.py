"""The upload to Segment: one connection, one request, and what the answer means.

It uses the standard library alone, which gevent makes wait for others under gunicorn. Whatever comes from the
other side is read within one deadline and one number of bytes, wherever this runs.
"""

import fcntl
import json
import socket
import ssl
import termios
import time
import weakref
from base64 import b64encode
from collections import deque
from contextlib import suppress
from datetime import UTC, datetime
from http.client import HTTPException, HTTPResponse, IncompleteRead
from os import path
from time import monotonic
from types import SimpleNamespace
from typing import Any, NamedTuple, Protocol
from urllib.parse import urlsplit

import certifi
import gevent
from segment.analytics.request import parse_retry_after
from segment.analytics.version import VERSION

from relay import proxies
from relay.delivery import MAX_SPLITS, MAX_UPLOADS, Message
from relay.outcomes import RateLimited, Rejected, RetryLater, TransientError

CONNECT_SECONDS = 1.0  # for each of Segment's addresses, so that the next one is tried within the deadline

# "Re-resolve at least every 24 hours" (Segment, HTTP Tracking API): its addresses change.
RECONNECT_AFTER = 3_600  # seconds

# Load balancers and NATs forget a quiet connection without telling either side: Azure's load balancer after 4 minutes,
# AWS's NAT gateway and network load balancer after 350 s (their documentation). AWS's application load balancer
# closes it after 60 s.
IDLE_SECONDS = 60
MAX_IDLE = MAX_UPLOADS + MAX_SPLITS  # as many as may be in use

# Segment's answers have a few hundred bytes. http.client alone would take a line and a hundred headers of 64 KiB each.
MAX_ANSWER = 65_536  # bytes, from the first status line to the last trailer
READ = 16_384  # bytes at a time

REDIRECTS = (301, 302, 303, 307, 308)


class Headers(Protocol):
    def get(self, name: str, /) -> str | None: ...


class Answer(NamedTuple):
    status: int
    headers: Headers
    body: bytes | None  # None if it is larger than any of Segment's
    reusable: bool  # the connection, as far as HTTP goes


class Connection:
    """A connection that carries one upload at a time."""

    def __init__(self, sock: socket.socket):
        self.sock = sock
        self.opened = self.idle_since = monotonic()

    def is_good(self) -> bool:
        """Return whether it can carry another upload: it is young, not long idle, and has nothing left on it."""
        now = monotonic()
        young = now - self.opened < RECONNECT_AFTER and now - self.idle_since < IDLE_SECONDS
        return young and is_quiet(self.sock)


class SegmentClient:
    """One Segment source, to which messages are uploaded."""

    def __init__(self, write_key: str, host: str, proxy: str | None = None, ca_bundle: str | None = None):
        """`proxy` is the address of one; `ca_bundle` is a file or a folder, by default certifi's file."""
        url = urlsplit(host)
        self._host = (url.hostname or "").rstrip(".")  # as certificates spell it
        self._port = url.port or (443 if url.scheme == "https" else 80)
        self._tls = tls_context(ca_bundle) if url.scheme == "https" else None
        self._proxy = proxies.parse(proxy) if proxy else None
        self._write_key = json.dumps(write_key)
        self._head = "\r\n".join(
            [
                f"POST {host if self._proxy and not self._tls else ''}/v1/batch HTTP/1.1",
                f"Host: {url.netloc}",
                f"User-Agent: analytics-python/{VERSION}",
                "Accept-Encoding: identity",  # a small answer may be a large one, compressed
                "Accept: */*",
                "Connection: keep-alive",
                "Content-Type: application/json",
                f"Authorization: Basic {b64encode(f'{write_key}:'.encode()).decode()}",
                *([] if self._tls else self._proxy_headers()),
                "Content-Length: ",
            ]
        )
        self._idle: deque[Connection] = deque()  # the one that has been idle longest comes first
        weakref.finalize(self, close_all, self._idle)

    def _proxy_headers(self) -> list[str]:
        return (
            [f"Proxy-Authorization: {self._proxy.authorization}"] if self._proxy and self._proxy.authorization else []
        )

    def upload(self, messages: list[Message], seconds: float) -> None:
        """Return if Segment answers within `seconds` that it has all `messages`.

        Raise Rejected if it never takes them as they are, RateLimited if it wants no calls for
        a while, TransientError if another attempt may help, and RetryLater for everything else.
        """
        request = self._request(messages)
        deadline = monotonic() + seconds
        used = self._take_idle()
        connection = used
        keep = False
        try:
            connection = connection or self._open(deadline)
            answer = exchange(connection.sock, request, deadline)
            try:
                interpret(answer.status, answer.headers, answer.body)
                keep = answer.reusable
            except Rejected as refusal:
                keep = answer.reusable and refusal.by_segment
                raise
        except TimeoutError:
            if used:  # a NAT or a firewall may have forgotten it, and the idle ones with it
                close_all(self._idle)
            raise RetryLater("timeout") from None
        except TooLarge:
            raise RetryLater("not_segment") from None
        except (OSError, HTTPException, ValueError):  # a name that is too long is a ValueError
            close_all(self._idle)  # they may be as dead as this one
            raise TransientError("connection") from None
        finally:
            if connection and keep:
                self._keep(connection)
            elif connection:  # another answer might still arrive on it
                connection.sock.close()

    def _request(self, messages: list[Message]) -> bytes:
        sent_at = json.dumps(datetime.now(UTC).isoformat())
        batch = ", ".join(message.json for message in messages)
        body = f'{{"batch": [{batch}], "sentAt": {sent_at}, "writeKey": {self._write_key}}}'.encode()
        return f"{self._head}{len(body)}\r\n\r\n".encode() + body

    def _take_idle(self) -> Connection | None:
        """Return a connection that nobody else uses, so that no two uploads share one."""
        with suppress(IndexError):
            while True:
                connection = self._idle.pop()
                if connection.is_good():
                    return connection
                connection.sock.close()
        return None

    def _keep(self, connection: Connection) -> None:
        connection.idle_since = monotonic()
        self._idle.append(connection)
        with suppress(IndexError):  # another thread was faster
            while len(self._idle) > MAX_IDLE or connection.idle_since - self._idle[0].idle_since >= IDLE_SECONDS:
                self._idle.popleft().sock.close()

    def _open(self, deadline: float) -> Connection:
        # gevent's sockets restart the timeout at each step of a TLS handshake, and nothing else ends a look-up. Where
        # nothing is patched the handshake has one timeout, and the look-up can't be ended.
        with gevent.Timeout(remaining(deadline), TimeoutError):
            sock = connect(*(self._proxy[:2] if self._proxy else (self._host, self._port)), deadline)
            try:
                if self._tls:
                    if self._proxy:
                        self._ask_for_tunnel(sock, deadline)
                    sock.settimeout(remaining(deadline))
                    sock = self._tls.wrap_socket(sock, server_hostname=self._host)
            except BaseException:
                sock.close()
                raise
        return Connection(sock)

    def _ask_for_tunnel(self, sock: socket.socket, deadline: float) -> None:
        end = f"{f'[{self._host}]' if ':' in self._host else self._host}:{self._port}"
        head = [f"CONNECT {end} HTTP/1.1", f"Host: {end}", *self._proxy_headers()]
        send(sock, "".join(f"{line}\r\n" for line in [*head, ""]).encode(), deadline)
        incoming = Incoming(sock, deadline)
        response = HTTPResponse(incoming, method="CONNECT")  # type: ignore[arg-type]
        response.begin()
        if 400 <= response.status < 500:  # a login that is missing or wrong, or a rule; a 5xx may pass
            raise RetryLater("not_segment")
        if not 200 <= response.status < 300 or incoming.buffer:
            raise ConnectionError("the proxy refuses")


def close_all(connections: deque[Connection]) -> None:
    with suppress(IndexError):
        while True:
            connections.pop().sock.close()


def tls_context(ca_bundle: str | None) -> ssl.SSLContext:
    """Return what all connections share: loading certificates takes milliseconds."""
    bundle = ca_bundle or certifi.where()
    is_folder = path.isdir(bundle)
    context = ssl.create_default_context(cafile=None if is_folder else bundle, capath=bundle if is_folder else None)
    context.set_alpn_protocols(["http/1.1"])
    return context


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


def is_quiet(sock: socket.socket) -> bool:
    """Return whether nothing is left to read on the connection, not even its end."""
    sock.settimeout(0)
    try:
        sock.recv(1)  # what TLS has already read counts, too
    except (BlockingIOError, ssl.SSLWantReadError):
        return True
    except OSError:
        pass
    return False


def send(sock: socket.socket, data: bytes, deadline: float) -> None:
    """Send all of it; raise TimeoutError after the deadline. (TLS's own sendall restarts its timeout for each part.)"""
    rest = memoryview(data)
    while rest:
        sock.settimeout(remaining(deadline))
        rest = rest[sock.send(rest) :]


class TooLarge(Exception):
    """An answer has more than MAX_ANSWER bytes."""


class Incoming:
    """What arrives on a connection, of which HTTPResponse reads: so many bytes, and for so long.

    `buffer` has what was not asked for yet.
    """

    def __init__(self, sock: socket.socket, deadline: float):
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


def exchange(sock: socket.socket, request: bytes, deadline: float) -> Answer:
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
    if len(lengths) > 1 or not all(map(str.isdigit, lengths)):  # http.client takes the first, or none
        raise ConnectionError("the answer's length contradicts itself")
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
    reusable = reusable and not (response.chunked and lengths)  # RFC 9112, 6.1: others may see another end
    return Answer(response.status, response.headers, body, reusable)


def not_received(sock: socket.socket) -> bool:
    """Return whether the other side answered before all of the upload had arrived there."""
    with suppress(OSError):  # not a system that tells
        return any(fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, bytes(4)))
    return False


def interpret(status: int, headers: Headers, body: bytes | None) -> None:
    """Return if this answer says that Segment has the upload; otherwise raise what it means.

    `body` is None if it is larger than any of Segment's. Segment's own answers are JSON objects, those of a proxy
    or a captive portal in its place are not.
    """
    answer = json_object(body or b"")
    if status >= 600:
        raise RetryLater("not_segment")
    if status == 429:
        raise RateLimited(parse_retry_after(SimpleNamespace(headers=headers)) or 1)
    if status >= 500 or status == 408 or status < 200:  # after a 1xx the answer is still to come
        raise TransientError(f"segment_{status}")
    if status in (400, 413):
        if answer is None:
            raise Rejected(status, by_segment=False)
        raise Rejected(status)
    if status in REDIRECTS and headers.get("Location") is not None:
        raise RetryLater("redirect")
    if status >= 400 and answer is None:
        raise RetryLater("not_segment")
    if status in (401, 403):
        raise RetryLater("write_key", f" ({status})")
    if status >= 300:
        raise RetryLater(f"segment_{status}")
    if body == b"":  # http.client accepts a truncated head
        raise TransientError("connection")
    if answer is None:
        raise RetryLater("not_segment")
    if answer.get("success") is not True:
        raise TransientError("not_success")


def json_object(body: bytes) -> dict[str, Any] | None:
    """Return the JSON object that `body` is, or None if it isn't one."""
    try:
        answer = json.loads(body)
    except (ValueError, RecursionError):
        return None
    return answer if isinstance(answer, dict) else None
