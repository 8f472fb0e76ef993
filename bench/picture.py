"""Draws time to answer against open connections as an SVG."""

import math
from collections.abc import Callable

WIDTH, HEIGHT, LEFT, RIGHT, BOTTOM, TOP = 720, 360, 60, 610, 310, 40  # of the drawing and of its axes
COLOURS = {"relay": "#0b6e4f", "aiohttp": "#b3541e"}


def picture(loads: list[int], latency: int, get: Callable[[str, int, str], float]) -> str:
    """Return the SVG, on a logarithmic axis. `get(name, connections, "p50")` returns milliseconds, or NaN."""
    curves = [
        (name, key, colour)
        for name, colour in COLOURS.items()
        for key in ("p50", "p99")
        if not math.isnan(get(name, loads[0], key))
    ]
    decades = math.ceil(math.log10(max(10, *(get(name, c, key) for name, key, _ in curves for c in loads))))
    parts = []

    def x(index: int) -> float:
        return LEFT + index * (RIGHT - LEFT) / (len(loads) - 1)

    def y(ms: float) -> float:
        return BOTTOM - (BOTTOM - TOP) * math.log10(max(ms, 1)) / decades

    def text(x: float, y: float, words: object, anchor: str = "start", colour: str = "#5b636d") -> None:
        parts.append(f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}">{words}</text>')

    def line(points: list[tuple[float, float]], colour: str, dash: str = "") -> None:
        joined = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(f'<polyline points="{joined}" fill="none" stroke="{colour}" stroke-dasharray="{dash}"/>')

    text(LEFT, 22, "Time to answer, by open connections", colour="#1a1d21")
    for decade in range(decades + 1):
        line([(LEFT, y(10**decade)), (RIGHT, y(10**decade))], "#d5d9de")
        text(LEFT - 6, y(10**decade) + 4, f"{10**decade:,} ms", "end")
    line([(LEFT, y(latency)), (RIGHT, y(latency))], "#5b636d", "4 3")
    text(RIGHT + 6, y(latency) + 4, f"Segment {latency} ms")
    for index, connections in enumerate(loads):
        text(x(index), BOTTOM + 20, connections, "middle")
    for number, (name, key, colour) in enumerate(curves):
        dash = "5 4" if key == "p99" else ""
        line([(x(index), y(get(name, c, key))) for index, c in enumerate(loads)], colour, dash)
        start = LEFT + number * 140
        line([(start, BOTTOM + 36), (start + 24, BOTTOM + 36)], colour, dash)
        text(start + 30, BOTTOM + 40, f"{name} {key}", colour="#1a1d21")
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="system-ui, sans-serif" font-size="12">'
    return "\n".join([head, f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>', *parts, "</svg>\n"])
