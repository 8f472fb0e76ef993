"""Until when Segment is not to be called, after a 429: eight bytes that all workers share.

Imported by gunicorn.conf.py, that is, before the workers are forked; a worker that would
import it first by itself would pause alone.
"""

import mmap
import struct
from time import monotonic

MAX_SECONDS = 5  # whatever Retry-After says

_memory = mmap.mmap(-1, 8)  # one double, on the monotonic clock, which all processes share


def remaining() -> float:
    """Return for how many more seconds Segment is not to be called; 0 or less when it may be."""
    return float(struct.unpack("d", _memory[:])[0]) - monotonic()


def extend(seconds: float) -> None:
    """Have no worker call Segment for `seconds`, MAX_SECONDS at the most; never shortens a pause."""
    _memory[:] = struct.pack("d", monotonic() + max(min(seconds, MAX_SECONDS), remaining()))
