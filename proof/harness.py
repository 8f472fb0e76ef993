"""Start, measure and stop a relay under gunicorn, for the tests, the soak and the benchmark."""

import contextlib
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

ROOT = Path(__file__).parent.parent
WRITE_KEY = "0123456789abcdefghijklmnopqrstuv"
SIGNING_KEY = "a-signing-key-of-the-tests"
KEYS = {"SEGMENT_WRITE_KEY": WRITE_KEY, "CUSTOMERIO_SIGNING_KEY": SIGNING_KEY}
APP = "app:create_app()"
GUNICORN = str(Path(sys.executable).parent / "gunicorn")


given: set[int] = set()


def free_port() -> int:
    """Return a port that is free, and that nobody else takes before it is used.

    Outgoing connections get theirs from 32,768 up; each of pytest's processes has ports of its own.
    Chromium refuses to open 10,080.
    """
    process = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    while True:
        port = random.randrange(10_096, 32_000, 16) + process % 16  # noqa: S311 - no secret
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            if port not in given:
                given.add(port)
                return port


def until(happened: Callable[[], Any], seconds: float = 10) -> None:
    """Wait until `happened()` is true; raise AssertionError if it isn't within `seconds`."""
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


def answers(url: str) -> bool:
    """Return whether an HTTP server answers at `url`, with any status."""
    try:
        with urllib.request.urlopen(url, timeout=5):  # noqa: S310 - ours
            return True
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False


class Relay:
    """A relay, or any other server that takes its port from PORT, as a process with workers.

    `env` is its whole environment except for PATH and PORT. With a `listener` the relay starts as
    under systemd, which holds the socket, so that a restart refuses no connection.
    """

    def __init__(
        self,
        env: dict[str, str],
        command: Sequence[str] = (APP,),
        listener: socket.socket | None = None,
        wait: bool = True,
        program: Sequence[str] = (GUNICORN,),
        folder: Path = ROOT,
    ) -> None:
        self.port = listener.getsockname()[1] if listener else int(env.get("PORT") or free_port())
        self.url = f"http://127.0.0.1:{self.port}"
        self.env = {"PATH": os.environ["PATH"], "PORT": str(self.port), "PYTHONUNBUFFERED": "1"} | env
        self._command = [*program, *command]
        self._folder = folder
        self._listener = listener
        self._output: list[str] = []
        self.reading = threading.Event()  # its log; until it is cleared
        self.reading.set()
        self.start(wait)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def start(self, wait: bool = True) -> None:
        """Start the process, or start it again, and wait until it serves."""
        command, fds, env = self._command, [], self.env
        if self._listener:
            # systemd's protocol: the socket is descriptor 3, and LISTEN_PID the process it is for.
            fd = self._listener.fileno()
            script = (
                f"import os, sys; os.dup2({fd}, 3); {fd} == 3 or os.close({fd}); "
                "os.environ['LISTEN_PID'] = str(os.getpid()); os.execvp(sys.argv[1], sys.argv[1:])"
            )
            command, fds, env = [sys.executable, "-c", script, *command], [fd], env | {"LISTEN_FDS": "1"}
        self.process = subprocess.Popen(
            command, cwd=self._folder, env=env, pass_fds=fds, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        if wait:
            try:
                until(self._serves, 20)
            except BaseException:
                self.kill()  # the caller has no object to do it with
                raise

    def _read(self) -> None:
        assert self.process.stdout
        with self.process.stdout:
            for line in self.process.stdout:
                self._output.append(line.decode(errors="replace"))
                self.reading.wait()

    def _serves(self) -> bool:
        assert self.process.poll() is None, self.log
        return answers(self.url + "/health")

    @property
    def log(self) -> str:
        return "".join(self._output)

    def whole_log(self) -> str:
        """Return the complete log of a process that is ending."""
        self.process.wait(10)
        self._reader.join(10)
        return self.log

    def workers(self) -> list[int]:
        """Return the workers' process ids."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        with contextlib.suppress(OSError):  # it has just ended
            return [int(pid) for pid in children.read_text().split()] if self.process.poll() is None else []
        return []

    def cpu(self) -> float:
        """Return the CPU seconds that the process and its workers have used."""
        ticks = 0
        for pid in [self.process.pid, *self.workers()]:
            fields = Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1].split()
            ticks += int(fields[11]) + int(fields[12])
        return ticks / os.sysconf("SC_CLK_TCK")

    def memory(self) -> float:
        """Return the proportional set size of the whole service, in MB."""
        return sum(megabytes(pid) for pid in [self.process.pid, *self.workers()])

    def stop(self, seconds: float = 30) -> float:
        """Stop it with SIGTERM, or kill it after `seconds`; return how many seconds it took."""
        started = time.monotonic()
        self.process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(seconds)
        self.kill()
        return time.monotonic() - started

    def kill(self) -> None:
        """Kill it and its workers, and read its log to the end."""
        self.reading.set()
        for pid in [self.process.pid, *self.workers()] if self.process.poll() is None else []:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait(10)
        self._reader.join(10)


def megabytes(pid: int) -> float:
    """Return the proportional set size of a process."""
    found = re.search(r"Pss:\s+(\d+)", Path(f"/proc/{pid}/smaps_rollup").read_text())
    return int(found[1]) / 1024 if found else 0.0
