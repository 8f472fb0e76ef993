"""What the system must grant before the relay can start: files to open, a file to append to, and a port.

gunicorn.conf.py imports it before gevent patches the standard library, so it imports no threads.
"""

import errno
import os
import resource
import shlex
import socket
import stat
import sys
import time
from collections.abc import Iterable
from functools import cache
from pathlib import Path

CONNECTIONS = 2000  # a worker
FEWEST_CONNECTIONS = 100
# A connection's webhook needs an upload to itself, over a connection of its own, once a rejected batch is halved.
FILES_A_CONNECTION = 2
OTHER_FILES = 124  # dead letters, look-ups of names, and a worker's own


def files(connections: int) -> int:
    """Return how many files a worker with that many connections opens at most."""
    return FILES_A_CONNECTION * connections + OTHER_FILES


def connections() -> int:
    """Return how many connections a worker can hold. Raises the usual limit, 1,024 open files, where that's allowed."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = files(CONNECTIONS)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return CONNECTIONS if soft == resource.RLIM_INFINITY else (min(wanted, soft) - OTHER_FILES) // FILES_A_CONNECTION


def open_files_problem() -> str | None:
    """Return what is wrong with the limit of open files, or None."""
    if connections() >= FEWEST_CONNECTIONS:
        return None
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return (
        f"The limit of open files (ulimit -n) is {limit}. The relay needs {files(FEWEST_CONNECTIONS)}; "
        f"{files(CONNECTIONS)} are better."
    )


def other_server_problem() -> str:
    """Return what to type instead when gunicorn runs the relay in another way than gunicorn.conf.py says."""
    settings = Path(__file__).parent.parent / "gunicorn.conf.py"
    return (
        "gunicorn runs the relay only with the settings and the worker of its gunicorn.conf.py: type "
        f'gunicorn -c {shlex.quote(str(settings))} "app:create_app()", without --worker-class (-k) and --preload.'
    )


def require_our_worker() -> None:
    """End gunicorn, if that is what runs here: its settings are not the relay's.

    Another worker would serve, and look healthy, but hold webhooks up and end no slow ones.
    """
    if "gunicorn.arbiter" not in sys.modules or "SERVER_SOFTWARE" not in os.environ:
        return
    from gunicorn.errors import AppImportError

    class OtherServerError(AppImportError, RuntimeError):  # type: ignore[misc]  # gunicorn has no types
        """The first ends gunicorn from a worker; the second, with --preload, its master."""

    raise OtherServerError(f"The relay cannot start:\n  - {other_server_problem()}")


@cache
def terminal() -> int:
    """Return a descriptor of standard error where gunicorn was started, from before -D sends it elsewhere."""
    return os.dup(2)


def file_problem(path: str, create: bool = True) -> str | None:
    """Return why dead letters can't be appended to `path`, or None. Creates the file if it is missing and `create`."""
    try:
        try:
            mode = os.stat(path).st_mode  # before opening: a named pipe would wait until somebody reads
        except FileNotFoundError:
            if not create:
                folder = os.path.dirname(path) or "."
                os.stat(folder)
                return None if os.access(folder, os.W_OK | os.X_OK) else os.strerror(errno.EACCES)
        else:
            if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
                return "it is not a regular file"
        os.close(open_private(path))
    except (OSError, ValueError) as error:
        return getattr(error, "strerror", None) or "not a path"
    return None


def open_private(path: str) -> int:
    """Open a file to append to, readable by its owner only: dead letters are personal data."""
    return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)


def port_problem(addresses: Iterable[object], seconds: float = 0) -> str | None:
    """Return what is wrong with the addresses to listen on, each (host, port), or None.

    The workers of a gunicorn that was killed need a moment to stop listening: wait `seconds` for them.
    """
    deadline = time.monotonic() + seconds
    while (problem := _port_problem(addresses)) and time.monotonic() < deadline:
        time.sleep(0.1)
    return problem


def _port_problem(addresses: Iterable[object]) -> str | None:
    for address in addresses:
        if not isinstance(address, tuple):  # a Unix socket
            continue
        host, port = address[:2]
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                listener.bind((host, port))
            except OSError as error:
                if error.errno == errno.EADDRINUSE:
                    return f"Port {port} is taken by another program: set PORT= to another one."
    return None
