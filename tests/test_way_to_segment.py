"""The way to Segment: proxies, certificates, networks that forget, and whatever answers in its place."""

import contextlib
import datetime
import ipaddress
import os
import socket
import ssl
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import requests
from click.testing import CliRunner
from conftest import IN_TIME, KEYS, WRITE_KEY, InProcess, make_event, until
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from fake_proxy import FakeProxy
from fake_segment import ENDLESS, FakeSegment
from harness import megabytes
from requests.utils import get_environ_proxies, select_proxy

from config import Config, ConfigError
from ops.__main__ import main
from relay.message import Message
from relay.outcomes import RetryLater, TransientError
from relay.proxies import Proxy, parse, variable_for
from relay.segment import SegmentClient

MESSAGE = Message("1", '{"messageId": "1"}')
BROKEN = "the connection to Segment failed"
NOT_SEGMENT = "what answered is not Segment: check SEGMENT_HOST and proxies"

# Which proxy. ------------------------------------------------------------------------------------

PROXY, OTHER = "http://proxy.example:3128", "http://other.example:3128"
ENVIRONMENTS = {
    "none": {},
    "for https": {"HTTPS_PROXY": PROXY},
    "for http": {"HTTP_PROXY": PROXY},
    "for all": {"ALL_PROXY": PROXY},
    "in lower case": {"https_proxy": PROXY, "http_proxy": PROXY},
    "in both cases": {"HTTPS_PROXY": OTHER, "https_proxy": PROXY, "HTTP_PROXY": OTHER, "http_proxy": PROXY},
    "switched off in lower case": {"HTTPS_PROXY": PROXY, "https_proxy": "", "HTTP_PROXY": PROXY, "http_proxy": ""},
    "in mixed case": {"Https_Proxy": PROXY},
    "blank": {"HTTPS_PROXY": "", "HTTP_PROXY": ""},
    "all, and one of its own": {"ALL_PROXY": OTHER, "HTTPS_PROXY": PROXY},
    "all, and a blank one": {"ALL_PROXY": OTHER, "HTTPS_PROXY": ""},
}
DIRECT = [
    "", "*", "*,x", "segment.io", ".segment.io", "api.segment.io", "API.Segment.IO", "egment.io",
    "a, api.segment.io ,b", "api.segment.io:443", "api.segment.io:8443", ".segment.io:8443", "10.0.0.0/8", "10.1.2.3",
    "10.1.2.3:80", "2.3", "10.1.2.0/33", "localhost", "::1", "[::1]", ",", ".", "/8",
]  # fmt: skip
URLS = [
    "https://api.segment.io", "https://api.segment.io:8443", "http://api.segment.io", "http://10.1.2.3",
    "http://10.1.2.3:80", "http://localhost:9000", "http://[::1]:9000", "https://API.segment.io",
]  # fmt: skip


@pytest.fixture
def environ():
    """Replace the environment; the one of before comes back after each test."""

    def replace(env):
        os.environ.clear()
        os.environ.update(env)

    return replace


@pytest.mark.parametrize("env", ENVIRONMENTS.values(), ids=ENVIRONMENTS.keys())
@pytest.mark.parametrize("no_proxy", DIRECT)
def test_the_proxy_is_the_one_that_requests_takes(environ, env, no_proxy):
    for name in ("NO_PROXY", "no_proxy"):
        given = env | ({name: no_proxy} if no_proxy else {})
        environ(given)
        expected = [select_proxy(url, get_environ_proxies(url)) for url in URLS]
        found = [variable_for(url, given) for url in URLS]
        assert [name and given[name] for name in found] == expected


ADDRESSES = {
    "http://proxy.example:3128": Proxy("proxy.example", 3128, ""),
    "proxy.example:3128": Proxy("proxy.example", 3128, ""),
    "http://proxy.example/": Proxy("proxy.example", 80, ""),
    "http://[::1]:3128": Proxy("::1", 3128, ""),
    "http://user:p%40ss%3A@proxy.example:1": Proxy("proxy.example", 1, "Basic dXNlcjpwQHNzOg=="),
    "user:password@proxy.example:3128": Proxy("proxy.example", 3128, "Basic dXNlcjpwYXNzd29yZA=="),
}


@pytest.mark.parametrize(("address", "proxy"), ADDRESSES.items(), ids=ADDRESSES.keys())
def test_parse(address, proxy):
    assert parse(address) == proxy


UNUSABLE = {
    "TLS": "https://user:secret@proxy.example:3128",
    "SOCKS": "socks5://user:secret@proxy.example:1080",
    "SOCKS with names": "socks5h://user:secret@proxy.example:1080",
    "SOCKS 4": "socks4://secret.example:1080",
    "no host": "http://:3128",
    "an invalid port": "http://user:secret@proxy.example:http",
    "port 0": "http://secret.example:0",
    "a blank in it": "http://secret example:3128",
    "a slash in the password": "http://user:sec/ret@proxy.example:3128",
}


def problems(env):
    with pytest.raises(ConfigError) as error:
        Config.from_env(KEYS | env)
    return error.value.problems


@pytest.mark.parametrize("value", UNUSABLE.values(), ids=UNUSABLE.keys())
@pytest.mark.parametrize("name", ["HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"])
def test_a_proxy_that_cannot_be_used_is_a_problem(name, value):
    (problem,) = problems({name: value})
    assert problem.startswith(f"{name} is not an http:// address")
    assert "secret" not in problem


NO_PROBLEM = {
    "it is not for Segment": {"HTTPS_PROXY": "socks5://x:1", "NO_PROXY": "segment.io"},
    "another protocol": {"HTTP_PROXY": "socks5://x:1", "FTP_PROXY": "socks5://x:1"},
    "a better one wins": {"ALL_PROXY": "socks5://x:1", "HTTPS_PROXY": PROXY},
    "a dry run": {"ALL_PROXY": "socks5://x:1", "DRY_RUN": "force"},
}


@pytest.mark.parametrize("env", NO_PROBLEM.values(), ids=NO_PROBLEM.keys())
def test_a_proxy_that_is_not_used_is_no_problem(env):
    Config.from_env(KEYS | env)


def test_no_password_of_a_proxy_in_repr():
    config = Config.from_env(KEYS | {"HTTPS_PROXY": "http://user:secret@proxy.example:3128"})
    assert config.proxy == "http://user:secret@proxy.example:3128"
    assert "secret" not in repr(config)


@pytest.mark.gunicorn
def test_the_relay_does_not_start_with_a_proxy_that_it_cannot_use(start, segment):
    relay = start(None, wait=False, HTTPS_PROXY="socks5://user:secret@proxy.example:1080", LOG_LEVEL="debug")
    assert relay.process.wait(10) == 1
    log = relay.whole_log()
    assert "The relay cannot start:\n  - HTTPS_PROXY is not an http:// address" in log
    assert "secret" not in log
    assert "Booting worker" not in log


@pytest.mark.parametrize("command", [["check"], ["replay", "/dev/null"]], ids=["check", "replay"])
def test_neither_do_the_commands(command):
    done = CliRunner().invoke(main, command, env=KEYS | {"HTTPS_PROXY": "socks5://user:secret@proxy.example:1080"})
    assert done.exit_code == 1
    assert "HTTPS_PROXY is not an http:// address" in done.stderr
    assert "secret" not in done.output


# Certificates. -----------------------------------------------------------------------------------


class Certificate:
    """A certificate that signs itself, and a server's context with it."""

    def __init__(self, folder, address="127.0.0.1", days=(-2, 2)):
        key = ec.generate_private_key(ec.SECP256R1())
        now = datetime.datetime.now(datetime.UTC)
        name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "Segment, a fake")])
        made = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now + datetime.timedelta(days[0]))
            .not_valid_after(now + datetime.timedelta(days[1]))
            .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(address))]), critical=False)
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .sign(key, hashes.SHA256())
        )
        pem = serialization.Encoding.PEM
        self.path = folder / "certificate.pem"
        self.path.write_bytes(made.public_bytes(pem))
        (folder / "key.pem").write_bytes(
            key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        )
        self.tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.tls.load_cert_chain(self.path, folder / "key.pem")
        self.bundle = str(self.path)


@pytest.fixture
def certificate(tmp_path):
    return Certificate(tmp_path)


@pytest.fixture
def secure(certificate):
    """A fake Segment that speaks TLS."""
    with FakeSegment(tls=certificate.tls) as segment:
        yield segment


@pytest.fixture(params=["in-process", pytest.param("gunicorn", marks=pytest.mark.gunicorn)])
def relay_with(request):
    """Make a relay: relay_with(segment, NAME=value, ...), in-process and under gunicorn."""
    return InProcess if request.param == "in-process" else request.getfixturevalue("start")


def statuses(answers):
    return [answer.status_code for answer in answers]


def check_refused(answer):
    assert (answer.status_code, answer.json()["reason"]) == (503, BROKEN)


def test_a_certificate_that_is_trusted(relay_with, secure, certificate, tmp_path):
    folder = tmp_path / "trusted"
    folder.mkdir()
    with open(certificate.path, "rb") as file:
        (folder / f"{hash_of(file.read()):08x}.0").symlink_to(certificate.path)
    for number, bundle in enumerate((certificate.bundle, str(folder))):
        relay = relay_with(secure, REQUESTS_CA_BUNDLE=bundle)
        assert statuses(relay.post(make_event(f"{number}-{n}")) for n in range(3)) == [200] * 3
    assert len(secure.kept) == 6
    assert secure.open_connections <= 4


def hash_of(pem):
    """Return what `openssl rehash` names a certificate by: OpenSSL's hash of its canonical subject."""
    import hashlib

    # One attribute, in canonical form: lower case, and without the outer sequence.
    text = b"segment, a fake"
    attribute = b"\x06\x03\x55\x04\x03" + bytes([0x0C, len(text)]) + text
    pair = bytes([0x30, len(attribute)]) + attribute
    digest = hashlib.sha1(bytes([0x31, len(pair)]) + pair).digest()
    return int.from_bytes(digest[:4], "little")


def test_a_certificate_that_nobody_vouches_for(relay_with, secure):
    check_refused(relay_with(secure).post(make_event()))
    assert secure.requests == []


WRONG = {"another's": {"address": "127.0.0.2"}, "expired": {"days": (-4, -2)}, "of the future": {"days": (2, 4)}}


@pytest.mark.parametrize("changes", WRONG.values(), ids=WRONG.keys())
def test_a_certificate_that_is_trusted_but_wrong(relay_with, tmp_path, changes):
    wrong = Certificate(tmp_path, **changes)
    with FakeSegment(tls=wrong.tls) as segment:
        check_refused(relay_with(segment, REQUESTS_CA_BUNDLE=wrong.bundle).post(make_event()))
        assert segment.requests == []


BUNDLES = {  # what is there -> the message
    "nothing": (None, "No such file or directory"),
    "an empty file": (b"", "none is in the file"),
    "another file": (b"certificates", "none is in the file"),
    "an empty folder": ("folder", "the folder has none, or `openssl rehash` wasn't run on it"),
}


@pytest.mark.gunicorn
@pytest.mark.parametrize(("content", "why"), BUNDLES.values(), ids=BUNDLES.keys())
@pytest.mark.parametrize("name", ["REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"])
def test_certificates_that_cannot_be_loaded_are_a_problem_at_the_start(start, tmp_path, name, content, why):
    path = tmp_path / "bundle"
    if content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    relay = start(None, wait=False, **{name: str(path)})
    assert relay.process.wait(10) == 1
    assert f"{name} has no certificates to trust: {why}." in relay.whole_log()
    done = CliRunner().invoke(main, ["replay", "/dev/null"], env=KEYS | {"REQUESTS_CA_BUNDLE": None, name: str(path)})
    assert (done.exit_code, f"{name} has no certificates to trust: {why}." in done.stderr) == (1, True)


def test_a_connection_over_tls_is_used_again(secure, certificate):
    client = SegmentClient(WRITE_KEY, secure.url, ca_bundle=certificate.bundle)
    for _ in range(5):
        client.upload([MESSAGE], 5)
        assert secure.open_connections == 1
    assert len(secure.requests) == 5


def test_a_second_answer_over_tls_is_nobodys(secure, certificate):
    client = SegmentClient(WRITE_KEY, secure.url, ca_bundle=certificate.bundle)
    secure.faults.extend(["twice", "500"])
    client.upload([MESSAGE], 5)
    with pytest.raises(TransientError, match="500"):
        client.upload([MESSAGE], 5)


# Through a proxy. --------------------------------------------------------------------------------


LOGINS = {"without a login": "", "with a login": "user:p@ss"}


@pytest.mark.parametrize("login", LOGINS.values(), ids=LOGINS.keys())
def test_through_a_proxy_to_https(relay_with, secure, certificate, login):
    with FakeProxy(login) as proxy:
        address = f"http://{login.replace('@', '%40') + '@' if login else ''}{proxy.address}"
        relay = relay_with(secure, HTTPS_PROXY=address, REQUESTS_CA_BUNDLE=certificate.bundle, NO_PROXY="other.example")
        assert statuses(relay.post(make_event(number)) for number in range(3)) == [200] * 3
    assert {first for first, _ in proxy.requests} == {f"CONNECT {secure.url.removeprefix('https://')} HTTP/1.1"}
    assert {"authorization" in headers for _, headers in proxy.requests} == {False}
    assert not any("proxy-authorization" in request["headers"] for request in secure.requests)


@pytest.mark.parametrize("login", LOGINS.values(), ids=LOGINS.keys())
def test_through_a_proxy_to_http(relay_with, segment, login):
    with FakeProxy(login) as proxy:
        address = f"http://{login.replace('@', '%40') + '@' if login else ''}{proxy.address}"
        assert relay_with(segment, http_proxy=address).post(make_event("a")).status_code == 200
    assert [first for first, _ in proxy.requests] == [f"POST {segment.url}/v1/batch HTTP/1.1"]
    assert segment.events() == ["event-a"]


def test_a_proxy_that_refuses(relay_with, secure, certificate):
    with FakeProxy("user:password") as proxy:
        for login in ("", "user:wrong@"):
            relay = relay_with(
                secure, HTTPS_PROXY=f"http://{login}{proxy.address}", REQUESTS_CA_BUNDLE=certificate.bundle
            )
            answer = relay.post(make_event())
            assert (answer.status_code, answer.json()["reason"]) == (503, NOT_SEGMENT)
    assert len(proxy.requests) == 2  # a second attempt would fare no better
    assert secure.requests == []


def test_a_proxy_that_is_not_there_is_not_gone_around(relay_with, segment):
    check_refused(relay_with(segment, http_proxy="http://127.0.0.1:9").post(make_event()))
    assert segment.requests == []


def test_what_a_proxy_sends_ahead_of_segment_ends_the_connection(secure, certificate):
    with FakeProxy(tls_ahead=b"HTTP/1.1 200 OK\r\n") as proxy:
        client = SegmentClient(WRITE_KEY, secure.url, f"http://{proxy.address}", certificate.bundle)
        with pytest.raises(RetryLater, match=BROKEN):
            client.upload([MESSAGE], 5)


@pytest.mark.parametrize("fault", [*ENDLESS, "drip", "hang"])
def test_a_proxy_whose_answer_never_ends(segment, certificate, fault):
    """The fake Segment answers a CONNECT, too."""
    segment.fault = fault
    client = SegmentClient(WRITE_KEY, "https://segment.example", segment.url, certificate.bundle)
    with pytest.raises(RetryLater):
        client.upload([MESSAGE], 0.5)


# Networks that forget. ---------------------------------------------------------------------------


@pytest.mark.gunicorn
def test_a_network_that_forgets_connections_costs_one_round_of_webhooks(start, segment):
    relay = start(segment, WEB_CONCURRENCY="1")
    segment.hold()
    with ThreadPoolExecutor(5) as pool:
        first = []
        for number in range(5):
            first.append(pool.submit(relay.post, make_event(f"first-{number}")))
            until(lambda: segment.busy == len(first))
        segment.release()
        assert statuses(job.result() for job in first) == [200] * 5
    assert segment.open_connections == 5
    segment.set_fault("forget")
    assert statuses(relay.post(make_event(number)) for number in range(6)) == [503] + [200] * 5
    segment.set_fault("forget")
    answers = relay.post_all([make_event(f"crowd-{number}") for number in range(64)])
    assert all(answer.seconds < IN_TIME for answer in answers)
    assert statuses(answers).count(503) < 64
    assert set(statuses(relay.post_all([make_event(f"again-{number}") for number in range(64)]))) == {200}


# Whatever answers without an end. ----------------------------------------------------------------


@pytest.mark.gunicorn
@pytest.mark.parametrize("fault", [*ENDLESS, "bomb"])
def test_endless_answers_hold_up_nobody_and_take_no_memory(start, segment, fault):
    relay = start(segment)
    assert set(statuses(relay.post_all([make_event(f"warm-{number}") for number in range(16)]))) == {200}
    before = {pid: megabytes(pid) for pid in relay.workers()}
    segment.faults.extend([fault] * 16)
    with ThreadPoolExecutor(8) as pool:
        attacked = [pool.submit(relay.post, make_event(f"attacked-{number}")) for number in range(8)]
        until(lambda: any(request["fault"] == fault for request in segment.requests))
        honest = [relay.post(make_event(f"honest-{number}")) for number in range(20)]
        answers = [job.result() for job in attacked]
    assert all(answer.seconds < IN_TIME for answer in [*honest, *answers])
    segment.faults.clear()
    assert set(statuses(relay.post_all([make_event(f"after-{number}") for number in range(64)]))) == {200}
    after = {pid: megabytes(pid) for pid in relay.workers()}
    assert set(after) == set(before)  # none was stuck, and replaced
    assert all(after[pid] < before[pid] + 20 for pid in before)
    with contextlib.suppress(requests.RequestException):
        assert requests.get(relay.url + "/health", timeout=4).status_code == 200


@pytest.mark.gunicorn
def test_an_endless_answer_gives_turns_to_others(start, segment):
    """Two webhooks whose uploads never end, beside honest ones of the same worker, which wait for Segment meanwhile."""
    relay = start(segment, WEB_CONCURRENCY="1")
    segment.latency = 0.05
    stop = threading.Event()

    def attack():
        while not stop.is_set():
            segment.faults.append("endless-chunks")
            relay.post(make_event("attacked"))

    with ThreadPoolExecutor(2) as pool:
        attackers = [pool.submit(attack) for _ in range(2)]
        try:
            answers = [relay.post(make_event(number)) for number in range(30)]
        finally:
            stop.set()
        for attacker in attackers:
            attacker.result()
    assert all(answer.seconds < IN_TIME for answer in answers)


HELLO_REQUESTS = b"\x16\x03\x03\x40\x00" + bytes(16_384)  # a TLS record with 4,096 of them, which clients ignore


@pytest.fixture
def greeter():
    """The address of a server whose TLS handshake neither ends nor pauses."""

    def greet(connection):
        end = time.monotonic() + 20
        with connection, contextlib.suppress(OSError):
            while time.monotonic() < end:
                connection.sendall(HELLO_REQUESTS * 100)

    def accept():
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=greet, args=server.accept()[:1], daemon=True).start()

    with socket.create_server(("127.0.0.1", 0), backlog=128) as server:
        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        yield f"https://127.0.0.1:{server.getsockname()[1]}"
        server.shutdown(socket.SHUT_RDWR)
        thread.join(10)


@pytest.mark.gunicorn
def test_an_endless_handshake_holds_up_nobody(start, greeter):
    relay = start(None, SEGMENT_HOST=greeter)
    workers = set(relay.workers())
    for count in (64, 1):
        answers = relay.post_all([make_event(number) for number in range(count)])
        assert {(answer.status_code, answer.json()["reason"]) for answer in answers} == {(503, NOT_SEGMENT)}
    assert set(relay.workers()) == workers  # none was stuck, and replaced


def test_an_endless_handshake_ends_in_the_commands_too(greeter):
    with pytest.raises(RetryLater, match="what answered is not Segment"):
        SegmentClient(WRITE_KEY, greeter).upload([MESSAGE], 5)
