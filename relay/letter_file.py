"""A file that lines are appended to, which only its owner can read."""

import errno
import fcntl
import os
import stat
from time import monotonic

from relay.outcomes import RetryLater

NOT_REGULAR = "it is not a regular file"


def open_private(path: str) -> int:
    """Open a regular file to append to, readable by its owner only: dead letters are personal data.

    Raise OSError if it is something else. O_NONBLOCK: a named pipe would wait until somebody reads.
    """
    try:
        file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY, 0o600)
    except OSError as error:
        if error.errno != errno.ENXIO:  # a socket
            raise
        raise OSError(error.errno, NOT_REGULAR) from None
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise OSError(errno.EINVAL, NOT_REGULAR)
    return file


def append(path: str, content: bytes, deadline: float) -> None:
    """Append `content` as a line of its own and flush it to disk, or leave the file as it was and raise OSError.

    After `deadline` nobody waits for it, and the event will come again: write nothing, and raise RetryLater.
    """
    # Opened anew each time, so that the file may be moved away at any moment.
    file = open_private(path)
    try:
        fcntl.flock(file, fcntl.LOCK_EX)  # other workers append too
        if monotonic() >= deadline:
            raise RetryLater("dead_letter.slow")
        size = os.fstat(file).st_size
        if size and os.pread(file, 1, size - 1) != b"\n":  # a worker was killed while it wrote
            content = b"\n" + content
        try:
            if os.write(file, content) != len(content):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(file)
            if not os.fstat(file).st_nlink:  # replaced or removed since it was opened, and nobody would find the letter
                raise OSError(errno.ESTALE, "the file was removed meanwhile")
        except OSError:
            os.ftruncate(file, size)
            raise
    finally:
        os.close(file)
