"""What the system must grant before the relay can start: files to open, to append to and to trust, and a port.

gunicorn.conf.py imports it before gevent patches the standard library, so it imports no threads.
"""

import errno
import os
import re
import resource
import socket
import ssl
import stat
from collections.abc import Iterable

CONNECTIONS = 2000  # a worker
FEWEST_CONNECTIONS = 100
OTHER_FILES = 124  # uploads, dead letters, and a worker's own


def connections() -> int:
    """Return how many connections a worker can hold. Raises the usual limit, 1,024 open files, where that's allowed."""
    wanted = CONNECTIONS + OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return CONNECTIONS if soft == resource.RLIM_INFINITY else min(wanted, soft) - OTHER_FILES


def open_files_problem() -> str | None:
    """Return what is wrong with the limit of open files, or None."""
    if (possible := connections()) >= FEWEST_CONNECTIONS:
        return None
    return (
        f"The limit of open files (ulimit -n) is {possible + OTHER_FILES}. The relay needs "
        f"{FEWEST_CONNECTIONS + OTHER_FILES}; {CONNECTIONS + OTHER_FILES} are better."
    )


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


def port_problem(addresses: Iterable[object]) -> str | None:
    """Return what is wrong with the addresses to listen on, each (host, port), or None."""
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
