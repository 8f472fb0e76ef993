"""A fake HTTP proxy on loopback: it passes requests on, and CONNECT opens a tunnel, if the login is right."""

import contextlib
import socket
import threading
from base64 import b64encode
from typing import Self


class FakeProxy:
    def __init__(self, login: str = "", tls_ahead: bytes = b"") -> None:
        self.requests: list[tuple[str, dict[str, str]]] = []  # each first line, with the headers
        self._wanted = "Basic " + b64encode(login.encode()).decode() if login else None
        self._ahead = tls_ahead  # sent along with the answer to CONNECT
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._listen, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # or accept() would go on
        self._listener.close()

    def _listen(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client, contextlib.suppress(OSError):
            data = b""
            while b"\r\n\r\n" not in data:
                if not (more := client.recv(65_536)):
                    return
                data += more
            head, _, rest = data.partition(b"\r\n\r\n")
            first, *lines = head.decode().split("\r\n")
            headers = {name.lower(): value.strip() for name, value in (line.split(":", 1) for line in lines)}
            self.requests.append((first, headers))
            if self._wanted not in (None, headers.get("proxy-authorization")):
                client.sendall(b"HTTP/1.1 407 X\r\nProxy-Authenticate: Basic\r\nContent-Length: 0\r\n\r\n")
                return
            method, target, version = first.split(" ")
            place, _, path = target.removeprefix("http://").partition("/")
            host, _, port = place.partition(":")
            with socket.create_connection((host, int(port))) as server:
                if method == "CONNECT":
                    client.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n" + self._ahead)
                else:
                    kept = [line for line in lines if not line.lower().startswith("proxy-")]
                    server.sendall("\r\n".join([f"{method} /{path} {version}", *kept, "", ""]).encode() + rest)
                back = threading.Thread(target=_pass_on, args=(server, client), daemon=True)
                back.start()
                _pass_on(client, server)
                back.join()


def _pass_on(source: socket.socket, sink: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(65_536):
            sink.sendall(data)
    with contextlib.suppress(OSError):
        sink.shutdown(socket.SHUT_WR)
