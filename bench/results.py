"""What is measured of each competitor, in which order, and the figures that come of it."""

import contextlib
import math
import os
import statistics
import tempfile
from collections import defaultdict
from pathlib import Path

import competitors
from measure import NO_LIMIT, Row, serving, write_events

ROUNDS = int(os.environ.get("ROUNDS") or 3)
LOADS = [1, 16, 64, 256, 512, 1024]  # connections
COMPARED_AT = 512  # connections
# A slow Segment: case -> ms, uploads at once.
SLOW = {"slow": (500, NO_LIMIT), "slow and limited": (500, 100)}


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
