"""Show what becomes of an event in thirty lines, and in this relay, when something fails (`make thirty`).

Each case sends one webhook as Customer.io would, to thirty_lines.py and to the relay, both under
gunicorn. What an answer costs follows Customer.io's rules (proof/fake_customerio.py).
"""

import json
import select
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import requests

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "proof"))
from fake_customerio import BROKEN, HOUR, TIMED_OUT, TIMEOUT, Outcome, accepted, sign, wait_before_retry  # noqa: E402
from fake_segment import FakeSegment  # noqa: E402 - needs the path
from harness import KEYS, SIGNING_KEY, Relay, answers, until  # noqa: E402

SOMEBODY = "somebody@example.com"

Event = dict[str, Any]


@dataclass
class Case:
    """What fails: Segment, the event, its signature, or the relay; or what is wrong with the message at Segment."""

    fault: str = ""  # of the fake Segment
    changes: Event = field(default_factory=dict)  # of the event
    constant: str = ""  # a value of the event, in place of the text "CONSTANT"
    signing_key: str = SIGNING_KEY  # "" for no signature
    restart: bool = False
    wrong: Callable[[Event], bool] = lambda message: False
    costs: str = ""  # what that costs

    @property
    def lasts(self) -> bool:
        """Whether every retry meets the same."""
        return bool(self.changes)


def data(**changes: Any) -> Event:
    return {"data": {"customer_id": "568", "email_address": SOMEBODY} | changes}


def nested(depth: int) -> Any:
    return [nested(depth - 1)] if depth else "bottom"


CASES = {
    "nothing": Case(),
    "the relay restarts": Case(restart=True),  # before anything that a restart would wait for
    "Segment's address redirects": Case("redirect"),
    "a captive portal answers 200 with a page": Case("html"),
    'Segment answers 200 and `"success": false`': Case("false"),
    "the connection ends within the head of a 200": Case("cut"),
    "Segment answers 500": Case("500"),
    "Segment answers 429": Case("429:1"),
    "Segment answers 401": Case("401"),
    "Segment resets the connection": Case("reset"),
    "Segment can't be reached": Case("refuse"),
    "Segment doesn't answer": Case("hang"),
    "Segment answers byte by byte": Case("drip"),
    "Segment rejects the event": Case(changes={"metric": "poison"}),
    "the event is above 32 KB": Case(changes=data(content="x" * 40_000)),
    "the event contains NaN": Case(changes=data(score="CONSTANT"), constant="NaN"),
    "the event contains half a character": Case(changes=data(subject="CONSTANT"), constant=r'"\ud83d"'),
    "the event is nested 600 deep": Case(changes=data(tree=nested(600))),
    "the event knows only an email address": Case(changes={"data": {"identifiers": {"id": None, "email": SOMEBODY}}}),
    "the event names nobody": Case(changes={"data": {"customer_id": "", "identifiers": {}}}),
    "the event has no object_type": Case(changes={"object_type": None}),
    "the event's timestamp is a text": Case(changes={"timestamp": "yesterday"}),
    "a stranger sends without a signature": Case(signing_key=""),
    "a stranger guesses the signature": Case(signing_key="guessed"),
    "Customer.io is a destination of the source": Case(
        wrong=lambda message: "Customer.io" not in message["integrations"],
        costs="the event returns to Customer.io, as a new one",
    ),
    "a second source has the same events": Case(
        wrong=lambda message: message["messageId"] == message["context"]["event_id"],
        costs="Segment drops the events of one of them",
    ),
}


@dataclass
class Result:
    """What came of one case."""

    outcome: Outcome
    message: Event | None  # at Segment
    leaked: bool  # the person's address, into the log

    def cost(self, case: Case) -> str:
        """Say what it costs, by Customer.io's rules."""
        return self._cost(case) + ("; the person's address is in the log" if self.leaked else "")

    def _cost(self, case: Case) -> str:
        if case.signing_key != SIGNING_KEY:
            return "**anybody can send events**" if self.message else "nothing"
        if self.message and case.wrong(self.message):
            return f"**{case.costs}**"
        if self.outcome == 202:
            return "nothing: kept as a dead letter"
        if accepted(self.outcome):
            return "nothing" if self.message else "**the event is lost**"
        if case.lasts:
            return "**no event for a week; this one is lost**"
        return "**no event for an hour**" if wait_before_retry(self.outcome, 1) == HOUR else "a retry in seconds"


def results(patience: float = TIMEOUT) -> dict[str, dict[str, Result]]:
    """Return what came of each case, in the thirty lines and in the relay. No answer counts after `patience` seconds."""
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        tempfile.NamedTemporaryFile() as letters,
        ThreadPoolExecutor() as pool,
    ):
        applications: dict[str, dict[str, Any]] = {
            # Several threads, so that no case waits for the one before.
            "thirty lines": {"env": KEYS, "command": ["--threads=8", "thirty_lines:create_app()"], "folder": HERE},
            # As systemd starts it (docs/operating.md).
            "relay": {"env": KEYS | {"DEAD_LETTER_FILE": letters.name}, "listener": listener},
        }
        running = {name: pool.submit(run, options, patience) for name, options in applications.items()}
        return {name: future.result() for name, future in running.items()}


def run(options: dict[str, Any], patience: float) -> dict[str, Result]:
    """Return what came of each case in one application."""
    found = {}
    with FakeSegment() as segment, Relay(**options | {"env": options["env"] | {"SEGMENT_HOST": segment.url}}) as relay:
        segment.poison = {"customerio:email_poison"}
        for number, (name, case) in enumerate(CASES.items()):
            segment.set_fault(case.fault or None)
            if case.restart:
                relay.stop()
                relay.start(wait=False)
            found[name] = send(case, f"event-{number}", segment, relay, patience)
            until(lambda: answers(relay.url), 20)
            segment.set_fault(None)
            time.sleep(1.1 if case.fault.startswith("429") else 0)  # its Retry-After
    return found


def send(case: Case, event_id: str, segment: FakeSegment, relay: Relay, patience: float) -> Result:
    """Send the webhook of a case, and return what came of it."""
    event = {"event_id": event_id, "object_type": "email", "metric": "opened", "timestamp": 1585250199} | data()
    body = json.dumps(event | case.changes).replace('"CONSTANT"', case.constant).encode()
    headers = sign(body, case.signing_key) if case.signing_key else {"Content-Type": "application/json"}
    log = len(relay.log)
    outcome: Outcome
    try:
        outcome = requests.post(f"{relay.url}/webhook", body, headers=headers, timeout=patience).status_code
    except requests.Timeout:
        outcome = TIMED_OUT
    except requests.RequestException:
        outcome = BROKEN
    out = relay.process.stdout
    until(lambda: not out or not select.select([out], [], [], 0)[0])  # its log is read ...
    time.sleep(0.05)  # ... and noted
    kept = [message for message in segment.kept.values() if message["context"]["event_id"] == event_id]
    return Result(outcome, kept[0] if kept else None, SOMEBODY in relay.log[log:])


def table() -> str:
    """Return all cases as a table in Markdown."""
    found = results()
    lines = ["| What fails | thirty lines | cost | relay | cost |", "| --- | --- | --- | --- | --- |"]
    for name, case in CASES.items():
        cells = [f"{each[name].outcome} | {each[name].cost(case)}" for each in found.values()]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
