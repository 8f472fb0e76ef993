"""A Segment that only counts, so that it costs little: `counting_segment.py PORT MILLISECONDS`.

`GET` answers {"uploads": ..., "messages": ..., "events": ...}: how many uploads
arrived since the last GET, how many messages in them, and how many different messageIds.
"""

import asyncio
import json
import re
import sys

MESSAGE_ID = re.compile(rb'"messageId": ?"([^"]+)"')
OK = b'HTTP/1.1 200 OK\r\nContent-Length: 17\r\n\r\n{"success": true}'


class Segment(asyncio.Protocol):
    uploads = messages = 0
    kept: set[bytes] = set()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self.buffer = bytearray()

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        while (end := self.buffer.find(b"\r\n\r\n")) >= 0:
            head = bytes(self.buffer[:end]).lower()
            if head.startswith(b"get"):
                body = json.dumps(
                    {"uploads": Segment.uploads, "messages": Segment.messages, "events": len(Segment.kept)}
                ).encode()
                Segment.uploads, Segment.messages, Segment.kept = 0, 0, set()
                self.answer(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
                length = 0
            else:
                length = int(head.split(b"content-length:")[1].split(b"\r\n")[0])
                if len(self.buffer) < end + 4 + length:
                    return
                Segment.uploads += 1
                found = MESSAGE_ID.findall(self.buffer, end)
                Segment.messages += len(found)
                Segment.kept.update(found)
                asyncio.get_running_loop().call_later(LATENCY, self.answer, OK)
            del self.buffer[: end + 4 + length]

    def answer(self, answer: bytes) -> None:
        if not self.transport.is_closing():
            self.transport.write(answer)


async def main() -> None:
    server = await asyncio.get_running_loop().create_server(Segment, "127.0.0.1", int(sys.argv[1]), backlog=1024)
    await server.serve_forever()


if __name__ == "__main__":
    LATENCY = int(sys.argv[2]) / 1000
    asyncio.run(main())
