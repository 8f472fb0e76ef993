"""Strangers who pester a relay until standard input ends: `python proof/strangers.py PORT PAUSE KIND=NUMBER...`.

chunks      a body in chunks of one byte, without end       pages        load the page, over and over
stalled     a body that stops in its middle                 pipelines    ask for the page and never read
small       a body that stops after 64 KiB                  idle         send nothing, half a head, or get a 404
heads       a head of 60 KB, then a byte a packet
"""

import contextlib
import random
import socket
import sys
import threading
import time

WEBHOOK = b"POST /webhook HTTP/1.1\r\nHost: x\r\n"
PAGE = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"


def chunks(client: socket.socket, pause: float) -> None:
    client.sendall(WEBHOOK + b"Transfer-Encoding: chunked\r\n\r\n")
    while True:
        client.sendall(b"1\r\nx\r\n" * 1000)
        time.sleep(pause)


def stalled(client: socket.socket, pause: float) -> None:
    client.sendall(WEBHOOK + b"Content-Length: 8000000\r\n\r\n" + b"x" * 1_000_000)
    while client.recv(65536):
        pass


def small(client: socket.socket, pause: float) -> None:
    client.sendall(WEBHOOK + b"Content-Length: 8000000\r\n\r\n" + b"x" * 65_536)
    while client.recv(65536):
        pass


def idle(client: socket.socket, pause: float) -> None:
    client.sendall(random.choice([b"", WEBHOOK, b"GET /nowhere HTTP/1.1\r\nHost: x\r\n\r\n"]))  # noqa: S311
    client.settimeout(100)
    while client.recv(65536):
        pass


def heads(client: socket.socket, pause: float) -> None:
    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    client.sendall(WEBHOOK + b"X: " + b"y" * 60_000)
    while True:
        client.sendall(b"y")
        time.sleep(pause / 10)


def pages(client: socket.socket, pause: float) -> None:
    while True:
        client.sendall(PAGE)
        if not client.recv(65536):
            return
        time.sleep(pause)


def pipelines(client: socket.socket, pause: float) -> None:
    while True:
        client.sendall(PAGE * 100)
        time.sleep(pause)


KINDS = {function.__name__: function for function in (chunks, stalled, pages, pipelines, small, idle, heads)}


def pester(kind: str, port: int, pause: float) -> None:
    while True:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=10) as client:
            KINDS[kind](client, pause)
        time.sleep(max(pause, 0.01))


def main() -> None:
    port, pause = int(sys.argv[1]), float(sys.argv[2])
    for words in sys.argv[3:]:
        kind, number = words.split("=")
        for _ in range(int(number)):
            threading.Thread(target=pester, args=(kind, port, pause), daemon=True).start()
    print("started", flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
