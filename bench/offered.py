"""Send webhooks at a fixed rate, whether or not answers keep up: `offered.py PORT FILE RATE SECONDS`.

The file has lines of "timestamp signature body". Latency runs from when a request was due, not from
when it was sent, so a relay that stalls cannot hide it. Prints JSON.
"""

import asyncio
import json
import math
import select
import selectors
import statistics
import sys
from collections import deque
from itertools import islice

PATIENCE = 4  # seconds; Customer.io's


class Selector(selectors.EpollSelector):
    """epoll, which by itself would round each wait up to a millisecond."""

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        select.select([self.fileno()], [], [], None if timeout is None else max(0, timeout))
        return super().select(0)


class Connection(asyncio.Protocol):
    """A kept-alive connection, which goes back to `idle` after each answer."""

    idle: deque["Connection"] = deque()
    latencies: list[float] = []  # seconds, of the answers with 200
    failed = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self.due: float | None = None

    def send(self, request: bytes, due: float) -> None:
        self.due = due
        self.answer = b""
        self.transport.write(request)

    def data_received(self, data: bytes) -> None:
        self.answer += data
        head, end, body = self.answer.partition(b"\r\n\r\n")
        if self.due is None or not end or len(body) < int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0]):
            return
        if head.startswith(b"HTTP/1.1 200"):
            Connection.latencies.append(asyncio.get_running_loop().time() - self.due)
        else:
            Connection.failed += 1
        self.due = None
        Connection.idle.append(self)

    def connection_lost(self, error: Exception | None) -> None:
        Connection.failed += self.due is not None


def request(line: str) -> bytes:
    stamp, signature, body = line.rstrip("\n").split(" ", 2)
    head = f"POST /webhook HTTP/1.1\r\nHost: relay\r\nX-CIO-Timestamp: {stamp}\r\nX-CIO-Signature: {signature}\r\n"
    return f"{head}Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode()


async def main(port: int, path: str, rate: int, seconds: int) -> None:
    loop = asyncio.get_running_loop()
    with open(path) as lines:
        requests = [request(line) for line in islice(lines, rate * seconds)]
    Connection.idle.extend(
        [(await loop.create_connection(Connection, "127.0.0.1", port))[1] for _ in range(rate // 10)]
    )
    start = loop.time() + 0.1
    for position, message in enumerate(requests):
        due = start + position / rate
        await asyncio.sleep(max(0, due - loop.time()))
        while Connection.idle and Connection.idle[0].transport.is_closing():
            Connection.idle.popleft()
        if not Connection.idle:
            Connection.idle.append((await loop.create_connection(Connection, "127.0.0.1", port))[1])
        Connection.idle.popleft().send(message, due)
    give_up = loop.time() + PATIENCE
    while len(Connection.latencies) + Connection.failed < len(requests) and loop.time() < give_up:
        await asyncio.sleep(0.01)
    percentiles = (
        statistics.quantiles(Connection.latencies, n=100) if len(Connection.latencies) > 1 else [math.nan] * 99
    )
    result = {"p50": percentiles[49] * 1000, "p99": percentiles[98] * 1000, "acknowledged": len(Connection.latencies)}
    print(json.dumps(result | {"refused": len(requests) - len(Connection.latencies)}))


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(Selector())) as runner:
        runner.run(main(int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])))
