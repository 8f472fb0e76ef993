"""Measure the relay beside what one would run instead of it (`make bench`).

Needs wrk (`apt-get install wrk`). Go and Node-RED take part where they are installed; NODE_RED may name
Node-RED's red.js. OTHER names another checkout of the relay to measure beside this one, and APP its
application. SECONDS is for each measurement, ROUNDS how often they are all repeated. Writes
docs/performance.md and docs/latency.svg.
"""

import os
import resource
import shutil
import traceback

import competitors
from measure import LATENCY
from picture import picture
from report import introduction, tables, verdict
from results import LOADS, Results


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
    text = "\n".join([verdict(results), introduction(results, load), *tables(results)])
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
