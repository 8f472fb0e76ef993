"""A fake Customer.io that delivers webhooks as documented, on a clock that can run fast.

Documented (docs.customer.io, Reporting webhooks): a webhook is signed and times out after four
seconds. Without a 2xx it is sent again, with exponential backoff, for seven days, and every later
webhook waits behind it. After certain statuses and failed connections the first wait is an hour.
The intervals of the backoff are not published; the ones here are assumed.
"""

import hashlib
import hmac
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import requests

TIMEOUT = 4.0  # seconds
GIVES_UP_AFTER = 7 * 24 * 3600.0
COST_AN_HOUR = {400, 401, 402, 403, 404, 405, 410, 429, 500, 502, 521}
HOUR = 3600.0
# Assumed: ten seconds, doubled each time, up to an hour.
FIRST_BACKOFF = 10.0
LONGEST_BACKOFF = HOUR

TIMED_OUT = "timed out"
BROKEN = "connection broken"  # refused, reset, EOF, DNS, TLS: all cost an hour

Outcome = int | str  # a status, or one of these two


def accepted(outcome: Outcome) -> bool:
    return isinstance(outcome, int) and 200 <= outcome < 300


def wait_before_retry(outcome: Outcome, failures: int) -> float:
    """Return the seconds until the next attempt, after `failures` failures, the last one with `outcome`."""
    costs_an_hour = outcome == BROKEN or outcome in COST_AN_HOUR
    if costs_an_hour and failures == 1:
        return HOUR
    # "Same backoff after": the hour replaces the first wait only.
    return min(FIRST_BACKOFF * 2.0 ** min(failures - 1, 30), LONGEST_BACKOFF)


def sign(body: bytes, key: str, timestamp: str | None = None) -> dict[str, str]:
    """Return the headers that Customer.io sends with `body`."""
    timestamp = timestamp or str(int(time.time()))
    signature = hmac.new(key.encode(), f"v0:{timestamp}:".encode() + body, hashlib.sha256).hexdigest()
    return {"X-CIO-Timestamp": timestamp, "X-CIO-Signature": signature, "Content-Type": "application/json"}


class Webhook:
    """One reporting webhook: a thread that sends events to `url` in order, one at a time.

    Its waits run `speed` times faster than the real ones. The timeout of four seconds is real.
    """

    def __init__(self, url: str, key: str, events: Iterable[dict[str, Any]], speed: float = 1.0) -> None:
        self.url = url
        self.key = key
        self.speed = speed
        self.outcomes: Counter[Outcome] = Counter()
        self.sent = 0  # events sent at least once
        self.retries = 0
        self.slowest = 0.0  # seconds, over all answers
        self.failed_at: dict[Outcome, list[float]] = {BROKEN: [], TIMED_OUT: []}  # on the monotonic clock
        self.dropped: list[dict[str, Any]] = []
        self.on_accepted: Callable[[dict[str, Any], int], None] = lambda event, status: None
        self._session = requests.Session()
        self._thread = threading.Thread(target=self._run, args=(events,), daemon=True)

    def start(self) -> None:
        self._thread.start()

    def join(self, seconds: float) -> bool:
        """Wait up to `seconds`; return whether all events were accepted or dropped."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def _run(self, events: Iterable[dict[str, Any]]) -> None:
        for event in events:
            self.sent += 1
            self._deliver(event)
        self._session.close()

    def _deliver(self, event: dict[str, Any]) -> None:
        failures, waited = 0, 0.0
        while not accepted(outcome := self._post(event)):
            failures += 1
            wait = wait_before_retry(outcome, failures)
            waited += wait
            if waited > GIVES_UP_AFTER:
                self.dropped.append(event)
                return
            time.sleep(wait / self.speed)
            self.retries += 1
        self.on_accepted(event, int(outcome))

    def _post(self, event: dict[str, Any]) -> Outcome:
        body = json.dumps(event).encode()
        started = time.monotonic()
        outcome: Outcome
        try:
            outcome = self._session.post(self.url, body, headers=sign(body, self.key), timeout=TIMEOUT).status_code
            self.slowest = max(self.slowest, time.monotonic() - started)
        except requests.Timeout:
            outcome = TIMED_OUT
        except requests.RequestException:
            outcome = BROKEN
        if outcome in self.failed_at:
            self.failed_at[outcome].append(time.monotonic())
        self.outcomes[outcome] += 1
        return outcome
