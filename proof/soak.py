"""Nothing lost: a real relay between a fake Customer.io and a failing Segment (`make soak`).

Many webhooks send at once, as fast as they are answered. Meanwhile strangers pester the relay, Segment
goes through all its faults, workers are killed, and the relay is reloaded and restarted. Events that are
undeliverable come in bursts; their dead letters go to a file in the first half, and then to the log, which nobody
reads now and then. Then the faults end, the webhooks send what is left, and everything is counted. Exits 1 if any
promise was broken.

    python proof/soak.py [SECONDS] [SEED]
"""

import contextlib
import json
import math
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fake_customerio import BROKEN, COST_AN_HOUR, TIMED_OUT, TIMEOUT, Webhook, accepted
from fake_segment import FAULTS, FakeSegment
from harness import KEYS, ROOT, SIGNING_KEY, WRITE_KEY, Relay, megabytes, until

sys.path.insert(0, str(ROOT))
from ops.found import find
from relay.delivery import MAX_SPLITS, MAX_UPLOADS
from translate import namespace

WEBHOOKS = 48
SPEED = 3600.0  # an hour of Customer.io's takes a second
# A single event that a proxy refuses becomes a dead letter if a check event gets through: a fault may just have ended,
# or hit only a share of the uploads.
SOAKED = [None, *(fault for fault in FAULTS if fault not in ("html:400", "html:413"))]
POISON = "customerio:email_poisoned"
NAMESPACE = f"customerio-{namespace(WRITE_KEY)}-"


def count(pid: int, what: str) -> int:
    return len(os.listdir(f"/proc/{pid}/{what}"))


def running(pid: int) -> bool:
    return os.path.exists(f"/proc/{pid}")


class Soak:
    def __init__(self, seconds: float, seed: int) -> None:
        self.seconds = seconds
        self.random = random.Random(seed)  # noqa: S311 - repeatable, not secret
        self.done: Counter[str] = Counter()
        self.faults: Counter[str] = Counter()
        self.violations: list[str] = []
        self.acknowledged: dict[str, int] = {}
        self.memory: dict[int, list[float]] = {}
        self.kills: list[float] = []  # when, on the monotonic clock
        self.reloaded = -math.inf  # by when it has done all reloads, on the monotonic clock
        self.restarts: list[tuple[float, float]] = []  # from when to when
        self.burst = False  # of events that are undeliverable
        self._finished = threading.Event()

    def run(self) -> bool:
        listener = socket.create_server(("127.0.0.1", 0), backlog=2048)
        with listener, FakeSegment(latency=0.02) as self.segment, tempfile.TemporaryDirectory() as folder:
            self.letters = Path(folder) / "letters.jsonl"
            self.segment.poison = {POISON}
            # At error level, or the log of a long soak would fill the memory.
            env = KEYS | {"SEGMENT_HOST": self.segment.url, "WEB_CONCURRENCY": "2", "LOG_LEVEL": "error"}
            env["DEAD_LETTER_FILE"] = str(self.letters)
            with Relay(env, listener=listener) as self.relay, self._strangers():
                webhooks = self._run()
                self.relay.stop()
                self._count(webhooks)
                return not self.violations

    @contextlib.contextmanager
    def _strangers(self) -> Iterator[None]:
        kinds = ["chunks=2", "stalled=4", "pages=10", "pipelines=2", "small=100", "idle=400", "heads=10"]
        command = [sys.executable, str(ROOT / "proof/strangers.py"), str(self.relay.port), "0.02", *kinds]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL) as self.strangers:
            try:
                yield
            finally:
                self.strangers.kill()

    def _run(self) -> list[Webhook]:
        url = self.relay.url + "/webhook"
        webhooks = [Webhook(url, SIGNING_KEY, self._events(number), SPEED) for number in range(WEBHOOKS)]
        for webhook in webhooks:
            webhook.on_accepted = self._check_earned
            webhook.start()
        watcher = threading.Thread(target=self._watch_memory)
        watcher.start()
        self._break_things()
        self._finished.set()
        self.segment.set_fault(None)
        self.strangers.kill()
        deadline = time.monotonic() + 60
        finished = sum(webhook.join(max(0.1, deadline - time.monotonic())) for webhook in webhooks) == WEBHOOKS
        watcher.join()
        if not finished:
            self.violations.append("Customer.io still has events to send, a minute after all faults ended")
        self._check_leaks()
        return webhooks

    def _events(self, number: int) -> Iterator[dict[str, Any]]:
        """Yield a webhook's events until time is up; Segment refuses one in two hundred, and a burst's have no name."""
        choice = random.Random(number)  # noqa: S311
        position = 0
        while not self._finished.is_set():
            position += 1
            metric = "poisoned" if choice.random() < 0.005 else "opened"
            yield {
                "event_id": f"{number}-{position}",
                "object_type": "email",
                "metric": None if self.burst else metric,
                "timestamp": 1585250199,
                "data": {"customer_id": f"{number}", "subject": "x" * choice.choice([10, 100, 1000, 20_000])},
            }

    def _check_earned(self, event: dict[str, Any], status: int) -> None:
        """Check a 2xx the moment it arrives: a 200 has to be true by then."""
        identity = event["event_id"]
        self.acknowledged[identity] = status
        if status == 200 and NAMESPACE + identity not in self.segment.kept:
            self.violations.append(f"200 for {identity} before Segment had it")
        if (status == 202) != (event["metric"] != "opened"):
            self.violations.append(f"{status} for {identity}, whose metric is {event['metric']}")

    def _break_things(self) -> None:
        half = time.monotonic() + self.seconds / 2
        end = half + self.seconds / 2
        faults = list(SOAKED)
        self.random.shuffle(faults)
        time.sleep(1)
        while time.monotonic() < end:
            if not faults:
                faults = list(SOAKED)
                self.random.shuffle(faults)
            if self.letters_in_file and time.monotonic() > half:
                self._restart(DEAD_LETTER_FILE="")
            self.burst = self.random.random() < 0.3
            if not self.letters_in_file and self.random.random() < 0.3:
                self.relay.reading.clear()
                self.done["pauses in reading the log"] += 1
            fault = faults.pop()
            self.faults[fault or "none"] += 1
            self.segment.set_fault(fault, share=self.random.choice([0.3, 1.0]))
            time.sleep(self.random.uniform(0.2, 0.8))
            self.segment.set_fault(None)
            self.burst = False
            time.sleep(self.random.uniform(0.1, 0.4))
            what = self.random.choices(["nothing", "kill", "reload", "restart", "kill the arbiter"], [6, 4, 1, 1, 1])[0]
            if what == "kill" and (workers := self.relay.workers()):
                self.kills.append(time.monotonic())
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self.random.choice(workers), signal.SIGKILL)
                if time.monotonic() < self.reloaded:  # gunicorn replaces it only then
                    self.restarts.append((time.monotonic(), self.reloaded))
                self.done["workers killed"] += 1
            elif what == "reload":
                self.relay.process.send_signal(signal.SIGHUP)
                # One after the other, each until the old workers are gone.
                self.reloaded = max(time.monotonic(), self.reloaded) + 10
                self.done["reloads"] += 1
            elif what == "restart":
                self._restart()
            elif what == "kill the arbiter":
                began, workers = time.monotonic(), self.relay.workers()
                self.relay.process.kill()  # its workers leave by themselves, gracefully
                self.relay.process.wait()
                self.relay.start()
                with contextlib.suppress(AssertionError):
                    until(lambda: not any(running(pid) for pid in workers))  # noqa: B023
                if any(running(pid) for pid in workers):
                    self.violations.append("workers stayed although their arbiter was killed")
                self.restarts.append((began, time.monotonic()))
                self.reloaded = -math.inf
                self.done["arbiters killed"] += 1
            self.relay.reading.set()

    @property
    def letters_in_file(self) -> bool:
        return bool(self.relay.env["DEAD_LETTER_FILE"])

    def _restart(self, **settings: str) -> None:
        """Stop the relay, and start it with these settings."""
        # Answers take 3.5 s at most. After 10 s gunicorn would kill workers and cut connections.
        began = time.monotonic()
        most = 9 + max(0, self.reloaded - began)
        if (took := self.relay.stop()) > most:
            self.violations.append(f"the relay took {took:.1f} s to stop")
        self.relay.env.update(settings)
        self.relay.start()
        self.restarts.append((began, time.monotonic()))
        self.reloaded = -math.inf
        self.done["restarts"] += 1

    def _watch_memory(self) -> None:
        while not self._finished.wait(0.5):
            for pid in self.relay.workers():
                with contextlib.suppress(OSError, IndexError):
                    self.memory.setdefault(pid, []).append(megabytes(pid))

    def _check_leaks(self) -> None:
        """Check that quiet workers hold no more threads, files and memory than idle ones need."""
        time.sleep(1)
        for pid in self.relay.workers():
            # The main thread, and at most ten of gevent's for DNS and files.
            threads = count(pid, "task")
            if threads > 12:
                self.violations.append(f"a quiet worker has {threads} threads")
            # A connection for each webhook and each upload, and about 20 that every worker has. Those of strangers
            # who never read end after three seconds.
            most = WEBHOOKS + MAX_UPLOADS + MAX_SPLITS + 20
            with contextlib.suppress(AssertionError):
                until(lambda pid=pid, most=most: count(pid, "fd") <= most)  # type: ignore[misc]
            if (files := count(pid, "fd")) > most:
                self.violations.append(f"a quiet worker has {files} open files")
        for samples in self.memory.values():
            # Samples are half a second apart. A worker is warm after ten, and large events take some room.
            if len(samples) > 20 and samples[-1] > samples[10] + 25:
                self.violations.append(f"a worker grew from {samples[10]:.0f} to {samples[-1]:.0f} MB")

    def _count(self, webhooks: list[Webhook]) -> None:
        outcomes = sum((webhook.outcomes for webhook in webhooks), Counter[Any]())
        self.violations += [f"dropped: {event['event_id']}" for webhook in webhooks for event in webhook.dropped]
        kept = Counter(filter(None, self.segment.events()))  # but for check events, which have no event_id
        missing = [identity for identity, status in self.acknowledged.items() if status == 200 and not kept[identity]]
        sent = sum(webhook.sent for webhook in webhooks)
        in_file = find(self.letters.read_text())[0]
        kept_letters = [item for item in in_file + find(self.relay.log)[0] if not item.problem]
        letters = {json.loads(item.body)["event_id"] for item in kept_letters}
        gone = [event for event, status in self.acknowledged.items() if status == 202 and event not in letters]
        if gone:
            self.violations.append(f"{len(gone)} acknowledged events are in no dead letter: {gone[:5]}")
        if missing:
            self.violations.append(f"{len(missing)} acknowledged events are not at Segment")
        if len(self.acknowledged) != sent:
            self.violations.append(f"{sent - len(self.acknowledged)} events were never acknowledged")
        if self.segment.lost:
            self.violations.append(f"Segment silently dropped {len(self.segment.lost)} events")
        if any(number > 1 for number in kept.values()):
            self.violations.append("an event is at Segment twice, with two messageIds")
        costly = {outcome: n for outcome, n in outcomes.items() if outcome in COST_AN_HOUR}
        if costly:
            self.violations.append(f"answers that cost an hour: {costly}")
        unknown = {outcome for outcome in outcomes if not accepted(outcome)} - {503, BROKEN, TIMED_OUT} - set(costly)
        if unknown:
            self.violations.append(f"undocumented answers: {unknown}")
        late = [at for webhook in webhooks for at in webhook.failed_at[TIMED_OUT] if not self._near_restart(at)]
        if late:
            self.violations.append(f"{len(late)} webhooks got no answer within {TIMEOUT:.0f} s, without a restart")
        broken = [at for webhook in webhooks for at in webhook.failed_at[BROKEN] if not self._near_kill(at)]
        if broken:
            self.violations.append(f"{len(broken)} connections broke although no worker was killed")
        rows = {
            "events sent": sent,
            "acknowledged with 200, all at Segment": sum(status == 200 for status in self.acknowledged.values()),
            "acknowledged with 202, all kept": sum(status == 202 for status in self.acknowledged.values()),
            "dead letters in the file": len(in_file),
            "answers 503": outcomes[503],
            "connections broken by kills": outcomes[BROKEN],
            "no answer in time, during a restart": outcomes[TIMED_OUT],
            "sent again by Customer.io": sum(webhook.retries for webhook in webhooks),
            "duplicates, dropped by Segment": self.segment.duplicates,
            "uploads": len(self.segment.requests),
            "events per upload": f"{sum(map(len, self.segment.uploads)) / max(1, len(self.segment.uploads)):.1f}",
            "slowest answer": f"{max(webhook.slowest for webhook in webhooks):.2f} s",
            "largest worker": f"{max((size for sizes in self.memory.values() for size in sizes), default=0):.0f} MB",
            **dict(self.done),
            "Segment's faults": ", ".join(f"{name} {n}" for name, n in sorted(self.faults.items())),
        }
        for name, value in rows.items():
            print(f"  {name:38} {value}")

    def _near_restart(self, at: float) -> bool:
        # No worker accepts while the old ones finish and the new ones start, which can take longer than TIMEOUT.
        return any(began <= at <= served + TIMEOUT for began, served in self.restarts)

    def _near_kill(self, at: float) -> bool:
        # A killed worker's connections break at once, but a webhook notices when it sends the next event.
        return any(killed <= at <= killed + 10 for killed in self.kills)


def main() -> None:
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 60
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else random.SystemRandom().randrange(10**6)
    repeat = f"make soak SECONDS={seconds:.0f} SEED={seed}"
    print(f"Soaking for {seconds:.0f} s with seed {seed}. To repeat: {repeat}", flush=True)
    soak = Soak(seconds, seed)
    passed = soak.run()
    for violation in soak.violations[:20]:
        print(f"BROKEN: {violation}")
    if not passed:
        print("The end of the relay's log:", *(line[:200] for line in soak.relay.log.splitlines()[-50:]), sep="\n  ")
    print("Nothing lost." if passed else f"{len(soak.violations)} promises broken.")
    sys.exit(0 if passed else 1)


if __name__ == "__main__":
    main()
