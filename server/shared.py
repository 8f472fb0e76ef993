"""Memory that all workers share, mapped before they are forked."""

import mmap
from collections.abc import Callable, Sequence
from functools import cache
from time import monotonic, time

from relay.outcomes import REJECTED, RETRIED

ROWS = 256  # four times the most workers (64): a reload runs old and new ones together
COLUMNS = 2048  # numbers a worker

# The columns for the worker's own answers, by the labels of outcome and reason. Those of ops/monitor/metrics.py follow.
WORKER_COLUMNS = {
    (REJECTED.label, "not_http"): 0,
    (RETRIED.label, "internal"): 1,
    (RETRIED.label, "busy"): 2,
    (RETRIED.label, "body"): 3,
}

MAX_PAUSE = 5  # seconds, whatever Segment's Retry-After says


class Counts:
    """A table of numbers, with a row for each worker.

    Only that worker writes to it, so counting needs no lock. A new worker takes over the row of
    one that has exited, and adds to it.
    """

    def __init__(self) -> None:
        self._cells = memoryview(mmap.mmap(-1, 8 * ROWS * COLUMNS)).cast("d")
        self._rows_used = memoryview(mmap.mmap(-1, 8)).cast("q")
        self.use_row(0)

    def use_row(self, row: int) -> None:
        """Have this process, and what it forks from now on, write to `row`."""
        self.row = self._cells[row * COLUMNS : (row + 1) * COLUMNS]
        self._rows_used[0] = max(self._rows_used[0], row + 1)

    def column(self, column: int) -> Sequence[float]:
        """Return one column: this number for every worker."""
        return self._cells[column : self._rows_used[0] * COLUMNS : COLUMNS].tolist()


class Pause:
    """How long no worker may call Segment, after a 429."""

    def __init__(self, clock: Callable[[], float] = monotonic) -> None:
        self._clock = clock
        self._until = memoryview(mmap.mmap(-1, 8)).cast("d")  # on the monotonic clock, which is the machine's

    def remaining(self) -> float:
        """Return the seconds left; 0 or less when Segment may be called."""
        return float(self._until[0]) - self._clock()

    def extend(self, seconds: float) -> None:
        """Have no worker call Segment for `seconds`, MAX_PAUSE at most; never shorten a pause."""
        self._until[0] = max(self._clock() + min(seconds, MAX_PAUSE), self._until[0])


class Shared:
    def __init__(self) -> None:
        self.started = time()  # unix seconds
        self.counts = Counts()
        self.pause = Pause()
        self.in_our_worker = False  # gunicorn.conf.py sets it in each


@cache
def of_service() -> Shared:
    """Return the memory of this service. gunicorn.conf.py calls it before it forks the workers."""
    return Shared()
