"""What the tests share: the relay in-process and under gunicorn, a fake Segment, and signed webhooks."""

import json
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import fake_customerio
import harness
import pytest
import requests
from fake_segment import FakeSegment
from harness import KEYS, ROOT, SIGNING_KEY, WRITE_KEY, answers, free_port, until
from hypothesis import HealthCheck, settings

from app import create_app
from config import Config
from ops.page import routes as page
from server import log as logs
from server.shared import Shared

__all__ = ["KEYS", "ROOT", "SIGNING_KEY", "WRITE_KEY", "answers", "free_port", "until"]

# The fake Segments of all tests listen here, one after the other, so that one relay serves many tests.
SEGMENT_PORT = free_port()

# Seconds until an answer: Customer.io gives up after four, and a busy machine adds to them where many wait.
IN_TIME = 6

Headers = Mapping[str, str] | Iterable[tuple[str, str]]


def sign(body: bytes, timestamp: str | None = None, key: str = SIGNING_KEY) -> dict[str, str]:
    return fake_customerio.sign(body, key, timestamp)


def make_event(number: int | str = 1, **changes: Any) -> dict[str, Any]:
    """Return a small event with an id and a person of its own."""
    return {
        "event_id": f"event-{number}",
        "object_type": "email",
        "metric": "opened",
        "timestamp": 1585250199,
        "data": {"customer_id": f"person-{number}"},
    } | changes


def environment(segment: FakeSegment | None, settings: dict[str, str | None]) -> dict[str, str]:
    """Return KEYS and `settings`, pointed at `segment`; None leaves a setting out."""
    env: dict[str, str | None] = {**KEYS, **({"SEGMENT_HOST": segment.url} if segment else {}), **settings}
    return {name: value for name, value in env.items() if value is not None}


class Answer(NamedTuple):
    status_code: int
    headers: Any  # found whatever their case
    text: str
    seconds: float

    def json(self) -> Any:
        return json.loads(self.text)


class Client:
    """Sends requests to a relay. Webhooks are signed unless `headers` says otherwise."""

    def request(self, method: str, path: str, body: bytes = b"", headers: Headers = ()) -> Answer:
        raise NotImplementedError

    def get(self, path: str, headers: Headers = ()) -> Answer:
        return self.request("GET", path, headers=headers)

    def post(self, event: Any, headers: Headers | None = None) -> Answer:
        """Send a webhook: an event, or the bytes of a body."""
        body = event if isinstance(event, bytes) else json.dumps(event).encode()
        return self.request("POST", "/webhook", body, sign(body) if headers is None else headers)

    def post_all(self, events: list[Any]) -> list[Answer]:
        """Send webhooks at the same time."""
        with ThreadPoolExecutor(len(events)) as pool:
            return list(pool.map(self.post, events))


class InProcess(Client):
    """The relay as `create_app` returns it, called through Flask's test client."""

    def __init__(self, segment: FakeSegment | None = None, shared: Shared | None = None, **settings: str | None):
        self.app = create_app(Config.from_env(environment(segment, settings)), shared or Shared())

    def request(self, method: str, path: str, body: bytes = b"", headers: Headers = (), **environ: str) -> Answer:
        given = list(headers.items() if isinstance(headers, Mapping) else headers)
        started = time.monotonic()
        response = self.app.test_client().open(
            path, method=method, data=body, headers=given, environ_overrides=environ, buffered=True
        )
        return Answer(response.status_code, response.headers, response.text, time.monotonic() - started)


class Relay(harness.Relay, Client):
    """The relay as `gunicorn "app:create_app()"` runs it, in a process of its own."""

    def request(self, method: str, path: str, body: bytes = b"", headers: Headers = ()) -> Answer:
        response = requests.request(
            method, self.url + path, data=body, headers=dict(headers), timeout=20, allow_redirects=False
        )
        return Answer(response.status_code, response.headers, response.text, response.elapsed.total_seconds())

    def counted(self, outcome: str, reason: str) -> float:
        """Return how many webhooks the metrics count with these labels."""
        labels = f'outcome="{outcome}",reason="{reason}"'
        found = re.search(rf"relay_webhooks_total{{{labels}}} (.+)", self.get("/metrics").text)
        return float(found[1]) if found else 0

    def log_of(self, action: Callable[[], Any]) -> Callable[[], str]:
        """Do something; return a function that says what has been logged since."""
        before = len(self.log)
        action()
        return lambda: self.log[before:]


class NoTimer:
    """A timer that never goes off."""

    def __init__(self, *_: Any):
        self.daemon = False

    def start(self) -> None:
        pass


@pytest.fixture(autouse=True)
def no_thread_outlives_its_test(monkeypatch: pytest.MonkeyPatch) -> None:
    """Log repetitions are off in-process, so that no timer outlives its test."""
    monkeypatch.setattr("server.log.Timer", NoTimer)


@pytest.fixture(autouse=True)
def a_log_of_its_own() -> None:
    """Each test's log is what its standard error is then: capfd replaces that."""
    logs.stream.cache_clear()


@pytest.fixture(autouse=True)
def environment_as_before() -> Iterator[None]:
    """A command puts the settings of --env-file into the environment of its process."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def segment() -> Iterator[FakeSegment]:
    with FakeSegment(SEGMENT_PORT) as fake:
        yield fake


@pytest.fixture
def always_fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """Render the page and the metrics each time, not once a second."""
    monkeypatch.setattr(page, "once_a_second", lambda make: make)


@pytest.fixture
def client(segment: FakeSegment) -> InProcess:
    return InProcess(segment)


@pytest.fixture
def start() -> Iterator[Callable[..., Relay]]:
    """Start relays under gunicorn: start(segment, NAME=value, ...)."""
    relays: list[Relay] = []

    def _start(
        segment: FakeSegment | None = None, options: Iterable[str] = (), wait: bool = True, **settings: str | None
    ) -> Relay:
        relays.append(Relay(environment(segment, settings), (harness.APP, *options), wait=wait))
        return relays[-1]

    yield _start
    for relay in relays:
        relay.kill()


@pytest.fixture(scope="session")
def shared_relay() -> Iterator[Relay]:
    with Relay({**KEYS, "SEGMENT_HOST": f"http://127.0.0.1:{SEGMENT_PORT}"}) as relay:
        yield relay


@pytest.fixture(scope="session")
def shared_relay_of_one_worker() -> Iterator[Relay]:
    with Relay({**KEYS, "SEGMENT_HOST": f"http://127.0.0.1:{SEGMENT_PORT}", "WEB_CONCURRENCY": "1"}) as relay:
        yield relay


@pytest.fixture
def relay(shared_relay: Relay, segment: FakeSegment) -> Relay:
    """A relay under gunicorn, for tests that leave it as it was. `start` starts others."""
    return shared_relay


@pytest.fixture
def one_worker(shared_relay_of_one_worker: Relay, segment: FakeSegment) -> Relay:
    """The same with one worker, in which all webhooks meet."""
    return shared_relay_of_one_worker


@pytest.fixture(params=["in-process", pytest.param("gunicorn", marks=pytest.mark.gunicorn)])
def anywhere(request: pytest.FixtureRequest) -> Client:
    """The relay in-process, and under gunicorn: both give the same answers."""
    client: Client = request.getfixturevalue("client" if request.param == "in-process" else "relay")
    return client


def pytest_configure(config: pytest.Config) -> None:
    """Try 300 examples of each property; 50 in `make test-fast`."""
    fast = "not gunicorn" in config.getoption("markexpr")
    settings.register_profile(
        "relay", deadline=None, max_examples=50 if fast else 300, suppress_health_check=list(HealthCheck)
    )
    settings.load_profile("relay")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark each test that starts gunicorn."""
    for item in items:
        if {"start", "shared_relay", "shared_relay_of_one_worker"} & set(getattr(item, "fixturenames", ())):
            item.add_marker("gunicorn")
