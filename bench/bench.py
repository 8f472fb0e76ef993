"""Measure the relay beside what one would run instead of it (`make bench`).

Needs wrk (`apt-get install wrk`). Go and Node-RED take part where they are installed; NODE_RED may name
Node-RED's red.js. OTHER names another checkout of the relay to measure beside this one, and APP its
application. SECONDS is for each measurement, ROUNDS how often they are all repeated. Writes
docs/performance.md and docs/latency.svg.
"""

import contextlib
import math
import os
import resource
import shutil
import statistics
import tempfile
import traceback
from collections import defaultdict
from pathlib import Path

import competitors
from measure import LATENCY, Row, serving, write_events
from picture import picture
from report import COMPARED_AT, LOADS, SLOW, introduction, tables, verdict

ROUNDS = int(os.environ.get("ROUNDS") or 3)


class Results:
    """The rows of all rounds, by competitor and by what was measured: a load, "offered", a case of SLOW or "killed"."""

    def __init__(self) -> None:
        self.side_by_side = competitors.present()
        self.competitors = self.side_by_side | competitors.CLIENTS
        self.rows: dict[tuple[str, int | str], list[Row]] = defaultdict(list)

    def measure(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            events = Path(folder, "events")
            write_events(events)
            for turn in range(ROUNDS):
                print(f"Round {turn + 1} of {ROUNDS}", flush=True)
                for name, client in competitors.CLIENTS.items():
                    with serving(client, events) as server:
                        self.rows[name, COMPARED_AT].append(server.load(COMPARED_AT))
                        self.rows[name, "killed"].append(server.kill_under_load())
                self.measure_in_turns(events)

    def measure_in_turns(self, events: Path) -> None:
        """Measure one thing of each competitor, then the next thing: the machine's load varies."""
        with contextlib.ExitStack() as stack:
            servers = {
                name: stack.enter_context(serving(competitor, events)) for name, competitor in self.side_by_side.items()
            }
            for name, server in servers.items():
                self.rows[name, "offered"].append(server.offer())
            for case, (latency, at_once) in SLOW.items():
                for name, server in servers.items():
                    if self.side_by_side[name].waits:
                        self.rows[name, case].append(server.offer_slow(latency, at_once))
            for connections in LOADS:
                for name, server in servers.items():
                    self.rows[name, connections].append(server.load(connections))
            for name, server in servers.items():
                self.rows[name, "killed"].append(server.kill_under_load())

    def get(self, name: str, what: int | str, key: str) -> float:
        """Return the median over the rounds, or NaN if it was never measured."""
        return statistics.median([row[key] for row in self.rows[name, what]] or [math.nan])

    def ratio(self, name: str, what: int | str, key: str) -> float:
        """Return a number of a competitor relative to the relay's, the median over the rounds."""
        rounds = zip(self.rows[name, what], self.rows["relay", what], strict=False)
        return statistics.median([theirs[key] / (ours[key] or math.nan) for theirs, ours in rounds] or [math.nan])

    def missing(self) -> float:
        return sum(row.get("missing", 0) for (name, _), rows in self.rows.items() if name == "relay" for row in rows)


def main() -> None:
    if not shutil.which("wrk"):
        raise SystemExit("The load comes from wrk: apt-get install wrk (Debian, Ubuntu), or brew install wrk.")
    for line in competitors.absent():
        print(line)
    load = os.getloadavg()[0]
    if load > 0.5:
        print("Something else keeps this machine busy, and will distort the figures.")
    # A relay that doesn't share uploads has two sockets for each of wrk's connections.
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    results = Results()
    failed = False
    try:
        results.measure()
    except (Exception, KeyboardInterrupt):  # noqa: BLE001 - what was measured is printed first
        failed = True
        traceback.print_exc()
        print("\nThe bench failed. What it measured until then (nan: nothing), written nowhere:")
    text = "\n".join([verdict(results), introduction(results, ROUNDS, load), *tables(results)])
    print("\n" + text)
    if missing := results.missing():
        raise SystemExit(f"Segment doesn't have {missing:.0f} of the events that the relay acknowledged.")
    if failed:
        raise SystemExit(1)
    docs = competitors.HERE.parent / "docs"
    (docs / "performance.md").write_text(text + "\n![Latency by load](latency.svg)\n")
    (docs / "latency.svg").write_text(picture(LOADS, LATENCY, results.get))


if __name__ == "__main__":
    main()
