"""What the tests share: a real relay under gunicorn on a free port, a fake Segment, and signed webhooks."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fake_customerio
import pytest
import requests
from fake_segment import FakeSegment

ROOT = Path(__file__).parent.parent
WRITE_KEY = "0123456789abcdefghijklmnopqrstuv"
SIGNING_KEY = "a-signing-key-of-the-tests"


def sign(body: bytes, timestamp: str | None = None, key: str = SIGNING_KEY) -> dict[str, str]:
    return fake_customerio.sign(body, key, timestamp)


def make_event(number: int | str = 1, **changes: Any) -> dict[str, Any]:
    """Return a small event, of an id and a person of its own."""
    return {
        "event_id": f"event-{number}",
        "object_type": "email",
        "metric": "opened",
        "timestamp": 1585250199,
        "data": {"customer_id": f"person-{number}"},
    } | changes


def until(happened: Callable[[], Any], seconds: float = 10) -> None:
    """Wait for something to happen; fail if it does not."""
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


class Relay:
    """The relay as `gunicorn app:app` runs it, in a process of its own."""

    def __init__(self, env: dict[str, str], wait: bool = True) -> None:
        self.port = int(env.get("PORT") or free_port())
        base = {name: value for name, value in os.environ.items() if name in ("PATH", "HOME", "LANG")}
        self.process = subprocess.Popen(
            [str(Path(sys.executable).parent / "gunicorn"), "app:app"],
            cwd=ROOT,
            env=base | {"PORT": str(self.port), "PYTHONUNBUFFERED": "1"} | env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        self._output: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        if wait:
            try:
                until(self._serves, 20)
            except BaseException:
                self.kill()  # nobody else could
                raise

    def _read(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            self._output.append(line.decode(errors="replace"))

    def _serves(self) -> bool:
        assert self.process.poll() is None, self.log
        try:
            return requests.get(self.url + "/health", timeout=5).status_code == 200
        except requests.ConnectionError:
            return False

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def log(self) -> str:
        return "".join(self._output)

    def post(self, event: Any, headers: dict[str, str] | None = None, **more: Any) -> requests.Response:
        """Send a webhook, signed unless `headers` says otherwise."""
        body = event if isinstance(event, bytes) else json.dumps(event).encode()
        headers = sign(body) if headers is None else headers
        return requests.post(self.url + "/webhook", data=body, headers=headers, timeout=20, **more)

    def post_all(self, events: list[dict[str, Any]]) -> list[requests.Response]:
        """Send webhooks at the same time."""
        with ThreadPoolExecutor(len(events)) as pool:
            return list(pool.map(self.post, events))

    def workers(self) -> list[int]:
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        return [int(pid) for pid in children.read_text().split()]

    def kill(self) -> None:
        """End it and its workers at once."""
        pids = [self.process.pid, *self.workers()] if self.process.poll() is None else []
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait(10)
        self._reader.join(10)
        assert self.process.stdout
        self.process.stdout.close()


@pytest.fixture
def segment() -> Iterator[FakeSegment]:
    with FakeSegment() as fake:
        yield fake


@pytest.fixture
def start() -> Iterator[Callable[..., Relay]]:
    """Start relays: start(segment, NAME=value, ...); None leaves a setting out."""
    relays: list[Relay] = []

    def _start(segment: FakeSegment | None = None, wait: bool = True, **settings: str | None) -> Relay:
        env: dict[str, str | None] = {"SEGMENT_WRITE_KEY": WRITE_KEY, "CUSTOMERIO_SIGNING_KEY": SIGNING_KEY}
        if segment:
            env["SEGMENT_HOST"] = segment.url
        env |= settings
        relays.append(Relay({name: value for name, value in env.items() if value is not None}, wait))
        return relays[-1]

    yield _start
    for relay in relays:
        relay.kill()


@pytest.fixture
def relay(start: Callable[..., Relay], segment: FakeSegment) -> Relay:
    return start(segment)
