"""Count the instructions that a webhook costs, the relay beside bare Flask (`make bench-count`).

Needs valgrind (`apt-get install valgrind`). A busy machine moves a count by a few percent only.
Both run under the same gunicorn settings: one worker, one connection, one webhook after the other,
and a Segment in another process that answers at once. Each runs for SHORT and for LONG webhooks;
the difference leaves out the start and the end.
"""

import compileall
import http.client
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent
sys.path.insert(0, str(ROOT / "proof"))
from fake_customerio import sign  # noqa: E402 - needs the path
from harness import APP, GUNICORN, KEYS, SIGNING_KEY, Relay, answers, free_port, until  # noqa: E402

SHORT, LONG = 100, int(os.environ.get("WEBHOOKS") or 600)
APPLICATIONS = {"relay": APP, "bare Flask": "others:bare()"}
START = 600  # seconds; under valgrind all takes some forty times as long


def instructions(application: str, webhooks: int) -> int:
    """Return the instructions of a worker that answers so many webhooks, start and end included."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    env = {"SEGMENT_HOST": url, "WEB_CONCURRENCY": "1", "PYTHONPATH": str(HERE), "PYTHONHASHSEED": "0"}
    env["GUNICORN_CMD_ARGS"] = "--timeout 0"  # a worker that starts this slowly isn't stuck
    with (
        tempfile.TemporaryDirectory() as folder,
        subprocess.Popen([sys.executable, HERE / "counting_segment.py", str(port), "0"]) as segment,
    ):
        try:
            until(lambda: answers(url))
            valgrind = ["valgrind", "--tool=callgrind", f"--callgrind-out-file={folder}/%p", sys.executable, GUNICORN]
            with Relay(KEYS | env, [application], program=valgrind, wait=False) as relay:
                until(lambda: answers(relay.url + "/health"), START)
                [worker] = relay.workers()
                send(relay.port, webhooks)
                relay.stop(START)
            return int(re.findall(r"^totals: (\d+)", Path(folder, str(worker)).read_text(), re.MULTILINE)[0])
        finally:
            segment.terminate()


def send(port: int, webhooks: int) -> None:
    """Send so many webhooks over one connection, one after the other."""
    legacy = json.loads((ROOT / "tests/events/legacy.json").read_text())
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        for number in range(webhooks):
            body = json.dumps(legacy | {"event_id": f"event-{number:06}"})
            headers = sign(body.encode(), SIGNING_KEY) | {"Host": "relay", "Content-Length": str(len(body))}
            head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
            # In one piece: http.client sends head and body separately, and when each is read varies.
            connection.sendall(f"POST /webhook HTTP/1.1\r\n{head}\r\n{body}".encode())
            answer = http.client.HTTPResponse(connection)
            answer.begin()
            if answer.status != 200:
                raise SystemExit(f"It answered {answer.status}: {answer.read()!r}")
            answer.read()


def main() -> None:
    if not shutil.which("valgrind"):
        raise SystemExit("The count comes from valgrind: apt-get install valgrind (Debian, Ubuntu).")
    # The first run of a fresh checkout would compile the modules, and count that, too.
    compileall.compile_dir(ROOT, quiet=1, rx=re.compile(r"/\.venv/"))
    counts = {}
    for name, application in APPLICATIONS.items():
        counts[name] = (instructions(application, LONG) - instructions(application, SHORT)) / (LONG - SHORT)
        print(f"{name + ':':12}{counts[name] / 1000:8,.0f} thousand instructions a webhook", flush=True)
    print(f"{'ratio:':12}{counts['relay'] / counts['bare Flask']:8.2f}")


if __name__ == "__main__":
    main()
