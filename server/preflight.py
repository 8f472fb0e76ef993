"""What the system must grant before the relay can start: files to open, to append to and to trust, and a port.

gunicorn.conf.py imports it before gevent patches the standard library, so it imports no threads.
"""

import errno
import os
import pwd
import re
import resource
import shlex
import socket
import ssl
import sys
import time
from collections.abc import Iterable
from pathlib import Path

from relay.letter_file import open_private

CONNECTIONS = 2000  # a worker
FEWEST_CONNECTIONS = 100
OTHER_FILES = 200  # uploads and their idle connections (50), dead letters, look-ups of names, and a worker's own
WANTED_FILES = CONNECTIONS + OTHER_FILES
NEEDED_FILES = FEWEST_CONNECTIONS + OTHER_FILES


def connections() -> int:
    """Return how many connections a worker can hold, with as many open files as it may have."""
    return min(CONNECTIONS, raise_file_limit() - OTHER_FILES)


def raise_file_limit() -> int:
    """Raise the usual limit, 1,024 open files, to what is needed where that's allowed. Return the limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < WANTED_FILES:
        soft = WANTED_FILES if hard == resource.RLIM_INFINITY else min(WANTED_FILES, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return WANTED_FILES if soft == resource.RLIM_INFINITY else soft


def open_files_problem() -> str | None:
    """Return what is wrong with the limit of open files, or None."""
    limit = raise_file_limit()
    if limit >= NEEDED_FILES:
        return None
    return f"The limit of open files (ulimit -n) is {limit}. The relay needs {NEEDED_FILES}; {WANTED_FILES} are better."


def other_server_problem() -> str:
    """Return the message for a gunicorn that doesn't run the relay as gunicorn.conf.py says."""
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


def file_problem(path: str, create: bool = True) -> str | None:
    """Return why dead letters can't be appended to `path`, or None, with the path and the user.

    Creates the file if it is missing and `create`.
    """
    problem = _file_problem(path, create)
    return f"{problem} ({path}, as the user {_user()})" if problem else None


def _user() -> str:
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:  # a container's, which has no name
        return str(os.geteuid())


def _file_problem(path: str, create: bool) -> str | None:
    try:
        if not create and not os.path.lexists(path):
            folder = os.path.dirname(path) or "."
            os.stat(folder)
            return None if os.access(folder, os.W_OK | os.X_OK) else os.strerror(errno.EACCES)
        os.close(open_private(path))
    except (OSError, ValueError) as error:
        return getattr(error, "strerror", None) or "not a path"
    return None


def bundle_problem(path: str) -> str | None:
    """Return why the certificates in `path`, a file or a folder, can't be loaded, or None."""
    try:
        if not os.path.isdir(path):
            ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(path)
        elif not any(re.fullmatch(r"[0-9a-f]{8}\.[0-9]+", name) for name in os.listdir(path)):
            return "the folder has none, or `openssl rehash` wasn't run on it"
    except ssl.SSLError:
        return "none is in the file"
    except (OSError, ValueError) as error:
        return getattr(error, "strerror", None) or "not a path"
    return None


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
