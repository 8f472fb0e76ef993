"""What a 200 is worth: only a complete answer to this very upload that says success."""

import contextlib
import socket
import threading

import pytest
from conftest import WRITE_KEY, InProcess, make_event

from relay.message import Message
from relay.outcomes import RetryLater
from relay.segment import SegmentClient

SUCCESS = b'HTTP/1.1 200 OK\r\nContent-Length: 17\r\n\r\n{"success": true}'


class Scripted:
    """A server that plays a script with each connection; `script(connection, how_many_before)`."""

    def __init__(self, script, host="127.0.0.1", port=0):
        self.script = script
        self.connections = 0
        self.server = socket.create_server((host, port))
        self.server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)  # a large upload doesn't fit into it
        self.url = f"http://{host}:{self.server.getsockname()[1]}"
        self.thread = threading.Thread(target=self._serve, daemon=True)
        self.thread.start()

    def _serve(self):
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self.server.accept()
                self.connections += 1
                threading.Thread(target=self._play, args=(connection, self.connections - 1), daemon=True).start()

    def _play(self, connection, number):
        with connection, contextlib.suppress(OSError):
            connection.settimeout(10)
            self.script(connection, number)

    def close(self):
        with contextlib.suppress(OSError):
            self.server.shutdown(socket.SHUT_RDWR)  # or accept() would go on
        self.server.close()
        self.thread.join(10)


@pytest.fixture
def scripted():
    servers = []

    def start(script, **more):
        servers.append(Scripted(script, **more))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


def take(connection):
    """Read a request to its end."""
    data = b""
    while b"\r\n\r\n" not in data:
        data += more(connection)
    head, _, body = data.partition(b"\r\n\r\n")
    length = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
    while len(body) < length:
        body += more(connection)


def more(connection):
    data = connection.recv(65536)
    if not data:
        raise ConnectionError
    return data


def client_of(server):
    return InProcess(None, SEGMENT_HOST=server.url)


@pytest.mark.parametrize("status", ["102 Processing", "103 Early Hints", "199 What"])
def test_a_status_below_200_ends_no_upload_and_its_late_answer_is_for_nobody(scripted, status):
    answered = threading.Event()

    def script(connection, number):
        take(connection)
        connection.sendall(f"HTTP/1.1 {status}\r\n\r\n".encode())
        if number < 2:  # the first webhook's two attempts
            answered.wait(5)
        connection.sendall(SUCCESS)  # the late answer
        take(connection)
        connection.sendall(SUCCESS)

    client = client_of(scripted(script))
    assert client.post(make_event(1)).status_code == 503
    answered.set()
    assert client.post(make_event(2)).status_code == 503


LEFT = {
    "a second answer": SUCCESS,
    "half of one": SUCCESS[:20],
    "an answer that failed": b"HTTP/1.1 500 X\r\nContent-Length: 0\r\n\r\n",
}


@pytest.mark.parametrize("when", ["along with the answer", "after it"])
@pytest.mark.parametrize("left", LEFT.values(), ids=LEFT.keys())
def test_what_is_left_on_a_connection_is_nobodys_answer(scripted, left, when):
    answered, sent = threading.Event(), threading.Event()

    def script(connection, number):
        take(connection)
        if number:
            connection.sendall(b"HTTP/1.1 500 X\r\nContent-Length: 0\r\n\r\n")
        elif when == "after it":
            connection.sendall(SUCCESS)
            assert answered.wait(5)
            connection.sendall(left)
        else:
            connection.sendall(SUCCESS + left)
        sent.set()
        take(connection)

    server = scripted(script)
    client = client_of(server)
    assert client.post(make_event(1)).status_code == 200
    answered.set()
    assert sent.wait(5)
    answer = client.post(make_event(2))
    assert (answer.status_code, answer.json()["reason"]) == (503, "Segment answered 500")
    assert server.connections == 3  # both attempts took a new one


def test_a_success_before_the_upload_was_sent_to_its_end_does_not_count(scripted):
    def script(connection, number):
        connection.recv(1000)
        connection.sendall(SUCCESS)
        connection.shutdown(socket.SHUT_WR)

    segment = SegmentClient(WRITE_KEY, scripted(script).url)
    batch = [Message(str(number), '"' + "x" * 30_000 + '"') for number in range(15)]
    with pytest.raises(RetryLater):
        segment.upload(batch, 3)


ANSWERS = {  # what follows "HTTP/1.1 ". Of whole answers, test_segment_client.py has the table.
    "204": b"204 No Content\r\n\r\n",
    "no content": b"200 OK\r\nContent-Length: 0\r\n\r\n",
    "no content, cut": b"200 OK\r\nContent-Length: 0",
    "cut in the head": b"200 OK\r\nContent-Le",
    "cut in the body": b'200 OK\r\nContent-Length: 17\r\n\r\n{"success": tru',
    "cut after a success": b'200 OK\r\nContent-Length: 18\r\n\r\n{"success": true}',
    "a body without a length, cut": b'200 OK\r\n\r\n{"success": tru',
    "two lengths": b'200 OK\r\nContent-Length: 17\r\nContent-Length: 18\r\n\r\n{"success": true}',
    "two lengths, the other first": b'200 OK\r\nContent-Length: 18\r\nContent-Length: 17\r\n\r\n{"success": true} ',
    "a length below none": b'200 OK\r\nContent-Length: -1\r\n\r\n{"success": true}',
    "a length in other digits": b'200 OK\r\nContent-Length: \xb9\xb3\r\n\r\n{"success": true}',
    "a length of too many digits": b"200 OK\r\nContent-Length: " + b"9" * 5_000 + b'\r\n\r\n{"success": true}',
    "a length behind a blank": b'200 OK\r\nContent-Length : 18\r\n\r\n{"success": true}',
    "a length behind what is no header": b'200 OK\r\nX\r\nContent-Length: 18\r\n\r\n{"success": true}',
    "a length that is no number": b'200 OK\r\nContent-Length: x\r\n\r\n{"success": true}',
    "a negative chunk": b'200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-7\r\n{"success": true}\r\n\r\n0\r\n\r\n',
    "chunks that end early": b'200 OK\r\nTransfer-Encoding: chunked\r\n\r\n11\r\n{"success": true}\r\n',
}


@pytest.mark.parametrize("answer", ANSWERS.values(), ids=ANSWERS.keys())
def test_503_to_whatever_does_not_say_success(scripted, answer):
    def script(connection, number):
        take(connection)
        connection.sendall(b"HTTP/1.1 " + answer)

    assert client_of(scripted(script)).post(make_event()).status_code == 503


SUCCESSES = {
    "as Segment says it": SUCCESS,
    "with a BOM": b'HTTP/1.1 200 OK\r\nContent-Length: 20\r\n\r\n\xef\xbb\xbf{"success": true}',
    "until the connection ends": b'HTTP/1.1 201 Created\r\n\r\n{"success": true}',
    "in chunks": b'HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n11\r\n{"success": true}\r\n0\r\n\r\n',
    "after a 100": b"HTTP/1.1 100 Continue\r\n\r\n" + SUCCESS,
}


@pytest.mark.parametrize("answer", SUCCESSES.values(), ids=SUCCESSES.keys())
def test_200_to_a_success(scripted, answer):
    def script(connection, number):
        take(connection)
        connection.sendall(answer)

    assert client_of(scripted(script)).post(make_event()).status_code == 200


DOUBTFUL = {
    "chunks and a length": b'chunked\r\n\r\n11\r\n{"success": true}\r\n0\r\n\r\n',
    "another encoding and a length": b'xchunked\r\n\r\n{"success": true}',
}


@pytest.mark.parametrize("answer", DOUBTFUL.values(), ids=DOUBTFUL.keys())
def test_a_connection_is_not_used_again_after_an_answer_whose_end_is_in_doubt(scripted, answer):
    def script(connection, number):
        for _ in range(2):
            take(connection)
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 17\r\nTransfer-Encoding: " + answer)

    server = scripted(script)
    client = client_of(server)
    assert [client.post(make_event(number)).status_code for number in range(2)] == [200, 200]
    assert server.connections == 2


def test_the_second_address_is_tried_when_the_first_is_silent(scripted, monkeypatch):
    def script(connection, number):
        take(connection)
        connection.sendall(SUCCESS)

    monkeypatch.setattr("relay.exchange.CONNECT_SECONDS", 0.2)  # long enough on loopback
    segment = scripted(script)
    port = int(segment.url.rsplit(":", 1)[1])
    # A socket that listens with a full backlog answers no further connection: silence, on loopback.
    with socket.socket() as silent, contextlib.ExitStack() as stack:
        silent.bind(("127.0.0.2", port))
        silent.listen(0)
        for _ in range(3):
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(("127.0.0.2", port))
        found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (host, port)) for host in ("127.0.0.2", "127.0.0.1")]
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
        client = InProcess(None, SEGMENT_HOST=f"http://segment.example:{port}")
        answer = client.post(make_event())
    assert answer.status_code == 200
    assert answer.seconds < 3.5
