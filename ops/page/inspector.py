"""The last webhooks of a dry run, and what the page shows of each. A live relay keeps none."""

import base64
import json
import shlex
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from config import Config
from ops.page.advice import TOO_LARGE
from ops.page.changes import changes, in_reading_order, subject
from relay import signature
from relay.outcomes import Outcome
from relay.webhook import Webhook
from translate import NotAnObject, Undeliverable, parse

KEPT = 100  # webhooks
MAX_HELD = 128 * 1024 * 1024  # bytes of all of them; 100 of 1 MB are kept whole
SHOWN = 30_000  # characters of a webhook or call, at first
NAME = 200  # characters of an event's name or a person's id
PASTED = 100_000  # bytes that a shell takes as one argument


@dataclass
class Seen:
    number: int
    at: float  # unix seconds
    status: int
    outcome: Outcome
    words: str  # the reason's
    event: str
    person: str
    size: int  # bytes
    body: bytes
    call: str  # JSON; "" without one
    sample: bool

    @property
    def whole(self) -> bool:
        """Whether all of it is still there."""
        return len(self.body) == self.size

    def summary(self) -> dict[str, Any]:
        names = ("number", "at", "event", "person", "size", "sample")
        answer = {"outcome": self.outcome.label, "title": self.outcome.title, "reason": self.words}
        return {name: getattr(self, name) for name in names} | answer


class Inspector:
    """Remembers the last webhooks, delivered or not, and prints each track call."""

    def __init__(self, config: Config):
        self._config = config
        self._webhooks: deque[Seen] = deque(maxlen=KEPT)
        # A page that is open while the relay restarts goes on: later numbers are higher.
        self._latest = int(time.time() * 1000)

    def remember(self, webhook: Webhook, outcome: Outcome, status: int, sample: bool) -> int:
        """Remember a webhook and its answer; return its number. `sample`: it is from the page or the command."""
        body, call = webhook.body, webhook.message.json if webhook.message else ""
        if call:
            message = json.loads(call)
            event, person = message["event"], message["userId"] or message["anonymousId"]
        else:
            event, person = subject(_event(body), self._config)
        self._latest += 1
        number = self._latest
        self._webhooks.append(
            Seen(
                number=number,
                at=time.time(),
                status=status,
                outcome=outcome,
                words=webhook.words,
                event=event[:NAME],
                person=person[:NAME],
                size=len(body),
                body=body,
                call=call,
                sample=sample,
            )
        )
        self._forget()
        if call:
            print(f"{self._printed(call)}\n", end="", flush=True)  # in one piece
        return number

    def _forget(self) -> None:
        """Keep only the beginning of old webhooks if all of them are too much."""
        held = sum(len(webhook.body) for webhook in self._webhooks)
        for webhook in self._webhooks:
            if held <= MAX_HELD:
                break
            held -= len(webhook.body)
            webhook.body = webhook.body[:SHOWN]
            held += len(webhook.body)

    def _printed(self, call: str) -> str:
        if self._config.log_format == "json":
            at = datetime.now(UTC).isoformat(timespec="milliseconds")
            return f'{{"time": "{at}", "level": "info", "message": "track call", "call": {call}}}'
        return f"track call:\n{pretty(call)}"

    def after(self, number: int) -> list[dict[str, Any]]:
        """Return a summary of each webhook with a higher number, the oldest first."""
        return [webhook.summary() for webhook in self._webhooks if webhook.number > number]

    def find(self, number: int) -> Seen | None:
        return next((webhook for webhook in self._webhooks if webhook.number == number), None)

    def shown(self, webhook: Seen) -> dict[str, Any]:
        """Return what the page shows of an open webhook; long texts are cut."""
        texts = {part: self.text(webhook, part) for part in ("webhook", "call")}
        return {
            "answer": f"Answered {webhook.status}. {TOO_LARGE if webhook.status == 413 else webhook.outcome.meaning}",
            "whole": webhook.whole,
            "changes": self._changes(webhook) if webhook.call else [],
        } | {
            part: {"text": text[:SHOWN], "shown": min(len(text), SHOWN), "length": len(text)}
            for part, text in texts.items()
        }

    def text(self, webhook: Seen, part: str) -> str:
        """Return the "webhook" or the "call" as text that people read, whole."""
        if part == "call":
            return pretty(webhook.call, in_reading_order) if webhook.call else ""
        return pretty(webhook.body.decode("utf-8-sig", errors="replace"))

    def curl(self, webhook: Seen, address: str, with_key: bool) -> str:
        """Return a shell command that sends the webhook to `address`.

        It is signed if signatures are checked: now, `with_key`, or else by the shell, which
        must know the key.
        """
        sending = f"curl {shlex.quote(address)} -H 'Content-Type: application/json'"
        keys = self._config.signing_keys
        if keys and with_key:
            headers = signature.sign(webhook.body, str(int(time.time())), keys[0])
            sending += "".join(f" -H '{name}: {value}'" for name, value in headers.items())
        elif keys:
            return (
                f"body=$({_printing(webhook.body)}; echo x); body=${{body%x}}; now=$(date +%s)\n"
                'signed=$(printf \'v0:%s:%s\' "$now" "$body" | openssl dgst -sha256 -hmac "$CUSTOMERIO_SIGNING_KEY")\n'
                f'printf %s "$body" | {sending} -H "X-CIO-Timestamp: $now" -H "X-CIO-Signature: ${{signed##* }}" '
                "--data-binary @-"
            )
        if _printable(webhook.body):
            return f"{sending} --data-raw {shlex.quote(webhook.body.decode())}"
        return f"{_printing(webhook.body)} | {sending} --data-binary @-"

    def _changes(self, webhook: Seen) -> list[str]:
        if not webhook.whole:
            return []
        try:
            return changes(_event(webhook.body), json.loads(webhook.call), _is_utf8(webhook.body), self._config)
        except RecursionError:
            return ["It is nested too deeply to say what was changed."]


def pretty(text: str, order: Callable[[Any], Any] = lambda value: value) -> str:
    """Return JSON indented, or unchanged if it isn't JSON, or nests so deeply that most would be indentation."""
    room = 10_000 + 10 * len(text)
    pieces = []
    try:
        for piece in json.JSONEncoder(indent=2, ensure_ascii=False).iterencode(order(json.loads(text))):
            room -= len(piece)
            if room < 0:
                return text
            pieces.append(piece)
    except (ValueError, RecursionError):
        return text
    return "".join(pieces)


def _event(body: bytes) -> dict[str, Any]:
    try:
        return parse(body)
    except (NotAnObject, Undeliverable):
        return {}


def _is_utf8(body: bytes) -> bool:
    try:
        body.decode()
    except UnicodeDecodeError:
        return False
    return True


def _printable(body: bytes) -> bool:
    """Return whether a terminal prints the text unchanged: it may obey a control character."""
    return len(body) <= PASTED and _is_utf8(body) and body.decode().replace("\n", "").isprintable()


def _printing(body: bytes) -> str:
    """Return a shell command that prints the body."""
    if _printable(body):
        return f"printf %s {shlex.quote(body.decode())}"
    return f"printf %s {base64.b64encode(body).decode()} | base64 -d"
