"""Puts load on a competitor that has a Segment of its own, and returns what came of it."""

import contextlib
import json
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from competitors import HERE, Competitor
from fake_customerio import sign
from harness import KEYS, ROOT, SIGNING_KEY, Relay, answers, free_port, until

SECONDS = int(os.environ.get("SECONDS") or 3)  # of each measurement
OFFERED = 1000  # webhooks a second
EVENTS = 15_000 * SECONDS  # more than any machine has taken so far; beyond that wrk starts over
WARM_UP = 64  # connections; not more, or those to Segment would stay open
KILLED_AT = 400  # connections
LATENCY = 50  # ms, of Segment
NO_LIMIT = 1_000_000  # uploads at once

Row = dict[str, float]


class Server:
    """A competitor with a Segment of its own."""

    def __init__(self, relay: Relay, segment_url: str, events: Path) -> None:
        self.relay, self.segment_url, self.events = relay, segment_url, events

    def counted(self, settings: str = "") -> dict[str, int]:
        """Return what Segment counted since the last call; give it new `settings`, if any."""
        with urllib.request.urlopen(f"{self.segment_url}/{settings}", timeout=5) as answer:
            counts: dict[str, int] = json.loads(answer.read())
        return counts

    def start_wrk(self, connections: int, seconds: int = SECONDS) -> "subprocess.Popen[str]":
        command = ["wrk", "-t1", f"-c{connections}", f"-d{seconds}", "--timeout", "5", "-s", str(HERE / "webhooks.lua")]
        return subprocess.Popen([*command, self.relay.url, "--", str(self.events)], stdout=subprocess.PIPE, text=True)

    def load(self, connections: int) -> Row:
        """Keep `connections` busy for SECONDS: each sends its next webhook when the last one is answered."""
        self.counted()
        cpu = self.relay.cpu()
        acknowledged, seconds, row = result(self.start_wrk(connections))
        cpu = self.relay.cpu() - cpu
        time.sleep(0.3 + row["p99"] / 1000)  # for what was in flight at the end
        counts = self.counted()
        # On average each connection was halfway through a request when the time was over.
        row["rate"] = (acknowledged + connections / 2) / seconds if acknowledged else 0
        row["cpu"] = cpu / max(1, acknowledged) * 1e6
        row["per upload"] = counts["messages"] / max(1, counts["uploads"])
        row["missing"] = missing(acknowledged, counts["events"])
        return row

    def offer(self) -> Row:
        """Send OFFERED webhooks a second, whether or not they are answered."""
        self.counted()
        cpu = self.relay.cpu()
        arguments = [str(self.relay.port), str(self.events), str(OFFERED), str(SECONDS)]
        row: Row = json.loads(
            subprocess.run([sys.executable, HERE / "offered.py", *arguments], stdout=subprocess.PIPE, check=True).stdout
        )
        counts = self.counted()
        row["cores"] = (self.relay.cpu() - cpu) / SECONDS
        row["missing"] = missing(int(row["acknowledged"]), counts["events"])
        return row | {key: counts[key] for key in ("uploads", "at once", "sockets")}

    def offer_slow(self, latency: int, at_once: int) -> Row:
        """The same, with a Segment that takes `latency` ms, and at most so many uploads at once."""
        self.counted(f"{latency}/{at_once}")
        try:
            return self.offer()
        finally:
            time.sleep(1)  # a relay may have paused
            self.counted(f"{LATENCY}/{NO_LIMIT}")

    def kill_under_load(self) -> Row:
        """Kill all of it with SIGKILL under load; return the memory it had, and the events acknowledged but lost."""
        self.counted()
        wrk = self.start_wrk(KILLED_AT, 2)
        time.sleep(1.5)
        memory = self.relay.memory()
        self.relay.kill()
        acknowledged, _, _ = result(wrk)
        return {"memory": memory, "lost": missing(acknowledged, self.counted()["events"])}


def missing(acknowledged: int, kept: int) -> int:
    """Return how many acknowledged events Segment doesn't have. After EVENTS, wrk sends the same ones again."""
    return max(0, min(acknowledged, EVENTS) - kept)


def result(wrk: "subprocess.Popen[str]") -> tuple[int, float, Row]:
    """Wait for wrk; return the number of acknowledged webhooks, the seconds it took, and what else it measured."""
    printed, _ = wrk.communicate()
    numbers = printed.split("RESULT ")[1].split("\n")[0].split()
    requests, microseconds, refused, broken, p50, p99 = map(int, numbers)
    row: Row = {"p50": p50 / 1000, "p99": p99 / 1000, "refused": refused + broken}
    return requests - refused, microseconds / 1e6, row


@contextlib.contextmanager
def serving(competitor: Competitor, events: Path) -> Iterator[Server]:
    """Start a competitor and its Segment, and warm it up."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    env = {"SEGMENT_HOST": url, "WEB_CONCURRENCY": "2", "LOG_LEVEL": "critical", "PYTHONPATH": str(HERE)}
    env["NODE_RED_FOLDER"] = str(events.parent)
    with subprocess.Popen([sys.executable, HERE / "counting_segment.py", str(port), str(LATENCY)]) as segment:
        try:
            until(lambda: answers(url))
            with Relay(KEYS | env, **competitor.options) as relay:
                server = Server(relay, url, events)
                server.start_wrk(WARM_UP, 2).communicate()
                time.sleep(1)
                yield server
        finally:
            segment.terminate()


def write_events(path: Path) -> None:
    """Write signed webhooks, each with an id of its own, one a line."""
    legacy = json.loads((ROOT / "tests/events/legacy.json").read_text())
    with path.open("w") as lines:
        for position in range(EVENTS):
            body = json.dumps(legacy | {"event_id": f"event-{position}"})
            headers = sign(body.encode(), SIGNING_KEY)
            lines.write(f"{headers['X-CIO-Timestamp']} {headers['X-CIO-Signature']} {body}\n")
