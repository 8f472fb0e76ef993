"""Uploads messages to one Segment source, over connections that it keeps."""

import json
import socket
import ssl
import weakref
from base64 import b64encode
from collections import deque
from contextlib import suppress
from datetime import UTC, datetime
from http.client import HTTPException, HTTPResponse
from os import path
from time import monotonic
from urllib.parse import urlsplit

import certifi
import gevent
from segment.analytics.version import VERSION

from relay import proxies
from relay.answers import interpret
from relay.delivery import MAX_SPLITS, MAX_UPLOADS
from relay.exchange import Incoming, TooLarge, connect, exchange, is_quiet, remaining, send
from relay.message import Message
from relay.outcomes import Rejected, RetryLater, TransientError
from relay.tls import Tls

# "Re-resolve at least every 24 hours" (Segment, HTTP Tracking API): its addresses change.
RECONNECT_AFTER = 3_600  # seconds

# Load balancers and NATs forget a quiet connection without telling either side: Azure's load balancer after 4 minutes,
# AWS's NAT gateway and network load balancer after 350 s (their documentation). AWS's application load balancer
# closes it after 60 s.
IDLE_SECONDS = 60
MAX_IDLE = MAX_UPLOADS + MAX_SPLITS  # as many as may be in use


class Connection:
    """A connection that carries one upload at a time."""

    def __init__(self, sock: socket.socket | Tls):
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
        # For the look-up of the name, which nothing else ends; where nothing is patched it can't be ended.
        with gevent.Timeout(remaining(deadline), TimeoutError):
            sock = connect(*(self._proxy[:2] if self._proxy else (self._host, self._port)), deadline)
            try:
                if not self._tls:
                    return Connection(sock)
                if self._proxy:
                    self._ask_for_tunnel(sock, deadline)
                return Connection(Tls(sock, self._tls, self._host, deadline))
            except BaseException:
                sock.close()
                raise

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
