"""A fake Segment on loopback that follows the documented rules, and fails on demand in every way the real one can.

Rules (segment.com/docs, HTTP Tracking API): it answers 400 to more than 32 KB an event or 500 KB a
request, to anything but strict JSON, and to an empty or very short write key. After a 200 it silently
drops events without a name or a person, and those after the first 2,500 of a batch; here they are in
`lost`. It keeps one event per messageId, whichever source it came from.

A fault is a word that says what happens to a request instead of a proper answer:

    500, 429, ...   that status, any number ("429:2": with Retry-After: 2)
    hang            never an answer               hang-after      the same, but the events are kept
    reset           the connection is reset       reset-after     the same, but the events are kept
    close           closed without an answer      drip            a 200 that never ends, byte by byte
    garbage         bytes that are not HTTP       html            200 and a web page
    redirect        302 to a page that says 200   redirect-307    307 to a page that would take the POST
    false           200 {"success": false}        refuse          not listening, connections aborted
    cut             closed within the head of a 200
    silent          not even connections are answered
    early-hints     103, and half a second later a 200: the events are not kept
    late            503, and half a second later a 200: the events are not kept
    twice           the events are kept, and the 200 comes twice
    early           a 200 before a large upload has arrived, and then the end: the events are not kept
    html:404, ...   that status, and a web page
    bomb            a 200 of 2 MB, which are 2 GB once they are decompressed
    endless         a 200 whose body neither ends nor pauses; endless-head, endless-chunks and endless-100s the same
                    of others
    forget          connections that are open when it begins get no more answers, as behind a NAT that forgot them

`python proof/fake_segment.py PORT MILLISECONDS` runs one with that latency.
"""

import asyncio
import contextlib
import gc
import gzip
import json
import socket
import ssl
import struct
import sys
import threading
import warnings
from base64 import b64encode
from collections import deque
from functools import cache
from typing import Any, Self

NOT_SEGMENT = "what answered is not Segment"
BROKEN = "the connection to Segment failed"
LATE = "Segment did not answer in time"
FAULTS = {  # each with the beginning of the reason that a relay should give for its 503; "" if it should deliver
    "500": "Segment answered 500",
    "502": "Segment answered 502",
    "503": "Segment answered 503",
    "408": "Segment answered 408",
    "429:1": "Segment is limiting the rate",
    "401": "Segment refuses the write key (401)",
    "403": "Segment refuses the write key (403)",
    "404": "Segment answered 404",
    "304": "Segment answered 304",
    "hang": LATE,
    "hang-after": LATE,
    "drip": LATE,
    "reset": BROKEN,
    "reset-after": BROKEN,
    "close": BROKEN,
    "cut": BROKEN,
    "garbage": BROKEN,
    "refuse": BROKEN,
    "silent": BROKEN,
    "html": NOT_SEGMENT,
    "html:400": NOT_SEGMENT,
    "html:401": NOT_SEGMENT,
    "html:403": NOT_SEGMENT,
    "html:404": NOT_SEGMENT,
    "html:413": NOT_SEGMENT,
    "html:502": "Segment answered 502",
    "redirect": "Segment's address redirects",
    "redirect-307": "Segment's address redirects",
    "false": "Segment answered that it failed",
    "early-hints": "Segment answered 103",
    "late": "Segment answered 503",
    "bomb": NOT_SEGMENT,
    "endless": NOT_SEGMENT,
    "endless-head": BROKEN,  # http.client takes a hundred headers
    "endless-chunks": NOT_SEGMENT,
    "endless-100s": NOT_SEGMENT,
    "twice": "",
    "early": "",  # a small upload has arrived by then
    "forget": "",
}
ENDLESS = {  # how it begins, and what goes on and on
    "endless": (b"HTTP/1.1 200 OK\r\n\r\n", b" " * 65_536),
    "endless-head": (b"HTTP/1.1 200 OK\r\n", b"X: y\r\n" * 10_000),
    "endless-chunks": (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\n \r\n" * 10_000),
    "endless-100s": (b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 3_000),
}
PAGE = b"<!doctype html><title>Sign in</title>"
LARGE = 100_000  # bytes, for the fault "early"
OK = b'{\n  "success": true\n}'
BROKEN_ANSWERS = {
    "close": b"",
    "cut": b"HTTP/1.1 200 OK\r\nContent-Le",
    "garbage": b"\x00\x01 SSH-2.0-nonsense\r\n\r\n\xff",
}


@cache
def bomb() -> bytes:
    """Return 2 MB of gzip that stand for 2 GB."""
    return gzip.compress(bytes(64 * 1024 * 1024)) * 32


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


class FakeSegment:
    def __init__(self, port: int = 0, latency: float = 0.0, tls: ssl.SSLContext | None = None) -> None:
        self.latency = latency  # seconds before each answer
        self.faults: deque[str] = deque()  # one each for the next requests
        self.fault: str | None = None  # for the requests after those ...
        self.share = 1.0  # ... or for this share of them
        self.poison: set[str] = set()  # names of events that get a 400
        self.kept: dict[str, dict[str, Any]] = {}  # messageId -> message
        self.lost: list[dict[str, Any]] = []
        self.duplicates = 0
        self.uploads: list[list[str]] = []  # the names of the events of each batch
        self.requests: list[dict[str, Any]] = []  # method, path, headers, at, size, fault
        self.busy = 0  # requests that are not answered yet
        self.most_busy = 0
        self.open_connections = 0
        self._turn = 0.0
        self._listener: socket.socket | None = None
        self._talks: set[asyncio.Task[None]] = set()
        self._silence: list[socket.socket] = []
        self._loop: asyncio.AbstractEventLoop
        self._gate = asyncio.Event()
        self._gate.set()
        self._port = port
        self._tls = tls
        self._ready = threading.Event()
        self._writers: set[asyncio.StreamWriter] = set()
        self._forgotten: set[asyncio.StreamWriter] = set()

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=lambda: asyncio.run(self._main()), daemon=True)
        self._thread.start()
        assert self._ready.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stopped.set)
        self._thread.join(10)
        if self._tls:
            # asyncio forgets connections in the middle of a handshake; collect them before a test gets their warnings.
            with warnings.catch_warnings(action="ignore", category=ResourceWarning):
                gc.collect()

    @property
    def url(self) -> str:
        return f"http{'s' if self._tls else ''}://127.0.0.1:{self._port}"

    def hold(self) -> None:
        """Answer nothing until `release`."""
        self._loop.call_soon_threadsafe(self._gate.clear)

    def release(self) -> None:
        self._loop.call_soon_threadsafe(self._gate.set)

    def set_fault(self, fault: str | None, share: float = 1.0) -> None:
        """Make `share` of the requests fail like that from now on; None for no fault."""
        self.fault, self.share = fault, share
        asyncio.run_coroutine_threadsafe(self._appear(fault), self._loop).result(10)

    def events(self) -> list[str]:
        """Return the context.event_id of every event kept, in order of arrival."""
        return [message["context"].get("event_id") for message in list(self.kept.values())]

    async def _appear(self, fault: str | None) -> None:
        """Listen, or don't, as `fault` says."""
        for silent in self._silence:
            silent.close()
        self._silence = []
        if fault in ("refuse", "silent"):
            self._close()
        elif self._listener is None:
            self._open()
        if fault == "silent":
            self._be_silent()
        if fault == "forget":
            self._forgotten |= self._writers

    def _close(self) -> None:
        if self._listener is not None:
            self._loop.remove_reader(self._listener)
            self._listener.close()
            self._listener = None
        for writer in list(self._writers):
            writer.transport.abort()

    def _open(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", self._port), backlog=512)
        # Small buffers, here and below, so that what is not read has not arrived: a client can tell no more than that.
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        self._listener.setblocking(False)
        self._port = self._listener.getsockname()[1]
        # asyncio's own server fails on connections that are left in the middle of a TLS handshake.
        self._loop.add_reader(self._listener, self._accept, self._listener)

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):  # it has gone
            client, _ = listener.accept()
            client.setblocking(False)
            task = self._loop.create_task(self._talk(client))
            self._talks.add(task)
            task.add_done_callback(self._talks.discard)
            task.add_done_callback(lambda _: client.close())

    async def _talk(self, client: socket.socket) -> None:
        reader = asyncio.StreamReader(limit=16_384)
        protocol = asyncio.StreamReaderProtocol(reader)
        with contextlib.suppress(OSError):  # in the handshake
            transport, _ = await self._loop.connect_accepted_socket(lambda: protocol, client, ssl=self._tls)
            await self._serve(reader, asyncio.StreamWriter(transport, protocol, reader, self._loop))

    async def _main(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stopped = asyncio.Event()
        self._open()
        self._ready.set()
        await self._stopped.wait()
        await self._appear("refuse")
        await asyncio.sleep(0.001)

    def _be_silent(self) -> None:
        """Listen, but with a backlog that is full: connecting takes for ever."""
        self._silence = [socket.socket() for _ in range(4)]
        self._silence[0].setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._silence[0].bind(("127.0.0.1", self._port))
        self._silence[0].listen(0)
        for filler in self._silence[1:]:
            filler.setblocking(False)
            filler.connect_ex(("127.0.0.1", self._port))

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.open_connections += 1
        self._writers.add(writer)
        try:
            while not self._stopped.is_set():
                method, path, headers = await self._read_head(reader)
                fault = self._next_fault(method, path)
                length = int(headers.get("content-length", 0))
                request = {"method": method, "path": path, "headers": headers, "size": length, "fault": fault}
                if fault == "early" and length > LARGE:
                    self.requests.append(request | {"at": self._loop.time()})
                    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(OK) + OK)
                    await writer.drain()
                    break
                body = await reader.readexactly(length)
                if writer in self._forgotten:
                    await self._stopped.wait()
                    break
                self.requests.append(request | {"at": self._loop.time()})
                self.busy += 1
                self.most_busy = max(self.busy, self.most_busy)
                try:
                    if not await self._answer(writer, fault, headers, body):
                        break
                finally:
                    self.busy -= 1
        except (asyncio.IncompleteReadError, ConnectionError, TimeoutError, asyncio.CancelledError):
            pass
        finally:
            self.open_connections -= 1
            self._forgotten.discard(writer)
            writer.close()
            with contextlib.suppress(OSError, asyncio.CancelledError):
                await writer.wait_closed()  # over TLS the other side has to close, too, unless `_close` ends it
            writer.transport.abort()
            self._writers.discard(writer)

    async def _read_head(self, reader: asyncio.StreamReader) -> tuple[str, str, dict[str, str]]:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        method, path, _ = head[0].split(" ")
        headers = {name.lower(): value.strip() for name, value in (line.split(":", 1) for line in head[1:] if line)}
        return method, path, headers

    def _next_fault(self, method: str, path: str) -> str | None:
        if path != "/v1/batch" or method != "POST":
            return "html"
        if self.faults:
            return self.faults.popleft()
        self._turn = (self._turn + self.share) % 1
        return self.fault if self._turn < self.share and self.fault != "forget" else None

    async def _answer(
        self, writer: asyncio.StreamWriter, fault: str | None, headers: dict[str, str], body: bytes
    ) -> bool:
        """Answer one request; return whether the connection stays open."""
        status, text, extra = 200, OK, ""
        if fault in (None, "hang-after", "reset-after", "twice", "early"):
            status, text = self._take(headers, body)
        if self.latency:
            await asyncio.sleep(self.latency)
        await self._gate.wait()
        match (fault or "").split(":"):
            case ["hang" | "hang-after"]:
                await self._stopped.wait()
                return False
            case ["refuse" | "silent"]:  # it was on its way when that began
                return False
            case ["reset" | "reset-after"]:
                linger = struct.pack("ii", 1, 0)
                writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                return False
            case ["drip"]:
                for byte in b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n" + b" " * 1000:
                    writer.write(bytes([byte]))
                    await writer.drain()
                    await asyncio.sleep(0.05)
                return False
            case ["close" | "cut" | "garbage" as how]:
                writer.write(BROKEN_ANSWERS[how])
                await writer.drain()
                return False
            case ["early-hints"] | ["late"]:
                first = b"103 Early Hints\r\n\r\n" if fault == "early-hints" else b"503 X\r\nContent-Length: 0\r\n\r\n"
                writer.write(b"HTTP/1.1 " + first)
                await writer.drain()
                await asyncio.sleep(0.5)
            case ["html", *number]:
                status, text, extra = int((number or ["200"])[0]), PAGE, "Content-Type: text/html\r\n"
            case ["bomb"]:
                text, extra = bomb(), "Content-Encoding: gzip\r\nContent-Type: application/json\r\n"
            case [endless] if endless in ENDLESS:
                beginning, more = ENDLESS[endless]
                writer.write(beginning)
                while not self._stopped.is_set():
                    writer.write(more)
                    await writer.drain()
                return False
            case ["redirect" | "redirect-307"]:
                status, text = 307 if fault == "redirect-307" else 302, b""
                extra = f"Location: {self.url}/elsewhere\r\n"
            case ["false"]:
                text = b'{"success": false}'
            case [number, *retry_after] if number.isdigit():
                status, text = int(number), b'{"code": "fault", "message": "on demand"}'
                extra = "".join(f"Retry-After: {value}\r\n" for value in retry_after)
        head = f"HTTP/1.1 {status} X\r\nContent-Length: {len(text)}\r\n{extra}\r\n"
        writer.write((head.encode() + text) * (2 if fault == "twice" else 1))
        await writer.drain()
        return True

    def _take(self, headers: dict[str, str], body: bytes) -> tuple[int, bytes]:
        """Keep, lose or refuse the events of a body, by the rules above."""
        refused = b'{"code": "invalid_request", "message": "refused"}'
        try:
            upload = json.loads(body.decode("utf-8"), parse_constant=_refuse_constant)
            json.dumps(upload, ensure_ascii=False).encode()  # no lone surrogates
            batch, key = upload["batch"], upload["writeKey"]
            names = [message.get("event") for message in batch]
        except (ValueError, KeyError, TypeError, AttributeError):
            return 400, refused
        self.uploads.append(names)
        known = isinstance(key, str) and len(key) >= 8
        authorized = headers.get("authorization") == "Basic " + b64encode(f"{key}:".encode()).decode()
        too_large = len(body) > 500_000 or any(len(json.dumps(message)) > 32_768 for message in batch)
        if not known or not authorized or too_large or self.poison & set(names):
            return 400, refused
        for position, message in enumerate(batch):
            named = isinstance(message.get("event"), str) and message["event"]
            somebody = message.get("userId") or message.get("anonymousId")
            shaped = isinstance(message.get("properties"), dict) and message.get("type") == "track"
            identified = 1 <= len(message.get("messageId") or "") <= 100
            if position >= 2_500 or not (named and somebody and shaped and identified):
                self.lost.append(message)
            elif message["messageId"] in self.kept:
                self.duplicates += 1
            else:
                self.kept[message["messageId"]] = message
        return 200, OK


if __name__ == "__main__":
    with FakeSegment(int(sys.argv[1]), int(sys.argv[2]) / 1000):
        print(f"Segment of {sys.argv[2]} ms on port {sys.argv[1]}", flush=True)
        threading.Event().wait()
