"""Writes what was measured as docs/performance.md."""

import os
import platform
import textwrap
from pathlib import Path

from competitors import HERE
from measure import KILLED_AT, LATENCY, OFFERED, SECONDS
from results import COMPARED_AT, LOADS, ROUNDS, Results

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
SLOWLY = {
    "uploads": ("uploads", 0),
    "most uploads at once": ("at once", 0),
    "sockets": ("sockets", 0),
    "p50, ms": ("p50", 0),
    "p99, ms": ("p99", 0),
    "cores": ("cores", 2),
    "refused": ("refused", 0),
}


def verdict(results: Results) -> str:
    """Return the title and the first paragraph: who is faster, by how much, and why one might still want the relay."""
    get = results.get

    others = [name for name, other in results.side_by_side.items() if other.waits and name not in ("relay", "other")]
    rates = {name: results.ratio(name, COMPARED_AT, "rate") for name in others}
    groups = {
        "faster": [name for name in others if rates[name] > 1],
        "slower": [name for name in others if rates[name] <= 1],
    }
    order = [f"{listed(names)} {'is' if len(names) == 1 else 'are'} {how}" for how, names in groups.items() if names]
    sentences = (
        f"Beside this relay, {listed(order)}.",
        f"At {COMPARED_AT} connections it acknowledges {get('relay', COMPARED_AT, 'rate'):,.0f} webhooks a second;",
        listed([f"{name} {rate:.1f} times as many" for name, rate in rates.items()]) + ".",
        f"At {OFFERED:,} a second it keeps {get('relay', 'offered', 'cores'):.2f} cores busy;",
        listed([f"{name} {get(name, 'offered', 'cores'):.2f}" for name in others]) + ".",
        "Segment accepts no more than 1,000 a second from a workspace.",
        "**Why one might still want it:** the others deliver what anybody sends, and one event that Segment rejects",
        "stops their stream for a week (`make thirty` shows it).",
        f"Sharing uploads also spares a slow Segment: 500 ms away, it has at most {get('relay', 'slow', 'at once'):,.0f}",
        "uploads of the relay at once,",
        listed([f"{get(name, 'slow', 'at once'):,.0f} of {name}" for name in others]) + ".",
        f"If it takes only 100 at once, it refuses {get('relay', 'slow and limited', 'refused'):,.0f} of the relay's",
        f"{OFFERED * SECONDS:,} webhooks,",
        listed([f"{get(name, 'slow and limited', 'refused'):,.0f} of {name}'s" for name in others]) + ".",
        f"But sharing means waiting: the median answer then takes {get('relay', 'slow', 'p50'):,.0f} ms,",
        listed([f"{get(name, 'slow', 'p50'):,.0f} ms from {name}" for name in others]) + ".",
    )
    return "# Performance\n\n" + textwrap.fill(" ".join(sentences), 120, break_on_hyphens=False) + "\n"


def listed(words: list[str]) -> str:
    """Return "a, b and c"."""
    return " and ".join(filter(None, [", ".join(words[:-1]), *words[-1:]]))


def introduction(results: Results, load: float) -> str:
    info = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(": ")[1] for line in info if "model name" in line), "?")
    waiting = [f"- *{name}*: {competitor.what}" for name, competitor in results.competitors.items()]
    return (
        (HERE / "introduction.md")
        .read_text()
        .format(
            machine=f"{os.cpu_count()} cores ({cpu})",
            load=load,
            python=platform.python_version(),
            rounds=ROUNDS,
            seconds=SECONDS,
            latency=LATENCY,
            offered=OFFERED,
            most=max(LOADS),
            killed_at=KILLED_AT,
            correction=64 / 2 / (SECONDS * 64 / (LATENCY / 1000)),
            competitors="\n".join(waiting),
        )
    )


def tables(results: Results) -> list[str]:
    get, waiting = results.get, [name for name, other in results.side_by_side.items() if other.waits]
    compared = []
    for name in results.competitors:
        row = [f"{get(name, COMPARED_AT, key):,.{digits}f}" for key, digits in CLOSED.values()]
        lost = "all" if name == "bare Flask" else f"{get(name, 'killed', 'lost'):,.0f}"
        compared.append([name, *row, f"{get(name, 'killed', 'memory'):.0f}", lost])
    loads = [
        [f"{name}: {title}", *(f"{get(name, load, key):,.{digits}f}" for load in LOADS)]
        for name in results.side_by_side
        for title, (key, digits) in (CLOSED if name == "relay" else dict(list(CLOSED.items())[:3])).items()
    ]
    lines = [
        f"{COMPARED_AT} connections:",
        "",
        *table(["", *CLOSED, "memory, MB", "acknowledged but lost to a SIGKILL"], compared),
        "By load:",
        "",
        *table(["connections", *map(str, LOADS)], loads),
        f"{OFFERED:,} webhooks a second, on time, whether or not they are answered:",
        "",
        *table(["", *OPEN], rows(results, list(results.side_by_side), "offered", OPEN)),
    ]
    limited = [f"{get(name, 'slow and limited', 'refused'):,.0f}" for name in waiting]
    slowly = [[*row, refused] for row, refused in zip(rows(results, waiting, "slow", SLOWLY), limited, strict=True)]
    title = f"{OFFERED:,} webhooks a second for {SECONDS} s, Segment 500 ms away:"
    return [*lines, title, "", *table(["", *SLOWLY, "refused, if Segment takes 100 uploads at once"], slowly)]


def rows(results: Results, names: list[str], what: str, columns: dict[str, tuple[str, int]]) -> list[list[str]]:
    return [
        [name, *(f"{results.get(name, what, key):,.{digits}f}" for key, digits in columns.values())] for name in names
    ]


def table(titles: list[str], rows: list[list[str]]) -> list[str]:
    """Return a table in Markdown, numbers on the right."""
    cells = [titles, ["---", *["---:"] * (len(titles) - 1)], *rows]
    return [*("| " + " | ".join(row) + " |" for row in cells), ""]
