"""Nothing lost, whatever happens: a real relay between a fake Customer.io and a failing Segment (`make soak`).

Many webhooks send at once, as fast as they are answered, while Segment goes through all its
faults, workers are killed, the relay is reloaded, and the whole service is restarted. Then the
faults end, what is left is sent, and everything is counted. Exits 1 if a single promise is broken.

    python proof/soak.py [SECONDS] [SEED]
"""

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fake_customerio import BROKEN, COST_AN_HOUR, TIMED_OUT, Webhook, accepted
from fake_segment import FakeSegment

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from translate import namespace  # noqa: E402 - found only now

KEY = "a-signing-key-of-the-soak"
WRITE_KEY = "0123456789abcdefghijklmnopqrstuv"
WEBHOOKS = 48
WORKERS = 2
# An hour of Customer.io's passes in a second.
SPEED = 3600.0
POISON = "customerio:email_poisoned"
NAMESPACE = f"customerio-{namespace(WRITE_KEY)}-"

FAULTS = [
    None, "500", "502", "503", "408", "429:1", "401", "403", "404", "hang", "hang-after", "reset", "reset-after",
    "close", "drip", "garbage", "html", "redirect", "redirect-307", "false", "refuse", "cut",
]  # fmt: skip


class Service:
    """The relay as systemd runs it: somebody else holds the socket, so that a restart refuses nobody."""

    def __init__(self, segment_url: str) -> None:
        self.socket = socket.create_server(("127.0.0.1", 0), backlog=2048)
        self.port = self.socket.getsockname()[1]
        self.log = Path(os.environ.get("SOAK_LOG", os.devnull)).open("ab")  # noqa: SIM115 - closed in stop()
        self.env = {
            "PATH": os.environ["PATH"],
            "SEGMENT_WRITE_KEY": WRITE_KEY,
            "SEGMENT_HOST": segment_url,
            "CUSTOMERIO_SIGNING_KEY": KEY,
            "WEB_CONCURRENCY": str(WORKERS),
            "LISTEN_FDS": "1",
        }
        self.start()

    def start(self) -> None:
        gunicorn = str(Path(sys.executable).parent / "gunicorn")
        listener = self.socket.fileno()
        # LISTEN_PID is the process that the socket is for, known only once it runs; the socket is its descriptor 3.
        script = (
            f'exec 3<&{listener}; [ {listener} = 3 ] || exec {listener}<&-; LISTEN_PID=$$ exec "{gunicorn}" app:app'
        )
        self.process = subprocess.Popen(
            ["/bin/sh", "-c", script],
            cwd=ROOT,
            env=self.env,
            pass_fds=[listener],
            stdout=self.log,
            stderr=self.log,
        )

    def restart(self) -> float:
        """Stop it and start it again; return the seconds that stopping took."""
        started = time.monotonic()
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(30)
        stopped = time.monotonic()
        self.start()
        return stopped - started

    def workers(self) -> list[int]:
        with contextlib.suppress(OSError):
            children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
            return [int(pid) for pid in children.split()]
        return []

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            for pid in [*self.workers(), self.process.pid]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        self.log.close()
        self.socket.close()


def megabytes(pid: int) -> float:
    return int(Path(f"/proc/{pid}/smaps_rollup").read_text().split("Pss:")[1].split()[0]) / 1024


def count(pid: int, what: str) -> int:
    return len(os.listdir(f"/proc/{pid}/{what}"))


class Soak:
    def __init__(self, seconds: float, seed: int) -> None:
        self.seconds = seconds
        self.random = random.Random(seed)  # noqa: S311 - to be repeated, not to be secret
        self.done: Counter[str] = Counter()
        self.faults: Counter[str] = Counter()
        self.violations: list[str] = []
        self.acknowledged: dict[str, int] = {}
        self.memory: dict[int, list[float]] = {}
        self.chaos_at: list[float] = []  # when something was killed
        self._finished = threading.Event()

    def run(self) -> bool:
        with FakeSegment(latency=0.02) as self.segment:
            self.segment.poison = {POISON}
            self.service = Service(self.segment.url)
            try:
                return self._run()
            finally:
                self.service.stop()

    def _run(self) -> bool:
        url = f"http://127.0.0.1:{self.service.port}/webhook"
        webhooks = [Webhook(url, KEY, self._events(number), SPEED) for number in range(WEBHOOKS)]
        for webhook in webhooks:
            webhook.on_accepted = self._check_earned
            webhook.start()
        watcher = threading.Thread(target=self._watch_memory)
        watcher.start()
        self._break_things()
        self._finished.set()
        self.segment.set_fault(None)
        deadline = time.monotonic() + 60
        finished = sum(webhook.join(max(0.1, deadline - time.monotonic())) for webhook in webhooks) == WEBHOOKS
        watcher.join()
        if not finished:
            self.violations.append("Customer.io still holds events, a minute after all faults ended")
        self._check_leaks()
        self._count(webhooks)
        return not self.violations

    def _events(self, number: int) -> Iterator[dict[str, Any]]:
        """Yield a webhook's events until the time is over; one in two hundred is one that Segment refuses."""
        choice = random.Random(number)  # noqa: S311
        position = 0
        while not self._finished.is_set():
            position += 1
            yield {
                "event_id": f"{number}-{position}",
                "object_type": "email",
                "metric": "poisoned" if choice.random() < 0.005 else "opened",
                "timestamp": 1585250199,
                "data": {"customer_id": f"{number}", "subject": "x" * choice.choice([10, 100, 1000, 20_000])},
            }

    def _check_earned(self, event: dict[str, Any], status: int) -> None:
        """Called with each 2xx, at once: a 200 has to be true already."""
        identity = event["event_id"]
        self.acknowledged[identity] = status
        if status == 200 and NAMESPACE + identity not in self.segment.kept:
            self.violations.append(f"200 for {identity} before Segment had it")
        if (status == 202) != (event["metric"] == "poisoned"):
            self.violations.append(f"{status} for {identity}, whose metric is {event['metric']}")

    def _break_things(self) -> None:
        end = time.monotonic() + self.seconds
        faults = list(FAULTS)
        self.random.shuffle(faults)
        time.sleep(1)
        while time.monotonic() < end:
            if not faults:
                faults = list(FAULTS)
                self.random.shuffle(faults)
            fault = faults.pop()
            self.faults[fault or "none"] += 1
            self.segment.set_fault(fault, share=self.random.choice([0.3, 1.0]))
            time.sleep(self.random.uniform(0.2, 0.8))
            self.segment.set_fault(None)
            time.sleep(self.random.uniform(0.1, 0.4))
            what = self.random.choices(["nothing", "kill", "reload", "restart"], [6, 4, 1, 1])[0]
            if what == "kill" and (workers := self.service.workers()):
                self.chaos_at.append(time.monotonic())
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self.random.choice(workers), signal.SIGKILL)
                self.done["workers killed"] += 1
            elif what == "reload":
                self.service.process.send_signal(signal.SIGHUP)
                self.done["reloads"] += 1
            elif what == "restart":
                # Answers take 3.5 s at the most; at 10 s gunicorn kills, and hangs up on whoever is left.
                if (took := self.service.restart()) > 9:
                    self.violations.append(f"the service took {took:.1f} s to stop")
                self.done["restarts of the service"] += 1

    def _watch_memory(self) -> None:
        while not self._finished.wait(0.5):
            for pid in self.service.workers():
                with contextlib.suppress(OSError, IndexError):
                    self.memory.setdefault(pid, []).append(megabytes(pid))

    def _check_leaks(self) -> None:
        """Once all is quiet, a worker has the threads, connections and memory that an idle one has."""
        time.sleep(1)
        for pid in self.service.workers():
            # gevent: the main thread, and at most ten for name look-ups and files.
            threads, files = count(pid, "task"), count(pid, "fd")
            if threads > 12:
                self.violations.append(f"an idle worker has {threads} threads")
            # One for each webhook's connection and each upload's (30), and some 15 that it always has.
            if files > WEBHOOKS + 60:
                self.violations.append(f"an idle worker has {files} open files")
        for samples in self.memory.values():
            # Samples are half a second apart: warm after five, and allowed a burst of large events.
            if len(samples) > 20 and samples[-1] > samples[10] + 25:
                self.violations.append(f"a worker grew from {samples[10]:.0f} to {samples[-1]:.0f} MB")

    def _count(self, webhooks: list[Webhook]) -> None:
        outcomes: Counter[Any] = Counter()
        for webhook in webhooks:
            outcomes.update(webhook.outcomes)
            self.violations += [f"dropped: {event['event_id']}" for event in webhook.dropped]
        kept = Counter(message["context"]["event_id"] for message in self.segment.kept.values())
        missing = [identity for identity, status in self.acknowledged.items() if status == 200 and not kept[identity]]
        sent = sum(webhook.sent for webhook in webhooks)
        if missing:
            self.violations.append(f"{len(missing)} events acknowledged and not at Segment")
        if len(self.acknowledged) != sent:
            self.violations.append(f"{sent - len(self.acknowledged)} events never acknowledged")
        if self.segment.lost:
            self.violations.append(f"{len(self.segment.lost)} events that Segment dropped in silence")
        if any(number > 1 for number in kept.values()):
            self.violations.append("an event is at Segment twice, after dedup")
        costly = {outcome: n for outcome, n in outcomes.items() if outcome in COST_AN_HOUR}
        if costly:
            self.violations.append(f"answers that cost an hour: {costly}")
        unknown = {outcome for outcome in outcomes if not accepted(outcome)} - {503, BROKEN, TIMED_OUT} - set(costly)
        if unknown:
            self.violations.append(f"answers that are not documented: {unknown}")
        if outcomes[TIMED_OUT]:
            self.violations.append(f"{outcomes[TIMED_OUT]} webhooks without an answer in four seconds")
        unforced = [at for webhook in webhooks for at in webhook.broken_at if not self._near_kill(at)]
        if unforced:
            self.violations.append(f"{len(unforced)} connections broken without a worker having been killed")
        rows = {
            "events sent": sent,
            "acknowledged with 200, all at Segment": sum(status == 200 for status in self.acknowledged.values()),
            "dead letters, refused by Segment": sum(status == 202 for status in self.acknowledged.values()),
            "answers 503": outcomes[503],
            "connections broken by a kill": outcomes[BROKEN],
            "sent again by Customer.io": sum(webhook.retries for webhook in webhooks),
            "duplicates, dropped by Segment": self.segment.duplicates,
            "uploads": len(self.segment.requests),
            "events per upload": f"{sum(map(len, self.segment.uploads)) / max(1, len(self.segment.uploads)):.1f}",
            "slowest answer": f"{max(webhook.slowest for webhook in webhooks):.2f} s",
            "largest worker": f"{max((size for sizes in self.memory.values() for size in sizes), default=0):.0f} MB",
            **dict(self.done),
            "faults of Segment": ", ".join(f"{name} {n}" for name, n in sorted(self.faults.items())),
        }
        for name, value in rows.items():
            print(f"  {name:38} {value}")

    def _near_kill(self, at: float) -> bool:
        # A killed worker's connections end at once; that is noticed when the next webhook is sent on them.
        return any(killed <= at <= killed + 10 for killed in self.chaos_at)


def main() -> None:
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 60
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else random.SystemRandom().randrange(10**6)
    print(
        f"Soaking for {seconds:.0f} s, seed {seed}. To repeat: make soak SECONDS={seconds:.0f} SEED={seed}", flush=True
    )
    soak = Soak(seconds, seed)
    passed = soak.run()
    for violation in soak.violations[:20]:
        print(f"BROKEN: {violation}")
    print("Nothing lost." if passed else f"{len(soak.violations)} promises broken.")
    sys.exit(0 if passed else 1)


if __name__ == "__main__":
    main()
