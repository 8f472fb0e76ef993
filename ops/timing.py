"""How long a command waits, and by which clock."""

import time
from collections.abc import Callable
from typing import NamedTuple

import click


class Timing(NamedTuple):
    now: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep
    answer: float = 10.0  # seconds, for a question to an API
    upload: float = 15  # seconds, for an upload that no webhook waits for


# Click's context may have another: the tests have a clock of their own.
pass_timing = click.make_pass_decorator(Timing, ensure=True)
