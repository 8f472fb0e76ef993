"""Measure the relay beside bare Flask, Node-RED and what else one would write (`make bench`).

Needs wrk (`apt-get install wrk`). Node-RED takes part if `node-red` is on the PATH, or NODE_RED names
its red.js; OTHER names another checkout of the relay to measure beside this one, and APP its
application. SECONDS is for each measurement, ROUNDS how often they are all repeated. Writes
docs/performance.md and docs/latency.svg.
"""

import contextlib
import json
import math
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import urllib.request
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parent
sys.path.insert(0, str(ROOT / "proof"))
from fake_customerio import sign  # noqa: E402 - needs the path
from harness import APP, KEYS, SIGNING_KEY, Relay, answers, free_port, until  # noqa: E402

SECONDS = int(os.environ.get("SECONDS") or 3)
ROUNDS = int(os.environ.get("ROUNDS") or 3)
LATENCY = 50  # ms, of Segment
LOADS = [1, 16, 64, 128, 256, 400, 512, 1024, 2048]  # connections
COMPARED_AT = 400  # connections
OFFERED = 1000  # webhooks a second
EVENTS = 15_000 * SECONDS  # more than any machine has taken so far; beyond that wrk starts over

Row = dict[str, float]

# Columns of the tables: title -> key of a Row, decimal places.
CLOSED = {
    "acknowledged/s": ("rate", 0),
    "p50, ms": ("p50", 0),
    "p99, ms": ("p99", 0),
    "CPU µs an event": ("cpu", 0),
    "events an upload": ("per upload", 1),
    "refused": ("refused", 0),
}
OPEN = {"p50, ms": ("p50", 1), "p99, ms": ("p99", 1), "cores": ("cores", 2), "refused": ("refused", 0)}
COLOURS = {"relay": "#0b6e4f", "bare Flask": "#b3541e"}

# name -> options of Relay
COMPETITORS: dict[str, dict[str, Any]] = {
    "relay": {"command": [APP]},
    "bare Flask": {"command": ["others:bare()"]},
    "one call each": {"command": ["others:with_client(sync_mode=True)"]},
    "fire and forget": {"command": ["others:with_client(max_queue_size=1_000_000)"]},
}
NODE_RED = ["node", os.environ["NODE_RED"]] if os.environ.get("NODE_RED") else [shutil.which("node-red") or ""]
if NODE_RED[-1]:
    flow = ["--settings", str(HERE / "node-red-settings.js"), str(HERE / "node-red-flow.json")]
    COMPETITORS["Node-RED"] = {"program": NODE_RED, "command": flow}
if other := os.environ.get("OTHER"):
    COMPETITORS["other"] = {"command": [os.environ.get("APP") or APP], "folder": Path(other)}
# These run side by side and are measured in turns at every load.
BY_LOAD = [name for name in COMPETITORS if name not in ("one call each", "fire and forget")]


class Server:
    """A competitor with a Segment of its own."""

    def __init__(self, relay: Relay, segment_url: str) -> None:
        self.relay, self.segment_url = relay, segment_url

    def counted(self) -> dict[str, int]:
        """Return how many uploads, messages and different events reached Segment since the last call."""
        with urllib.request.urlopen(self.segment_url, timeout=5) as answer:
            counts: dict[str, int] = json.loads(answer.read())
        return counts

    def start_wrk(self, connections: int, events: Path, seconds: int = SECONDS) -> "subprocess.Popen[str]":
        command = ["wrk", "-t1", f"-c{connections}", f"-d{seconds}", "--timeout", "5", "-s", str(HERE / "webhooks.lua")]
        return subprocess.Popen([*command, self.relay.url, "--", str(events)], stdout=subprocess.PIPE, text=True)

    def load(self, connections: int, events: Path) -> Row:
        """Keep `connections` busy for SECONDS: each sends its next webhook when the last one is answered."""
        self.counted()
        cpu = self.relay.cpu()
        acknowledged, seconds, row = result(self.start_wrk(connections, events))
        cpu = self.relay.cpu() - cpu
        time.sleep(0.3 + row["p99"] / 1000)  # for what was in flight at the end
        counts = self.counted()
        # On average each connection was halfway through a request when the time was over.
        row["rate"] = (acknowledged + connections / 2) / seconds if acknowledged else 0
        row["cpu"] = cpu / max(1, acknowledged) * 1e6
        row["per upload"] = counts["messages"] / max(1, counts["uploads"])
        row["missing"] = self.missing(acknowledged, counts["events"])
        return row

    def offer(self, events: Path) -> Row:
        """Send OFFERED webhooks a second, whether or not they are answered."""
        cpu = self.relay.cpu()
        arguments = [str(self.relay.port), str(events), str(OFFERED), str(SECONDS)]
        row: Row = json.loads(
            subprocess.run([sys.executable, HERE / "offered.py", *arguments], stdout=subprocess.PIPE, check=True).stdout
        )
        return row | {"cores": (self.relay.cpu() - cpu) / SECONDS}

    def kill_under_load(self, events: Path) -> Row:
        """Kill all of it with SIGKILL under load; return the memory it had, and the events acknowledged but lost."""
        self.counted()
        wrk = self.start_wrk(COMPARED_AT, events, 2)
        time.sleep(1.5)
        memory = self.relay.memory()
        self.relay.kill()
        acknowledged, _, _ = result(wrk)
        return {"memory": memory, "lost": self.missing(acknowledged, self.counted()["events"])}

    def missing(self, acknowledged: int, kept: int) -> int:
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
def serving(name: str, folder: Path) -> Iterator[Server]:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    env = {"SEGMENT_HOST": url, "WEB_CONCURRENCY": "2", "LOG_LEVEL": "critical", "PYTHONPATH": str(HERE)}
    env["NODE_RED_FOLDER"] = str(folder)
    with subprocess.Popen([sys.executable, HERE / "counting_segment.py", str(port), str(LATENCY)]) as segment:
        try:
            until(lambda: answers(url))
            with Relay(KEYS | env, **COMPETITORS[name]) as relay:
                server = Server(relay, url)
                server.start_wrk(COMPARED_AT, folder / "events", 2).communicate()  # to warm up
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


class Results:
    """The rows of all rounds, by competitor and by what was measured: a load, "alone", "killed" or "offered"."""

    def __init__(self) -> None:
        self.rows: dict[tuple[str, int | str], list[Row]] = defaultdict(list)

    def measure(self) -> None:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            events = folder / "events"
            write_events(events)
            for turn in range(ROUNDS):
                print(f"Round {turn + 1} of {ROUNDS}", flush=True)
                for name in COMPETITORS:
                    with serving(name, folder) as server:
                        self.rows[name, "alone"].append(server.load(COMPARED_AT, events))
                        self.rows[name, "killed"].append(server.kill_under_load(events))
                with contextlib.ExitStack() as stack:
                    servers = {name: stack.enter_context(serving(name, folder)) for name in BY_LOAD}
                    for connections in LOADS:
                        for name, server in servers.items():
                            self.rows[name, connections].append(server.load(connections, events))
                    for name, server in servers.items():
                        self.rows[name, "offered"].append(server.offer(events))

    def get(self, name: str, what: int | str, key: str) -> float:
        """Return the median over the rounds, or NaN if it was never measured."""
        return statistics.median([row[key] for row in self.rows[name, what]] or [math.nan])

    def ratio(self, connections: int, name: str, at: int) -> float:
        """Return the relay's rate at `connections` relative to another's `at` so many, the median over the rounds."""
        rounds = zip(self.rows["relay", connections], self.rows[name, at], strict=False)
        return statistics.median([ours["rate"] / (theirs["rate"] or math.nan) for ours, theirs in rounds] or [math.nan])

    def missing(self) -> float:
        return sum(row.get("missing", 0) for (name, _), rows in self.rows.items() if name == "relay" for row in rows)


def goals(results: Results) -> list[tuple[str, str, float, float, str]]:
    """Return what to reach: what, "≥" or "≤", the goal, what was measured, and how both are written."""
    get = results.get
    most = 64 / (LATENCY / 1000)
    if "Node-RED" in COMPETITORS:
        against = ("512 connections: rate, of Node-RED's", "≥", 1.3, results.ratio(512, "Node-RED", 512), ".2f")
    else:
        ratio = results.ratio(512, "bare Flask", 400)
        against = ("512 connections: rate, of bare Flask's at 400", "≥", 0.342, ratio, ".3f")
    of_bare = results.ratio(400, "bare Flask", 400)
    share = get("relay", 64, "rate") / most
    return [
        (f"64 connections: rate, of the {most:,.0f}/s that waiting for Segment allows", "≥", 0.88, share, ".2f"),
        against,
        ("512 connections: p99, in seconds", "≤", 0.5, get("relay", 512, "p99") / 1000, ".2f"),
        (
            f"{OFFERED:,}/s offered: p50, of Segment's latency",
            "≤",
            1.12,
            get("relay", "offered", "p50") / LATENCY,
            ".2f",
        ),
        (
            f"{OFFERED:,}/s offered: p99, of Segment's latency",
            "≤",
            1.4,
            get("relay", "offered", "p99") / LATENCY,
            ".2f",
        ),
        (f"{OFFERED:,}/s offered: cores in use", "≤", 0.9, get("relay", "offered", "cores"), ".2f"),
        ("16 connections: p50, of Segment's latency", "≤", 1.08, get("relay", 16, "p50") / LATENCY, ".2f"),
        ("1 connection: p50 above Segment's latency, in ms", "≤", 3, get("relay", 1, "p50") - LATENCY, ".1f"),
        ("400 connections: rate, of bare Flask's (0.60 is the aim)", "≥", 0.5, of_bare, ".2f"),
        ("Memory of the service, in MB", "≤", 110, get("relay", "killed", "memory"), ".0f"),
    ]


def table(titles: list[str], rows: list[list[str]]) -> list[str]:
    """Return a table in Markdown, numbers on the right."""
    cells = [titles, ["---", *["---:"] * (len(titles) - 1)], *rows]
    return [*("| " + " | ".join(row) + " |" for row in cells), ""]


def tables(results: Results) -> list[str]:
    get = results.get
    reached = []
    for what, relation, goal, value, form in goals(results):
        missed = value < goal if relation == "≥" else value > goal
        reached.append([what, f"{relation} {goal:{form}}", f"{value:{form}}" + (" **missed**" if missed else "")])
    compared = []
    for name in COMPETITORS:
        row = [f"{get(name, 'alone', key):,.{digits}f}" for key, digits in CLOSED.values()]
        lost = "all" if name == "bare Flask" else f"{get(name, 'killed', 'lost'):,.0f}"
        compared.append([name, *row, f"{get(name, 'killed', 'memory'):.0f}", lost])
    loads = [
        [f"{name}: {title}", *(f"{get(name, load, key):,.{digits}f}" for load in LOADS)]
        for name in BY_LOAD
        for title, (key, digits) in (CLOSED if name == "relay" else dict(list(CLOSED.items())[:3])).items()
    ]
    offered = [
        [name, *(f"{get(name, 'offered', key):,.{digits}f}" for key, digits in OPEN.values())] for name in BY_LOAD
    ]
    return [
        *table(["To reach", "Goal", "Measured"], reached),
        f"{COMPARED_AT} connections, each competitor alone on the machine:",
        "",
        *table(["", *CLOSED, "memory, MB", "acknowledged but lost to a SIGKILL"], compared),
        f"By load, in turns ({', '.join(BY_LOAD)}):",
        "",
        *table(["connections", *map(str, LOADS)], loads),
        f"{OFFERED:,} webhooks a second, on time, whether or not they are answered:",
        "",
        *table(["", *OPEN], offered),
    ]


def introduction() -> str:
    info = Path("/proc/cpuinfo").read_text().splitlines()
    return (
        (HERE / "introduction.md")
        .read_text()
        .format(
            machine=f"{os.cpu_count()} cores ({next((line.split(': ')[1] for line in info if 'model name' in line), '?')})",
            load=os.getloadavg()[0],
            python=platform.python_version(),
            rounds=ROUNDS,
            seconds=SECONDS,
            latency=LATENCY,
            offered=OFFERED,
            correction=64 / 2 / (SECONDS * 64 / (LATENCY / 1000)),
            without="" if "Node-RED" in COMPETITORS else " It was not installed for this run.",
        )
    )


def picture(results: Results) -> str:
    """Return an SVG of latency against load, on a logarithmic axis."""
    width, height, left, right, bottom, top = 720, 360, 60, 610, 310, 40
    curves = [(name, key, colour) for name, colour in COLOURS.items() for key in ("p50", "p99")]
    decades = math.ceil(math.log10(max(10, *(results.get(name, c, key) for name, key, _ in curves for c in LOADS))))
    parts = []

    def x(index: int) -> float:
        return left + index * (right - left) / (len(LOADS) - 1)

    def y(ms: float) -> float:
        return bottom - (bottom - top) * math.log10(max(ms, 1)) / decades

    def text(x: float, y: float, words: object, anchor: str = "start", colour: str = "#5b636d") -> None:
        parts.append(f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}">{words}</text>')

    def line(points: list[tuple[float, float]], colour: str, dash: str = "") -> None:
        joined = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(f'<polyline points="{joined}" fill="none" stroke="{colour}" stroke-dasharray="{dash}"/>')

    text(left, 22, "Time to answer, by open connections", colour="#1a1d21")
    for decade in range(decades + 1):
        line([(left, y(10**decade)), (right, y(10**decade))], "#d5d9de")
        text(left - 6, y(10**decade) + 4, f"{10**decade:,} ms", "end")
    line([(left, y(LATENCY)), (right, y(LATENCY))], "#5b636d", "4 3")
    text(right + 6, y(LATENCY) + 4, f"Segment {LATENCY} ms")
    for index, connections in enumerate(LOADS):
        text(x(index), bottom + 20, connections, "middle")
    for number, (name, key, colour) in enumerate(curves):
        dash = "5 4" if key == "p99" else ""
        line([(x(index), y(results.get(name, c, key))) for index, c in enumerate(LOADS)], colour, dash)
        start = left + number * 140
        line([(start, bottom + 36), (start + 24, bottom + 36)], colour, dash)
        text(start + 30, bottom + 40, f"{name} {key}", colour="#1a1d21")
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="system-ui, sans-serif" font-size="12">'
    return "\n".join([head, f'<rect width="{width}" height="{height}" fill="#ffffff"/>', *parts, "</svg>\n"])


def main() -> None:
    if not shutil.which("wrk"):
        raise SystemExit("The load comes from wrk: apt-get install wrk (Debian, Ubuntu), or brew install wrk.")
    if "Node-RED" not in COMPETITORS:
        print("Node-RED is left out: npm install -g node-red, or set NODE_RED to its red.js.")
    page = introduction()
    if os.getloadavg()[0] > 0.5:
        print("Something else keeps this machine busy, and will distort the figures.")
    results = Results()
    failed = False
    try:
        results.measure()
    except (Exception, KeyboardInterrupt):  # noqa: BLE001 - what was measured is printed first
        failed = True
        traceback.print_exc()
        print("\nThe bench failed. What it measured until then (nan: nothing), written nowhere:")
    text = "\n".join(tables(results))
    print("\n" + text)
    if missing := results.missing():
        raise SystemExit(f"Segment doesn't have {missing:.0f} of the events that the relay acknowledged.")
    if failed:
        raise SystemExit(1)
    docs = ROOT / "docs"
    docs.mkdir(exist_ok=True)
    (docs / "performance.md").write_text(page + text + "\n![Latency by load](latency.svg)\n")
    (docs / "latency.svg").write_text(picture(results))


if __name__ == "__main__":
    main()
