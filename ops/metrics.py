"""What the relay counts, over all workers: for /metrics and the page. No payload, id, address or key."""

import time
from collections.abc import Iterator
from itertools import count

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from shared import Shared

OUTCOMES = ("delivered", "dead-lettered", "retried", "unauthorized", "rejected")

# The codes of RetryLater, with what the page says of them.
REASONS = {
    "timeout": "Segment did not answer in time",
    "connection": "the connection to Segment failed",
    "rate_limited": "Segment is limiting the rate",
    "write_key": "Segment refuses the write key: check SEGMENT_WRITE_KEY",
    "not_segment": "what answered is not Segment: check SEGMENT_HOST and proxies",
    "redirect": "Segment's address redirects elsewhere: check SEGMENT_HOST",
    "not_success": "Segment answered that it failed",
    "interrupted": "the upload was interrupted",
    "body": "the webhook did not arrive whole and in time",
    "dead_letter": "a dead letter could not be kept",
    "internal": "the relay failed on it; the log says where",
    "other": "for another reason",
} | {f"segment_{status}": f"Segment answered {status}" for status in range(100, 600)}

SECONDS = (0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 1, 2, 3, 3.5, 4, float("inf"))  # upper bounds

RECENTLY = 300  # seconds for which a failure of Segment is shown
MINUTES = 60  # of the chart


class Metrics:
    """Each number has a column in the memory that the workers share; a total is the sum of a column."""

    def __init__(self, shared: Shared):
        self._counts = shared.counts
        column = count()
        self._outcomes = {outcome: next(column) for outcome in OUTCOMES}
        self._last_delivered = next(column)
        self._last_retry = {reason: next(column) for reason in REASONS}
        self._seconds = [next(column) for _ in SECONDS]
        self._seconds_sum = next(column)
        # What was delivered in each of the last minutes: (which minute, how many).
        self._minutes = [(next(column), next(column)) for _ in range(MINUTES + 1)]

    def answered(self, status: str, reason: str, seconds: float) -> None:
        """Count one webhook: the status of its answer, the code of a RetryLater, the seconds it took."""
        outcome = "retried" if status == "retry" else status
        row, now = self._counts.row, time.time()
        row[self._outcomes[outcome]] += 1
        row[self._seconds[next(n for n, bound in enumerate(SECONDS) if seconds <= bound)]] += 1
        row[self._seconds_sum] += seconds
        if outcome == "delivered":
            row[self._last_delivered] = now
            minute = now // 60
            which, delivered = self._minutes[int(minute) % len(self._minutes)]
            if row[which] != minute:
                row[which], row[delivered] = minute, 0
            row[delivered] += 1
        elif outcome == "retried":
            row[self._last_retry.get(reason, self._last_retry["other"])] = now

    def text(self) -> bytes:
        """Return the counts in Prometheus' text format."""
        registry = CollectorRegistry()
        registry.register(self)
        return generate_latest(registry)

    def collect(self) -> Iterator[Metric]:
        """Yield the counts for prometheus_client."""
        webhooks = CounterMetricFamily("relay_webhooks", "Webhooks answered, by outcome.", labels=["outcome"])
        for outcome, number in self.outcomes().items():
            webhooks.add_metric([outcome], number)
        yield webhooks
        below, buckets = 0.0, []
        for bound, column in zip(SECONDS, self._seconds, strict=True):
            below += self._total(column)
            buckets.append(("+Inf" if bound == SECONDS[-1] else str(float(bound)), below))
        yield HistogramMetricFamily(
            "relay_acknowledge_seconds",
            "From a webhook's arrival to its answer; Customer.io gives up after 4 s.",
            buckets=buckets,
            sum_value=self._total(self._seconds_sum),
        )
        last = GaugeMetricFamily("relay_last_delivered_timestamp_seconds", "When the last event was delivered.")
        last.add_metric([], self.last_delivered())
        yield last
        retry = GaugeMetricFamily(
            "relay_last_retry_timestamp_seconds", "When a 503 was last answered, by reason.", labels=["reason"]
        )
        for reason, when in self._retries().items():
            retry.add_metric([reason], when)
        yield retry

    def outcomes(self) -> dict[str, int]:
        """Return the number of webhooks by outcome."""
        return {outcome: int(self._total(column)) for outcome, column in self._outcomes.items()}

    def last_delivered(self) -> float:
        """Return when an event was last delivered, in unix seconds; 0 if never."""
        return max(self._counts.column(self._last_delivered))

    def failures(self) -> list[tuple[str, int]]:
        """Return why webhooks were answered 503 in the last minutes: (reason, seconds ago), newest first."""
        now = time.time()
        ago = [(REASONS[reason], int(now - when)) for reason, when in self._retries().items()]
        return sorted((failure for failure in ago if failure[1] < RECENTLY), key=lambda failure: failure[1])

    def per_minute(self) -> list[int]:
        """Return the events delivered in each of the last sixty minutes, the current one last."""
        totals: dict[float, float] = {}
        for which, delivered in self._minutes:
            for minute, number in zip(self._counts.column(which), self._counts.column(delivered), strict=True):
                totals[minute] = totals.get(minute, 0) + number
        now = int(time.time() // 60)
        return [int(totals.get(minute, 0)) for minute in range(now - MINUTES + 1, now + 1)]

    def _total(self, column: int) -> float:
        return sum(self._counts.column(column))

    def _retries(self) -> dict[str, float]:
        last = {reason: max(self._counts.column(column)) for reason, column in self._last_retry.items()}
        return {reason: when for reason, when in last.items() if when}
