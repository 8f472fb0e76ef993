"""The configurations of docs/proxies: what they tell the relay. `make soak-proxies` has relays killed behind them."""

import contextlib
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import requests
from conftest import free_port, until
from soak_proxies import PATH, PROXIES, certificate

OPENSSL = shutil.which("openssl")


@pytest.fixture
def behind():
    """A server in the relay's place, which keeps the headers of the latest request."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            if self.path != "/health":  # HAProxy asks for that by itself
                self.server.headers = self.headers
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture(params=PROXIES)
def proxy(request, behind, tmp_path, monkeypatch):
    """The address of a proxy with its documented configuration."""
    program = shutil.which(request.param, path=PATH)
    if not program or not OPENSSL:
        pytest.skip(f"no {request.param} or openssl here")
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", "")  # certificate() sets it
    certificate(tmp_path, OPENSSL)
    port = free_port()
    url = f"https://127.0.0.1:{port}/"
    with PROXIES[request.param].start(program, tmp_path, port, behind.server_port) as process:

        def serves():
            assert process.process.poll() is None, process.log
            with contextlib.suppress(requests.RequestException):
                return requests.get(url, timeout=4).status_code == 200

        until(serves)
        yield url


def test_the_relay_learns_who_called_and_how_and_nothing_that_the_client_made_up(proxy, behind):
    forged = {"X-Forwarded-Proto": "http", "X-Forwarded-For": "192.0.2.1"}
    assert requests.get(proxy, headers=forged, timeout=4).status_code == 200
    assert behind.headers.get_all("X-Forwarded-Proto") == ["https"]
    assert behind.headers.get_all("X-Forwarded-For") == ["127.0.0.1"]
