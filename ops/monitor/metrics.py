"""What the relay counts, over all workers: for /metrics and the page. No payload, id, address or key."""

import re
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from itertools import count
from typing import Any, NamedTuple

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from config import EU_HOST, SEGMENT_HOST, VERSION, Config
from ops import samples
from relay.message import Message
from relay.outcomes import ACKNOWLEDGED, DEAD_LETTERED, DELIVERED, DRY_RUN, REASONS, RETRIED, UNAUTHORIZED
from server.shared import WORKER_COLUMNS, Shared
from translate import Undeliverable, kind

STATUSES = re.compile("segment_[0-9]+")

ANY_ACKNOWLEDGED = {(outcome.label, reason) for outcome in ACKNOWLEDGED for reason in REASONS[outcome.label]}

# What failed -> which outcomes and reasons say that it fails no more. Most dead letters never come near Segment.
FAILING = {
    RETRIED.label: {(DELIVERED.label, ""), (DRY_RUN.label, ""), (DEAD_LETTERED.label, "segment_rejects")},
    "dead_letter": ANY_ACKNOWLEDGED,
    UNAUTHORIZED.label: ANY_ACKNOWLEDGED,
}

INFINITY = float("inf")
# Upper bounds.
ANSWER_SECONDS = (0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 1, 2, 3, 3.5, 4, INFINITY)
UPLOAD_SECONDS = (0.025, 0.05, 0.1, 0.25, 0.5, 1, 2, 3.5, INFINITY)
UPLOAD_EVENTS = (1, 2, 5, 10, 25, 50, 100, INFINITY)
AGE_SECONDS = (1, 5, 15, 60, 300, 900, 3_600, 4 * 3_600, 24 * 3_600, 3 * 24 * 3_600, 7 * 24 * 3_600, INFINITY)

MINUTES = 60  # of the chart

DOCUMENTED = dict.fromkeys(samples.EVENTS.values())  # in an order that all workers share: each has a column
OTHER = ("other", "other")


class Histogram:
    """Columns of a histogram: one for each bucket, and one for the sum."""

    def __init__(self, bounds: tuple[float, ...], column: Iterator[int]):
        self.bounds = bounds
        self.buckets = [next(column) for _ in bounds]
        self.sum = next(column)

    def observe(self, row: "memoryview[float]", value: float) -> None:
        row[self.buckets[bisect_left(self.bounds, value)]] += 1
        row[self.sum] += value


class Tally(NamedTuple):
    """How often one reason occurred, and when last."""

    outcome: str  # its label
    reason: str
    words: str
    number: int
    last: float  # unix seconds


class Metrics:
    """Each number has a column in the memory that the workers share; a total is the sum of a column."""

    def __init__(self, shared: Shared, config: Config):
        self._counts = shared.counts
        self._info = [VERSION, str(config.dry_run).lower(), _region(config.segment_host)]
        column = count(len(WORKER_COLUMNS))
        pairs = [(outcome, reason) for outcome, reasons in REASONS.items() for reason in reasons]
        self._webhooks = {pair: next(column) for pair in pairs} | WORKER_COLUMNS
        self._last = {pair: next(column) for pair in pairs}  # when, in unix seconds
        self._events = {pair: next(column) for pair in (*DOCUMENTED, OTHER)}
        self._answer_seconds = Histogram(ANSWER_SECONDS, column)
        self._age_seconds = Histogram(AGE_SECONDS, column)
        self._upload_seconds = Histogram(UPLOAD_SECONDS, column)
        self._upload_events = Histogram(UPLOAD_EVENTS, column)
        self._uploads = next(column)
        self._first_genuine = next(column)  # when, in unix seconds
        # When each began to fail, without a success since; outdated once there was one.
        self._failing = {what: next(column) for what in FAILING}
        self._last_real_delivery = next(column)  # when an event that isn't a sample was last delivered, in unix seconds
        # What happened in each of the last minutes: which minute it is, the webhooks by outcome, the sum of ages.
        self._minutes = [{name: next(column) for name in ("minute", *REASONS, "age")} for _ in range(MINUTES + 1)]
        self._counts.row[self._uploads] = 0  # a killed worker's are over

    def count_answer(self, outcome: str, reason: str, seconds: float) -> None:
        """Count one webhook: the labels of its outcome and its reason ("" for none), the seconds it took."""
        row, now = self._counts.row, time.time()
        pair = (outcome, reason) if (outcome, reason) in self._webhooks else (outcome, "other")
        row[self._webhooks[pair]] += 1
        row[self._last[pair]] = now
        self._answer_seconds.observe(row, seconds)
        row[self._minute(row, now)[outcome]] += 1

    def note_genuine(self) -> None:
        """Note that a webhook with the right signature came."""
        row = self._counts.row
        row[self._first_genuine] = row[self._first_genuine] or time.time()

    def note_failure(self, what: str) -> None:
        """Note that one of FAILING failed: for a genuine webhook, or one that may be genuine."""
        row, column = self._counts.row, self._failing[what]
        if row[column] <= self._last_success(what):
            row[column] = time.time()

    def note_real_delivery(self) -> None:
        """Note that Segment has an event that is not a sample."""
        self._counts.row[self._last_real_delivery] = time.time()

    def count_event(self, event: dict[str, Any] | None) -> None:
        """Count the event of a webhook that won't come again, by its kind; None if it can't be read."""
        self._counts.row[self._events[documented_kind(event or {})]] += 1

    def note_age(self, age: float) -> None:
        """Note how old an event was when it was delivered, in seconds."""
        row = self._counts.row
        self._age_seconds.observe(row, max(age, 0))
        row[self._minute(row, time.time())["age"]] += max(age, 0)

    def count_uploads(self, upload: Callable[[list[Message], float], None]) -> Callable[[list[Message], float], None]:
        """Return `upload`, counted."""

        def counted_upload(messages: list[Message], seconds: float) -> None:
            row, started = self._counts.row, time.monotonic()
            row[self._uploads] += 1
            try:
                upload(messages, seconds)
            finally:
                row[self._uploads] -= 1
                self._upload_seconds.observe(row, time.monotonic() - started)
                self._upload_events.observe(row, len(messages))

        return counted_upload

    def _minute(self, row: "memoryview[float]", now: float) -> dict[str, int]:
        minute = now // 60
        columns = self._minutes[int(minute) % len(self._minutes)]
        if row[columns["minute"]] != minute:
            for column in columns.values():
                row[column] = 0
            row[columns["minute"]] = minute
        return columns

    def text(self) -> bytes:
        """Return the counts in Prometheus' text format."""
        registry = CollectorRegistry()
        registry.register(self)
        return generate_latest(registry)

    def collect(self) -> Iterator[Metric]:
        """Yield the counts for prometheus_client."""
        info = GaugeMetricFamily("relay_info", "What runs here.", labels=["version", "dry_run", "region"])
        info.add_metric(self._info, 1)
        yield info
        webhooks = CounterMetricFamily(
            "relay_webhooks", "Webhooks answered, by outcome and reason.", labels=["outcome", "reason"]
        )
        for pair, column in self._webhooks.items():
            # Each from 0, because increase() misses the first webhook of a series that begins with it.
            # Not the 500 statuses, which would be most of the text.
            if (number := self._total(column)) or not STATUSES.fullmatch(pair[1]):
                webhooks.add_metric(pair, number)
        yield webhooks
        events = CounterMetricFamily(
            "relay_events", "Events that won't come again, by kind.", labels=["object_type", "metric"]
        )
        for pair, column in self._events.items():
            events.add_metric(pair, self._total(column))
        yield events
        answers = "From a webhook's arrival to its answer; Customer.io gives up after 4 s."
        yield self._family("relay_acknowledge_seconds", answers, self._answer_seconds)
        ages = "From an event to its delivery: how far behind Customer.io's queue is."
        yield self._family("relay_event_age_seconds", ages, self._age_seconds)
        yield self._family("relay_upload_seconds", "How long uploads to Segment take.", self._upload_seconds)
        yield self._family("relay_upload_events", "How many events an upload carries.", self._upload_events)
        in_progress = self._total(self._uploads)
        yield GaugeMetricFamily("relay_uploads_in_progress", "Uploads that Segment has not answered yet.", in_progress)
        if last := self.last_delivered():
            delivered = "When an event was last delivered."
            yield GaugeMetricFamily("relay_last_delivered_timestamp_seconds", delivered, last)
        retries = GaugeMetricFamily(
            "relay_last_retry_timestamp_seconds", "When a 503 was last answered, by reason.", labels=["reason"]
        )
        for failure in self.failures([RETRIED.label]):
            retries.add_metric([failure.reason], failure.last)
        if retries.samples:
            yield retries

    def _family(self, name: str, help_text: str, histogram: Histogram) -> HistogramMetricFamily:
        below, buckets = 0.0, []
        for bound, column in zip(histogram.bounds, histogram.buckets, strict=True):
            below += self._total(column)
            buckets.append(("+Inf" if bound == INFINITY else str(float(bound)), below))
        return HistogramMetricFamily(name, help_text, buckets=buckets, sum_value=self._total(histogram.sum))

    def outcomes(self) -> dict[str, int]:
        """Return the number of webhooks by outcome."""
        numbers = dict.fromkeys(REASONS, 0)
        for (outcome, _), column in self._webhooks.items():
            numbers[outcome] += int(self._total(column))
        return numbers

    def last_delivered(self) -> float:
        """Return when an event was last delivered, in unix seconds; 0 if never."""
        return max(self._counts.column(self._last[DELIVERED.label, ""]))

    def _last_success(self, what: str) -> float:
        return max(max(self._counts.column(self._last[pair])) for pair in FAILING[what])

    def failing_since(self) -> dict[str, float]:
        """Return when each of FAILING began to fail, without a success since, in unix seconds; 0 if it doesn't."""
        found = {}
        for what, column in self._failing.items():
            success = self._last_success(what)
            found[what] = min((since for since in self._counts.column(column) if since > success), default=0)
        return found

    def first_genuine(self) -> float:
        """Return when the first webhook with the right signature came, in unix seconds; 0 if none did."""
        return min(filter(None, self._counts.column(self._first_genuine)), default=0)

    def last_real_delivery(self) -> float:
        """Return when an event that isn't a sample was last delivered, in unix seconds; 0 if never."""
        return max(self._counts.column(self._last_real_delivery))

    def failures(self, outcomes: Iterable[str]) -> list[Tally]:
        """Return what went wrong since the start, among these outcomes, the latest first."""
        outcomes = set(outcomes)
        found = [
            Tally(
                outcome,
                reason,
                REASONS[outcome][reason],
                int(self._total(column)),
                max(self._counts.column(self._last[outcome, reason])),
            )
            for (outcome, reason), column in self._webhooks.items()
            if outcome in outcomes
        ]
        return sorted((failure for failure in found if failure.last), key=lambda failure: -failure.last)

    def per_minute(self) -> dict[str, list[float]]:
        """Return, for each outcome and for "age", the sum of each of the last sixty minutes, the current one last."""
        now = int(time.time() // 60)
        sums = {name: dict.fromkeys(range(now - MINUTES + 1, now + 1), 0.0) for name in (*REASONS, "age")}
        for columns in self._minutes:
            minutes = self._counts.column(columns["minute"])
            for name, sum_of in sums.items():
                for minute, number in zip(minutes, self._counts.column(columns[name]), strict=True):
                    if minute in sum_of:
                        sum_of[int(minute)] += number
        return {name: list(sum_of.values()) for name, sum_of in sums.items()}

    def _total(self, column: int) -> float:
        return sum(self._counts.column(column))


def documented_kind(event: dict[str, Any]) -> tuple[str, str]:
    """Return (object_type, metric) of an event that Customer.io documents, and ("other", "other") of all else."""
    try:
        channel, metric = kind(event)
    except Undeliverable:  # it has no name
        return OTHER
    pair = (channel or "customer", metric)  # the event about preferences may have no object_type
    return pair if pair in DOCUMENTED else OTHER


def _region(host: str) -> str:
    return {SEGMENT_HOST: "us", EU_HOST: "eu"}.get(host, "other")
