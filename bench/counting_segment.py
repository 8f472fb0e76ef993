"""A Segment that only counts, so that it costs little: `counting_segment.py PORT MILLISECONDS`.

`GET /` answers {"uploads": ..., "messages": ..., "events": ..., "at once": ..., "sockets": ...}: how many
uploads arrived since the last GET, how many messages in them, how many different messageIds, and the
most uploads and connections at one time. `GET /500/100` also has it answer after 500 ms from now on, and
answer 503 to more than 100 uploads at once.
"""

import asyncio
import json
import re
import sys

MESSAGE_ID = re.compile(rb'"messageId": ?"([^"]+)"')
SETTINGS = re.compile(rb"get /(\d+)/(\d+) ")
OK = b'HTTP/1.1 200 OK\r\nContent-Length: 17\r\n\r\n{"success": true}'
OVERLOADED = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 2\r\n\r\n{}"


class Seen:
    """What was counted since the last GET."""

    def __init__(self) -> None:
        self.uploads = self.messages = self.at_once = self.sockets = 0
        self.events: set[bytes] = set()


class State:
    latency = 0.0  # seconds
    limit = sys.maxsize  # uploads at once
    busy = connections = 0
    seen = Seen()


class Segment(asyncio.Protocol):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self.buffer = bytearray()
        State.connections += 1

    def connection_lost(self, error: Exception | None) -> None:
        State.connections -= 1

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        while (end := self.buffer.find(b"\r\n\r\n")) >= 0:
            head = bytes(self.buffer[:end]).lower()
            length = 0
            if head.startswith(b"get"):
                self.tell(head)
            else:
                length = int(head.split(b"content-length:")[1].split(b"\r\n")[0])
                if len(self.buffer) < end + 4 + length:
                    return
                self.take(bytes(self.buffer[end + 4 : end + 4 + length]))
            del self.buffer[: end + 4 + length]

    def tell(self, head: bytes) -> None:
        seen = State.seen
        counts = {"uploads": seen.uploads, "messages": seen.messages, "events": len(seen.events)}
        body = json.dumps(counts | {"at once": seen.at_once, "sockets": seen.sockets}).encode()
        State.seen = Seen()
        if found := SETTINGS.match(head):
            State.latency, State.limit = int(found[1]) / 1000, int(found[2])
        self.answer(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body)

    def take(self, body: bytes) -> None:
        seen = State.seen
        State.busy += 1
        seen.uploads += 1
        seen.at_once = max(seen.at_once, min(State.busy, State.limit))
        seen.sockets = max(seen.sockets, State.connections)
        if State.busy > State.limit:
            self.done(OVERLOADED)
            return
        found = MESSAGE_ID.findall(body)
        seen.messages += len(found)
        seen.events.update(found)
        asyncio.get_running_loop().call_later(State.latency, self.done, OK)

    def done(self, answer: bytes) -> None:
        State.busy -= 1
        self.answer(answer)

    def answer(self, answer: bytes) -> None:
        if not self.transport.is_closing():
            self.transport.write(answer)


async def main() -> None:
    server = await asyncio.get_running_loop().create_server(Segment, "127.0.0.1", int(sys.argv[1]), backlog=1024)
    await server.serve_forever()


if __name__ == "__main__":
    State.latency = int(sys.argv[2]) / 1000
    asyncio.run(main())
