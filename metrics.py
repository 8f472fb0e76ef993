"""What the relay counts, over all workers: for /metrics and the page. No payload, id, address or key.

prometheus_client keeps the counts of each worker in files of a folder that gunicorn.conf.py
makes (PROMETHEUS_MULTIPROC_DIR), and adds them up for whoever asks. Without that folder, in a
command or a test, the counts are this process's own.
"""

import mmap
import os
import struct
import time

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector

OUTCOMES = ("delivered", "dead-lettered", "retried", "unauthorized", "rejected")
RECENTLY = 300  # seconds for which a failure of Segment is shown

_webhooks = Counter("relay_webhooks", "Webhooks answered, by outcome.", ["outcome"])
_seconds = Histogram(
    "relay_acknowledge_seconds",
    "From a webhook's arrival to its answer; Customer.io gives up after 4 s.",
    buckets=(0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 1, 2, 3, 3.5, 4),
)
_last_delivered = Gauge(
    "relay_last_delivered_timestamp_seconds", "When the last event was delivered.", multiprocess_mode="max"
)
_last_retry = Gauge(
    "relay_last_retry_timestamp_seconds",
    "When a 503 was last answered, by reason.",
    ["reason"],
    multiprocess_mode="max",
)
_by_outcome = {outcome: _webhooks.labels(outcome) for outcome in OUTCOMES}

# One total for each of the last minutes, shared by all workers by being mapped before they are
# forked. Written as a whole and by anybody: the total at the time is the same for all of them.
MINUTES = 60
_SLOT = struct.Struct("dd")  # minute, events delivered until its end
_history = mmap.mmap(-1, _SLOT.size * (MINUTES + 2))
STARTED = time.time()  # of the service: this is imported before the workers are forked


def count(status: str, seconds: float, reason: str = "") -> None:
    """Count one answer: its status, the seconds it took, and for a retry the reason."""
    outcome = "retried" if status == "retry" else status
    _by_outcome[outcome].inc()
    _seconds.observe(seconds)
    if outcome == "delivered":
        _last_delivered.set(time.time())
    elif outcome == "retried":
        _last_retry.labels(reason).set(time.time())


def text() -> bytes:
    """Return the counts in Prometheus' text form."""
    return generate_latest(_registry())


def _registry() -> CollectorRegistry:
    if "PROMETHEUS_MULTIPROC_DIR" not in os.environ:
        return REGISTRY
    registry = CollectorRegistry()
    MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
    return registry


def summary() -> dict[str, object]:
    """Return what the page shows: `outcomes` (each with a number), `last_delivered` (unix seconds,
    0 if never) and `failures`, a list of (reason, seconds ago) of the last minutes, newest first."""
    outcomes = dict.fromkeys(OUTCOMES, 0)
    last, failures = 0.0, []
    for family in _registry().collect():
        for sample in family.samples:
            if sample.name == "relay_webhooks_total":
                outcomes[sample.labels["outcome"]] = int(sample.value)
            elif sample.name == "relay_last_delivered_timestamp_seconds":
                last = sample.value
            elif sample.name == "relay_last_retry_timestamp_seconds":
                ago = time.time() - sample.value
                if ago < RECENTLY:
                    failures.append((sample.labels["reason"], int(ago)))
    failures.sort(key=lambda failure: failure[1])
    return {"outcomes": outcomes, "last_delivered": last, "failures": failures}


def remember() -> None:
    """Note how many events were delivered until now, for the chart; called every few seconds."""
    outcomes = summary()["outcomes"]
    assert isinstance(outcomes, dict)  # noqa: S101 - for mypy
    minute = int(time.time() // 60)
    position = minute % (MINUTES + 2) * _SLOT.size
    _history[position : position + _SLOT.size] = _SLOT.pack(minute, outcomes["delivered"])


def per_minute() -> list[int]:
    """Return the events delivered in each of the last sixty minutes, the current one last."""
    remember()
    totals = dict(_SLOT.iter_unpack(_history[:]))
    now = int(time.time() // 60)
    counts, before = [], 0.0
    for minute in range(now - MINUTES, now + 1):
        total = totals.get(float(minute), before)
        counts.append(max(0, int(total - before)))
        before = total
    return counts[1:]
