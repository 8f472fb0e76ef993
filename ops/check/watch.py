"""Waits until Segment reports one more event of a name than before: received, or dropped."""

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import click

from ops.check import segment_api
from ops.check.ask import Api, NoAnswer, NotNow
from ops.check.part import Part
from ops.check.segment_api import DROPPED, RECEIVED, Source
from ops.timing import Timing

ASK_EVERY = 15  # seconds
ASK_FOR = 600  # seconds


def pauses(timing: Timing) -> Iterator[None]:
    """Pause before each further question, for ten minutes."""
    started = timing.now()
    for _ in range(ASK_FOR // ASK_EVERY):
        timing.sleep(ASK_EVERY)
        yield
        if timing.now() - started > ASK_FOR:
            return


class Watch:
    def __init__(self, api: Api, source: Source, name: str, timing: Timing):
        """Count the events of that `name` before there is one more; raise NoAnswer if that can't be done."""
        self._api, self._source, self._name, self._timing = api, source, name, timing
        self._before = self._first_counts()

    def wait(self) -> Part:
        """Return what became of the event and after how many seconds."""
        click.echo(f"Waiting for Segment's report of {self._name}, up to {ASK_FOR // 60} minutes ...", err=True)
        started = self._timing.now()
        outcome = problem = ""
        for _ in pauses(self._timing):
            try:
                outcome, problem = self._outcome(), ""
            except NoAnswer as error:  # the next question may be answered
                problem = f" The last question got no answer: {error}."
            if outcome:
                break
        found = {"outcome": outcome or "no report", "seconds": round(self._timing.now() - started)}
        if not outcome:
            words = (
                f"After {ASK_FOR // 60} minutes Segment has reported {self._name} neither as received nor as dropped."
            )
            return Part(found, incomplete=[words + problem])
        if outcome == "dropped":
            return Part(found, [f"Segment dropped {self._name}, the event of this check, after its 200."])
        return Part(found)

    def _first_counts(self) -> dict[str, int]:
        """Return the counts before the event, which can't be told afterwards."""
        further = pauses(self._timing)
        while True:
            # Earlier minutes may have a check event that Segment hasn't reported yet.
            self._since = datetime.now(UTC).replace(second=0, microsecond=0)
            try:
                return self._counts()
            except NotNow as error:
                click.echo(f"{error}. The event waits, up to {ASK_FOR // 60} minutes ...", err=True)
                if next(further, "over") == "over":
                    raise

    def _outcome(self) -> str:
        counts = self._counts()
        outcomes = {DROPPED: "dropped", RECEIVED: "received"}
        return next((word for kind, word in outcomes.items() if counts[kind] > self._before[kind]), "")

    def _counts(self) -> dict[str, int]:
        until = datetime.now(UTC)
        start = self._since - timedelta(hours=1)  # a fixed one, so that counts only grow
        return {
            kind: sum(
                row.total - sum(count for minute, count in row.minutes if minute < self._since)
                for row in segment_api.overview(self._api, kind, self._source.id, start, until, "eventName")
                if row.name == self._name
            )
            for kind in (RECEIVED, DROPPED)
        }
