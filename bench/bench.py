"""The relay beside bare Flask and beside what else one would write, measured in turns (`make bench`).

Each competitor runs under gunicorn with this repository's gunicorn.conf.py, two workers; wrk (Debian's
package of that name) keeps connections open and sends signed webhooks as fast as they are answered;
Segment is a process that answers after 50 ms. Three rounds, medians. Writes bench/RESULTS.md and
bench/latency.svg.
"""

import contextlib
import json
import math
import os
import platform
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parent
sys.path.insert(0, str(ROOT / "proof"))
from fake_customerio import sign  # noqa: E402 - found only now

SECONDS = int(os.environ.get("SECONDS") or 4)
ROUNDS = int(os.environ.get("ROUNDS") or 3)
LATENCY = 50  # ms, of Segment
SIGNING_KEY = "a-signing-key-of-the-bench"
WORKERS = 2
COMPARED_AT = 400  # connections
RELAY_AT = [1, 16, 64, 128, 256, 400, 512, 1024, 2048]
COMPETITORS = {
    "bare": ["bare:app"],
    "relay": ["app:app"],
    "one call each": ["one_call_each:app"],
    "fire and forget": ["fire_and_forget:app"],
}
# What a flow that waits for Segment, wired by hand in Node-RED, takes at 512 connections, as a
# part of what bare Flask does there under two threaded workers: 2,840 of 3,500 a second.
BEAT_AT, BEAT = 512, 2840 / 3500
THREADED = ["bare:app", "--worker-class", "gthread", "--threads", "32"]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def fetch(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=5) as answer:
        return bytes(answer.read())


def until_up(url: str) -> None:
    for _ in range(200):
        with contextlib.suppress(urllib.error.HTTPError, OSError):
            fetch(url)
            return
        with (
            contextlib.suppress(OSError),
            socket.create_connection(("127.0.0.1", int(url.split(":")[2].split("/")[0]))),
        ):
            return
        time.sleep(0.05)
    raise SystemExit(f"{url} does not come up")


def write_events(path: Path, number: int, run: str) -> None:
    """Write signed webhooks, no two of the same id, a line each."""
    legacy = json.loads((ROOT / "tests/events/legacy.json").read_text())
    with path.open("w") as lines:
        for position in range(number):
            body = json.dumps(legacy | {"event_id": f"{run}-{position}"})
            headers = sign(body.encode(), SIGNING_KEY)
            lines.write(f"{headers['X-CIO-Timestamp']} {headers['X-CIO-Signature']} {body}\n")


class Server:
    """A competitor under gunicorn, with a Segment of its own."""

    def __init__(self, command: list[str]) -> None:
        self.port, segment_port = free_port(), free_port()
        self.segment_url = f"http://127.0.0.1:{segment_port}"
        self.segment = subprocess.Popen([sys.executable, HERE / "counting_segment.py", str(segment_port), str(LATENCY)])
        env = {
            "PATH": os.environ["PATH"],
            "PORT": str(self.port),
            "SEGMENT_WRITE_KEY": "0123456789abcdefghijklmnopqrstuv",
            "CUSTOMERIO_SIGNING_KEY": SIGNING_KEY,
            "SEGMENT_HOST": self.segment_url,
            "WEB_CONCURRENCY": str(WORKERS),
            "LOG_LEVEL": "critical",
        }
        gunicorn = Path(sys.executable).parent / "gunicorn"
        self.process = subprocess.Popen([gunicorn, "--pythonpath", HERE, *command], cwd=ROOT, env=env)
        try:
            until_up(self.segment_url)
            until_up(f"http://127.0.0.1:{self.port}/health")
        except BaseException:
            self.stop()  # nobody else could
            raise
        time.sleep(0.7)  # the other worker

    def pids(self) -> list[int]:
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        return [self.process.pid, *map(int, children.split())]

    def cpu(self) -> float:
        """Return the seconds of processor that gunicorn and its workers have used."""
        ticks = 0
        for pid in self.pids():
            fields = Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1].split()
            ticks += int(fields[11]) + int(fields[12])
        return ticks / os.sysconf("SC_CLK_TCK")

    def memory(self) -> float:
        """Return the proportional set size of the whole service, in MB."""
        rollups = [Path(f"/proc/{pid}/smaps_rollup").read_text() for pid in self.pids()]
        return sum(int(text.split("Pss:")[1].split()[0]) for text in rollups) / 1024

    def counted(self) -> dict[str, int]:
        counts: dict[str, int] = json.loads(fetch(self.segment_url))
        return counts

    def kill(self) -> None:
        for pid in reversed(self.pids()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()

    def stop(self) -> None:
        if self.process.poll() is None:
            self.kill()
        self.segment.terminate()
        self.segment.wait()


@contextlib.contextmanager
def serving(command: list[str]) -> Iterator[Server]:
    server = Server(command)
    try:
        yield server
    finally:
        server.stop()


def load(server: Server, connections: int, events: Path) -> dict[str, float]:
    """Send webhooks over so many connections; return what was measured."""
    cpu, before = server.cpu(), server.counted()
    command = ["wrk", "-t1", f"-c{connections}", f"-d{SECONDS}", "--timeout", "5", "-s", str(HERE / "webhooks.lua")]
    printed = subprocess.run(
        [*command, f"http://127.0.0.1:{server.port}", "--", str(events)], capture_output=True, text=True, check=True
    ).stdout
    requests, microseconds, refused, broken, p50, p99 = map(int, printed.split("RESULT ")[1].split("\n")[0].split())
    cpu, after = server.cpu() - cpu, server.counted()
    uploads = after["uploads"] - before["uploads"]
    acknowledged = requests - refused
    return {
        "rate": acknowledged / (microseconds / 1e6),
        "p50": p50 / 1000,
        "p99": p99 / 1000,
        "cpu": cpu / max(1, acknowledged) * 1e6,
        "per upload": (after["events"] - before["events"]) / uploads if uploads else 0,
        "refused": refused + broken,
        "acknowledged": acknowledged,
        "kept": after["events"] - before["events"],
        "memory": server.memory(),
    }


def lost_to_a_kill(name: str, events: Path) -> int:
    """Return how many acknowledged events never reach Segment when all is killed in the middle."""
    with serving(COMPETITORS[name]) as server:
        measured = load(server, 64, events)
        server.kill()
        time.sleep(1)
        lost = int(measured["acknowledged"]) - server.counted()["events"]
    return max(0, lost)


def median(runs: list[dict[str, float]]) -> dict[str, float]:
    return {key: statistics.median(run[key] for run in runs) for key in runs[0]}


def measure() -> tuple[dict[str, Any], dict[int, Any], dict[int, Any], dict[str, Any], dict[str, int]]:
    compared: dict[str, list[Any]] = {name: [] for name in COMPETITORS}
    relay: dict[int, list[Any]] = {connections: [] for connections in RELAY_AT}
    bare: dict[int, list[Any]] = {connections: [] for connections in RELAY_AT}
    threaded: list[Any] = []
    with tempfile.TemporaryDirectory() as folder:
        events = Path(folder) / "events"

        def warm(server: Server) -> None:
            write_events(events, 8_000 * SECONDS, "warm")
            load(server, COMPARED_AT, events)

        for turn in range(ROUNDS):
            for name, command in COMPETITORS.items():
                print(f"round {turn + 1}: {name}", flush=True)
                with serving(command) as server:
                    warm(server)
                    write_events(events, 8_000 * SECONDS, f"{turn}{name[0]}")
                    compared[name].append(load(server, COMPARED_AT, events))
            print(f"round {turn + 1}: by load", flush=True)
            for runs, name in ((relay, "relay"), (bare, "bare")):
                with serving(COMPETITORS[name]) as server:
                    warm(server)
                    for connections in RELAY_AT:
                        write_events(events, 8_000 * SECONDS, f"{turn}{name[0]}{connections}")
                        runs[connections].append(load(server, connections, events))
            with serving(THREADED) as server:
                warm(server)
                write_events(events, 8_000 * SECONDS, "t")
                threaded.append(load(server, BEAT_AT, events))
        write_events(events, 8_000 * SECONDS, "kill")
        lost = {name: lost_to_a_kill(name, events) for name in COMPETITORS if name != "bare"}
    at = {name: median(runs) for name, runs in compared.items()}
    for measured in relay.values():
        for run in measured:
            if run["kept"] < run["acknowledged"]:
                raise SystemExit(f"{run['acknowledged'] - run['kept']} webhooks got a 200, and Segment has them not.")
    return at, {c: median(r) for c, r in relay.items()}, {c: median(r) for c, r in bare.items()}, median(threaded), lost


def report(
    compared: dict[str, Any],
    relay: dict[int, Any],
    bare: dict[int, Any],
    threaded: dict[str, Any],
    lost: dict[str, int],
) -> str:
    ours, ceiling, others = compared["relay"], compared["bare"], compared["one call each"]
    best = max(row["rate"] for row in relay.values())
    most = 64 / (LATENCY / 1000)
    cpu = next(
        (line.split(": ")[1] for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line), "?"
    )
    lines = [
        f"On {os.cpu_count()} cores ({cpu}), Python {platform.python_version()}, wrk and Segment ({LATENCY} ms) on the same "
        f"cores; {WORKERS} workers; medians of {ROUNDS} rounds of {SECONDS} s, in turns.",
        "",
        "| To reach | Goal | Measured |",
        "| --- | --- | --- |",
        f"| 400 connections: acknowledged, of bare Flask's | 0.80 | {ours['rate'] / ceiling['rate']:.2f} |",
        f"| 64 connections: of what a wait for Segment allows ({most:,.0f}/s) | 0.88 | {relay[64]['rate'] / most:.2f} |",
        f"| {BEAT_AT} connections: acknowledged, of bare Flask's under two threaded workers | {BEAT:.2f} "
        f"| {relay[BEAT_AT]['rate'] / threaded['rate']:.2f} |",
        f"| {BEAT_AT} connections: p99 | 3.5 s | {relay[BEAT_AT]['p99'] / 1000:.2f} s |",
        f"| {RELAY_AT[-1]:,} connections: acknowledged, of the most at any load | no collapse "
        f"| {relay[RELAY_AT[-1]]['rate'] / best:.2f} |",
        f"| 16 connections: p50, in latencies of Segment | 1.2 | {relay[16]['p50'] / LATENCY:.2f} |",
        f"| 16 connections: p99, in latencies of Segment | 2 | {relay[16]['p99'] / LATENCY:.2f} |",
        f"| 1 connection: p50 above Segment's | 5 ms | {relay[1]['p50'] - LATENCY:.1f} ms |",
        f"| CPU an event, of bare Flask's | 1.25 | {ours['cpu'] / ceiling['cpu']:.2f} |",
        f"| CPU an event, of one call each | 0.33 | {ours['cpu'] / others['cpu']:.2f} |",
        f"| Memory of the whole service | 120 MB | {ours['memory']:.0f} MB |",
        "",
        f"Every webhook that got its 200 was at Segment. {COMPARED_AT} connections, side by side:",
        "",
        "| | acknowledged/s | p50 | p99 | CPU µs an event | events an upload | memory MB | refused | "
        "acknowledged but lost to a SIGKILL |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, row in compared.items():
        gone = "all of them" if name == "bare" else f"{lost[name]:,}"
        lines.append(
            f"| {name} | {row['rate']:,.0f} | {row['p50']:.0f} ms | {row['p99']:.0f} ms | {row['cpu']:.0f} "
            f"| {row['per upload']:.1f} | {row['memory']:.0f} | {row['refused']:.0f} | {gone} |"
        )
    lines += ["", "The relay, by load:", "", "| connections | " + " | ".join(map(str, RELAY_AT)) + " |"]
    lines.append("| --- |" + " ---: |" * len(RELAY_AT))
    for title, key, form in (
        ("acknowledged/s", "rate", "{:,.0f}"),
        ("p50 ms", "p50", "{:.0f}"),
        ("p99 ms", "p99", "{:.0f}"),
        ("events an upload", "per upload", "{:.1f}"),
        ("refused", "refused", "{:.0f}"),
    ):
        lines.append(f"| {title} | " + " | ".join(form.format(relay[c][key]) for c in RELAY_AT) + " |")
    lines.append("| bare: p99 ms | " + " | ".join(f"{bare[c]['p99']:.0f}" for c in RELAY_AT) + " |")
    lines.append("| bare: acknowledged/s | " + " | ".join(f"{bare[c]['rate']:,.0f}" for c in RELAY_AT) + " |")
    return "\n".join(lines)


def picture(relay: dict[int, Any], bare: dict[int, Any]) -> str:
    """Return an SVG of latency against load."""
    width, height, left, bottom, top = 720, 360, 60, 310, 40
    most = max(row["p99"] for row in (*relay.values(), *bare.values()))

    def x(index: int) -> float:
        return left + index * (width - left - 110) / (len(RELAY_AT) - 1)

    def y(ms: float) -> float:
        # Logarithmic: from 1 ms to the slowest.
        span = max(1.0, len(str(int(most))))
        return bottom - (bottom - top) * max(0.0, math.log10(max(ms, 1))) / span

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="-20 0 {width + 20} {height}" font-family="system-ui, sans-serif" '
        'font-size="12" role="img" aria-label="Latency against the number of connections">',
        f'<rect x="-20" width="{width + 20}" height="{height}" fill="#ffffff"/>',
        '<text x="60" y="22" font-size="14" fill="#1a1d21">Time to answer, by open connections </text>',
    ]
    for ms in (1, 10, 50, 100, 1000, 10_000):
        if y(ms) >= top - 1:
            dash = ' stroke-dasharray="4 3"' if ms == LATENCY else ""
            label = "Segment 50 ms" if ms == LATENCY else f"{ms:,} ms"
            parts.append(
                f'<line x1="{left}" x2="{width - 110}" y1="{y(ms):.1f}" y2="{y(ms):.1f}" stroke="#d5d9de"{dash}/>'
            )
            anchor = (width - 104, "start") if ms == LATENCY else (left - 6, "end")
            parts.append(
                f'<text x="{anchor[0]}" y="{y(ms) + 4:.1f}" text-anchor="{anchor[1]}" fill="#5b636d">{label}</text>'
            )
    for index, connections in enumerate(RELAY_AT):
        parts.append(
            f'<text x="{x(index):.1f}" y="{bottom + 20}" text-anchor="middle" fill="#5b636d">{connections}</text>'
        )
    parts.append(f'<text x="{left}" y="{bottom + 40}" fill="#5b636d">connections</text>')
    curves = [
        (relay, "p50", "#0b6e4f", "", "relay p50"),
        (relay, "p99", "#0b6e4f", "5 4", "relay p99"),
        (bare, "p50", "#b3541e", "", "bare Flask p50"),
        (bare, "p99", "#b3541e", "5 4", "bare Flask p99"),
    ]
    for number, (rows, key, colour, dash, label) in enumerate(curves):
        points = " ".join(f"{x(index):.1f},{y(rows[c][key]):.1f}" for index, c in enumerate(RELAY_AT))
        parts.append(
            f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2" stroke-dasharray="{dash}"/>'
        )
        above = left + 110 + number * 130
        parts.append(
            f'<line x1="{above}" x2="{above + 24}" y1="{bottom + 36}" y2="{bottom + 36}" stroke="{colour}" '
            f'stroke-width="2" stroke-dasharray="{dash}"/>'
        )
        parts.append(f'<text x="{above + 30}" y="{bottom + 40}" fill="#1a1d21">{label}</text>')
    return "\n".join([*parts, "</svg>\n"])


def main() -> None:
    if not shutil.which("wrk"):
        raise SystemExit("The load comes from wrk: apt-get install wrk (Debian, Ubuntu), or brew install wrk.")
    compared, relay, bare, threaded, lost = measure()
    text = report(compared, relay, bare, threaded, lost)
    (HERE / "RESULTS.md").write_text("# What `make bench` measured\n\n" + text + "\n")
    (HERE / "latency.svg").write_text(picture(relay, bare))
    print("\n" + text)


if __name__ == "__main__":
    main()
