"""What an answer costs in a week: seven days of traffic, simulated second by second (`make week`).

No network and no clock, only arithmetic on Customer.io's rules (fake_customerio.py). Two receivers
get the same traffic and the same mishaps. The usual one answers 500 when its upstream fails and 400
to an event it cannot use, and refuses connections while it restarts. The relay answers 503 and 202,
and never refuses a connection.
"""

from collections import deque
from dataclasses import dataclass

from fake_customerio import BROKEN, GIVES_UP_AFTER, Outcome, accepted, wait_before_retry

DAY = 24 * 3600
RATE = 50  # events a second
CATCH_UP = 500  # events a second once nothing blocks the queue: assumed
START = DAY  # when the mishap begins


@dataclass(frozen=True)
class Mishap:
    name: str
    seconds: int = 0  # how long answers are not 2xx
    poison: bool = False  # one event that is never accepted
    usual: Outcome = 500
    relay: Outcome = 503


MISHAPS = (
    Mishap("Segment is down for a minute", 60),
    Mishap("Segment is down for an hour", 3600),
    Mishap("one event that Segment can never take", poison=True, usual=400, relay=202),
    Mishap("a wrong signing key for ten minutes", 600, usual=401, relay=422),
    # systemd or Heroku's router holds the socket, so a restart of the relay refuses no connection.
    Mishap("a restart of five seconds", 5, usual=BROKEN, relay=200),
)


@dataclass
class Result:
    delivered: int = 0
    kept: int = 0  # as dead letters
    lost: int = 0
    recovered: int = 0  # seconds from the start of the mishap until the queue is empty
    longest: int = 0  # seconds that an event waited


def simulate(mishap: Mishap, answer: Outcome) -> Result:
    """Send seven days of events, in order, to a receiver that returns `answer` during `mishap`."""
    result = Result(delivered=START * RATE)
    queue: deque[list[int]] = deque()  # [second of the event, how many]
    poisoned = mishap.poison
    failures, first_failure, wait_until = 0, 0, 0.0
    now = START
    while now < 7 * DAY or queue:
        if now < 7 * DAY:
            queue.append([now, RATE])
        room = CATCH_UP
        while queue and room and now >= wait_until:
            born, count = queue[0]
            at_poison = poisoned and born >= START
            outcome = answer if at_poison or START <= now < START + mishap.seconds else 200
            if accepted(outcome):
                sent = 1 if at_poison else min(count, room)
                poisoned = poisoned and not at_poison
                if at_poison and outcome == 202:
                    result.kept += 1
                else:
                    result.delivered += sent
                    result.longest = max(result.longest, now - born)
            else:
                first_failure = first_failure if failures else now
                failures += 1
                if now - first_failure < GIVES_UP_AFTER:
                    wait_until = now + wait_before_retry(outcome, failures)
                    break
                sent, poisoned = 1, poisoned and not at_poison
                result.lost += 1
            failures = 0
            room -= sent
            queue[0][1] -= sent
            if not queue[0][1]:
                queue.popleft()
        now += 1
        if queue:
            result.recovered = now - START
        elif now >= START + mishap.seconds and not poisoned:
            # From here on each event is delivered at once.
            result.delivered += max(0, 7 * DAY - now) * RATE
            break
    return result


def human(seconds: int) -> str:
    if seconds < 1.5:
        return "at once"
    for size, name in ((DAY, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.1f} {name}"
    return f"{seconds} seconds"


def table() -> str:
    """Return the comparison as a table in Markdown."""
    total = 7 * DAY * RATE
    lines = [
        "| In a week of 50 events a second | answers | lost | backlog gone after | longest delay |",
        "| --- | --- | --- | --- | --- |",
    ]
    for mishap in MISHAPS:
        for who, answer in (("usual", mishap.usual), ("**relay**", mishap.relay)):
            result = simulate(mishap, answer)
            assert result.delivered + result.kept + result.lost == total
            lost = "none, 1 kept as a dead letter" if result.kept else str(result.lost or "none")
            given = "connection refused" if answer == BROKEN else answer
            cells = (f"{who}: {given}", lost, human(result.recovered), human(result.longest))
            lines.append("| " + " | ".join((mishap.name if who == "usual" else "", *cells)) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
