"""Nothing lost behind a proxy: each configuration of docs/proxies, before relays that are killed (`make soak-proxies`).

Several webhooks send at once through the proxy, over TLS. Meanwhile the relay behind it is restarted,
and it or its workers are killed. A last run has two relays behind HAProxy, one of which is always
there. Exits 1 if an event was lost, or if Customer.io saw an answer that costs an hour, a broken
connection or a timeout.

    python proof/soak_proxies.py [SECONDS]
"""

import contextlib
import itertools
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests
from fake_customerio import Webhook
from fake_segment import FakeSegment
from harness import APP, KEYS, ROOT, SIGNING_KEY, WRITE_KEY, Relay, free_port, until

sys.path.insert(0, str(ROOT))
from translate import namespace

WEBHOOKS = 16
SPEED = 3600.0  # an hour of Customer.io's takes a second
LONGEST_PAUSE = 1.0  # seconds between two deliveries while one of two relays is there
NAMESPACE = f"customerio-{namespace(WRITE_KEY)}-"
PATH = os.environ["PATH"] + ":/usr/sbin:/usr/local/sbin"  # Debian keeps nginx and HAProxy there

# No redirects on port 80, no API on port 2019.
CADDY_ON_LOOPBACK = "default_bind 127.0.0.1\nauto_https disable_redirects\nadmin off"


@dataclass
class Proxy:
    """How to try a file of docs/proxies: what to replace in it, and the command that runs it."""

    file: str
    command: str
    replace: dict[str, str]

    def config(self, **values: object) -> str:
        """Return the file with the addresses and the certificate of this run."""
        text = (ROOT / "docs/proxies" / self.file).read_text()
        values["request_buffers"] = request_buffers()
        for documented, tried in self.replace.items():
            assert documented in text, f"docs/proxies/{self.file} no longer has {documented!r}"
            text = text.replace(documented, tried.format(**values))
        return text

    def start(self, program: str, folder: Path, port: int, relay1: int, second: str = "") -> Relay:
        """Start `program` with that file and wait for nothing; it is a server like any other."""
        file = folder / self.file
        file.write_text(self.config(port=port, folder=folder, relay1=relay1, second=second))
        command = shlex.split(self.command.format(config=file, folder=folder))
        return Relay({"HOME": str(folder), "PORT": str(port)}, command, wait=False, program=[program])


def request_buffers() -> str:
    """Return how the installed Caddy spells this; Debian 12's, 2.6.2, has an older way."""
    caddy = shutil.which("caddy")
    version = subprocess.run([caddy, "version"], capture_output=True, text=True, check=False).stdout if caddy else ""
    return (
        "buffer_requests\n\t\tmax_buffer_size 9MB" if version.startswith(("2.6.2", "v2.6.2")) else "request_buffers 9MB"
    )


PROXIES = {
    "caddy": Proxy(
        "Caddyfile",
        "run --adapter caddyfile --config {config}",
        {
            "relay.example.com {": "{{\n" + CADDY_ON_LOOPBACK + "\n}}\nhttps://127.0.0.1:{port} {{",
            "# tls /etc/ssl/relay.pem /etc/ssl/relay.key": "tls {folder}/cert.pem {folder}/key.pem",
            "127.0.0.1:8080": "127.0.0.1:{relay1}",
            "request_buffers 9MB": "{request_buffers}",
        },
    ),
    "nginx": Proxy(
        "nginx.conf",
        "-c {config} -e stderr -g 'daemon off; pid {folder}/nginx.pid;'",
        {
            "user www-data;": "",
            "http {": "http {{ client_body_temp_path {folder}/bodies; proxy_temp_path {folder}/answers;",
            "listen 443": "listen 127.0.0.1:{port}",
            "/etc/letsencrypt/live/relay.example.com/fullchain.pem": "{folder}/cert.pem",
            "/etc/letsencrypt/live/relay.example.com/privkey.pem": "{folder}/key.pem",
            "127.0.0.1:8080": "127.0.0.1:{relay1}",
        },
    ),
    "haproxy": Proxy(
        "haproxy.cfg",
        "-db -f {config}",
        {
            "user haproxy": "",
            "group haproxy": "",
            "abns@relay": "abns@relay-{port}",
            "bind :443": "bind 127.0.0.1:{port}",
            "/etc/haproxy/relay.example.com.pem": "{folder}/both.pem",
            "127.0.0.1:8080": "127.0.0.1:{relay1}",
            "# server relay2 127.0.0.1:8081": "{second}",
        },
    ),
}

RUNS = [("caddy", 1), ("nginx", 1), ("haproxy", 1), ("haproxy", 2)]  # a proxy, and the number of relays


def certificate(folder: Path, openssl: str) -> None:
    """Make a certificate for 127.0.0.1 that this process trusts."""
    names = ["-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1", "-days", "1"]
    files = ["-keyout", str(folder / "key.pem"), "-out", str(folder / "cert.pem")]
    command = [openssl, "req", "-x509", "-nodes", "-newkey", "rsa:2048", *names, *files]
    subprocess.run(command, check=True, capture_output=True)
    (folder / "both.pem").write_text((folder / "cert.pem").read_text() + (folder / "key.pem").read_text())
    os.environ["REQUESTS_CA_BUNDLE"] = str(folder / "cert.pem")


def delivered(relay: Relay) -> int:
    """Return how many webhooks a relay has delivered since it started."""
    found = re.search(r'outcome="delivered",reason=""} (\d+)', requests.get(relay.url + "/metrics", timeout=5).text)
    return int(found[1]) if found else 0


class Soak:
    """One proxy before one relay, or before two of which only one is killed at a time."""

    def __init__(self, name: str, program: str, folder: Path, number_of_relays: int = 1) -> None:
        self.proxy = PROXIES[name]
        self.program = program
        self.folder = folder
        self.number_of_relays = number_of_relays
        self.port = free_port()
        self.url = f"https://127.0.0.1:{self.port}/webhook"
        self.done: Counter[str] = Counter()
        self.longest_pause = 0.0
        self.violations: list[str] = []
        self.acknowledged: set[str] = set()
        self.delivered_at: list[float] = []  # on the monotonic clock
        self._finished = threading.Event()

    def run(self, seconds: float) -> None:
        with contextlib.ExitStack() as stack:
            self.segment = stack.enter_context(FakeSegment(latency=0.02))
            self.relays = [stack.enter_context(self._relay()) for _ in range(self.number_of_relays)]
            proxy = stack.enter_context(self._start_proxy())
            until(self._serves, 20)
            self._soak(seconds)
            proxy.stop(5)
        if self.violations:
            print("The end of the proxy's log:", *(line[:200] for line in proxy.log.splitlines()[-20:]), sep="\n  ")

    def _relay(self) -> Relay:
        port = str(free_port())
        env = KEYS | {"SEGMENT_HOST": self.segment.url, "PORT": port, "LOG_LEVEL": "error"}
        return Relay(env, [APP, "--bind", f"127.0.0.1:{port}"])

    def _start_proxy(self) -> Relay:
        second = f"server relay2 127.0.0.1:{self.relays[1].port}" if len(self.relays) == 2 else ""
        return self.proxy.start(self.program, self.folder, self.port, self.relays[0].port, second)

    def _serves(self) -> bool:
        with contextlib.suppress(requests.RequestException):
            return requests.get(self.url.replace("webhook", "health"), timeout=4).status_code == 200
        return False

    def _soak(self, seconds: float) -> None:
        webhooks = [Webhook(self.url, SIGNING_KEY, self._events(number), SPEED) for number in range(WEBHOOKS)]
        for webhook in webhooks:
            webhook.on_accepted = self._check_earned
            webhook.start()
        end = time.monotonic() + seconds
        breaks = self._kill_one_of_two if len(self.relays) == 2 else self._break_the_relay
        for turn in itertools.count():
            breaks(turn)
            if time.monotonic() > end:
                break
        self._finished.set()
        deadline = time.monotonic() + 30
        if not all(webhook.join(max(0.1, deadline - time.monotonic())) for webhook in webhooks):
            self.violations.append("Customer.io still has events to send, half a minute after the last kill")
        self._count(webhooks)

    def _events(self, number: int) -> Iterator[dict[str, Any]]:
        """Yield a webhook's events until time is up; one in fifty is of 1 MB."""
        for position in itertools.count(1):
            if self._finished.is_set():
                return
            large = (position + number) % 50 == 0
            self.done["events of 1 MB"] += large
            yield {
                "event_id": f"{number}-{position}",
                "object_type": "email",
                "metric": "opened",
                "timestamp": 1585250199,
                "data": {"customer_id": f"{number}", "content": "x" * (1_000_000 if large else 100)},
            }

    def _check_earned(self, event: dict[str, Any], status: int) -> None:
        """Check a 2xx the moment it arrives: a 200 has to be true by then."""
        identity = event["event_id"]
        self.acknowledged.add(identity)
        self.delivered_at.append(time.monotonic())
        if NAMESPACE + identity not in self.segment.kept:
            self.violations.append(f"{status} for {identity} before Segment had it")

    def _break_the_relay(self, turn: int) -> None:
        """Kill a worker, kill all workers, restart the relay, or kill it, in this order."""
        (relay,) = self.relays
        time.sleep(0.5)
        match turn % 4:
            case 0 | 1 as every:
                for pid in relay.workers()[: 2 if every else 1]:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                    self.done["workers killed"] += 1
            case 2:
                relay.stop()
                self.done["restarts"] += 1
            case 3:
                relay.kill()
                self.done["relays killed"] += 1
        if relay.process.poll() is not None:
            self._check_answer_without_a_relay()
            time.sleep(0.5)
            relay.start()

    def _check_answer_without_a_relay(self) -> None:
        """Check that the proxy asks for a retry, and breaks no connection in the middle of a large body."""
        for size in (2, 1_000_000, 8_000_000):
            try:
                answer = requests.post(self.url, b" " * size, timeout=4)
                seen = f"{answer.status_code}, Retry-After {answer.headers.get('Retry-After')}"
            except requests.RequestException as error:
                seen = type(error).__name__
            if seen != "503, Retry-After 10":
                self.violations.append(f"without a relay, {size} bytes: {seen}")

    def _kill_one_of_two(self, turn: int) -> None:
        """Kill one relay, let the other one work alone, and check that the first takes part again."""
        relay = self.relays[turn % 2]
        time.sleep(0.5)
        began = time.monotonic()
        relay.kill()
        self.done["relays killed"] += 1
        time.sleep(3)
        relay.start()
        try:
            until(lambda: delivered(relay) > 0)
            self.done["relays back at work"] += 1
        except AssertionError:
            self.violations.append("a relay that came back got no webhooks")
        times = [began, *(at for at in list(self.delivered_at) if at > began), time.monotonic()]
        pause = max(after - before for before, after in itertools.pairwise(times))
        self.longest_pause = max(self.longest_pause, pause)

    def _count(self, webhooks: list[Webhook]) -> None:
        outcomes = sum((webhook.outcomes for webhook in webhooks), Counter[Any]())
        others = {outcome: number for outcome, number in outcomes.items() if outcome not in (200, 503)}
        kept = Counter(self.segment.events())
        sent = sum(webhook.sent for webhook in webhooks)
        missing = self.acknowledged - kept.keys()
        promises = {
            f"{sent - len(self.acknowledged)} events were never acknowledged": sent == len(self.acknowledged),
            f"{len(missing)} acknowledged events are not at Segment": not missing,
            f"Segment silently dropped {len(self.segment.lost)} events": not self.segment.lost,
            "an event is at Segment twice, with two messageIds": all(number == 1 for number in kept.values()),
            # All statuses that cost an hour, and connections that broke or got no answer in 4 s.
            f"answers other than 200 and 503: {others}": not others,
        }
        rows = {
            "events sent": sent,
            "acknowledged, all at Segment": len(self.acknowledged),
            "answers 503": outcomes[503],
            "other answers, broken, timed out": sum(others.values()),
            "duplicates, dropped by Segment": self.segment.duplicates,
            "slowest answer": f"{max(webhook.slowest for webhook in webhooks):.2f} s",
            **self.done,
        }
        if len(self.relays) == 2:
            rows["longest pause with one relay down"] = f"{self.longest_pause:.2f} s"
            promises |= {
                f"no event was delivered for {self.longest_pause:.1f} s": self.longest_pause <= LONGEST_PAUSE,
                # One for each webhook that the killed relay had.
                f"{outcomes[503]} answers 503": outcomes[503] <= WEBHOOKS * self.done["relays killed"],
            }
        for name, value in rows.items():
            print(f"  {name:38} {value}", flush=True)
        self.violations += [what for what, holds in promises.items() if not holds]


def main() -> None:
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 20
    openssl = shutil.which("openssl")
    tried = broken = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o711)  # nginx's workers have another user
        if openssl:
            certificate(folder, openssl)
        for proxy, relays in RUNS:
            program = shutil.which(proxy, path=PATH)
            if not program or not openssl:
                print(f"{proxy if openssl else 'openssl'} is not installed: skipped.")
                continue
            print(f"{proxy} before {relays} relay{'s'[: relays - 1]}, for {seconds:.0f} s:", flush=True)
            soak = Soak(proxy, program, folder, relays)
            soak.run(seconds)
            for violation in soak.violations[:20]:
                print(f"BROKEN: {violation}")
            tried += 1
            broken += len(soak.violations)
    if tried:
        print(f"{broken} promises broken." if broken else "Nothing lost.")
    sys.exit(1 if broken else 0)


if __name__ == "__main__":
    main()
