"""Uploads the batches of a replay, until nothing can succeed."""

from collections.abc import Callable, Iterator

from ops.timing import Timing
from relay.delivery import MAX_BATCH, fitting, parts
from relay.message import Message
from relay.outcomes import RateLimited, Rejected, RetryLater, TransientError
from relay.segment import SegmentClient

ATTEMPTS = 6  # for each upload, a second apart and then twice as long each time

Number = int  # of a message in a replay: its position in the file


class Sender:
    """Sends messages to Segment, and sends again what may pass."""

    def __init__(self, segment: SegmentClient, check: Message, timing: Timing, say: Callable[[str], None]):
        """`check` is an event without a fault, for trying the key; `say(words)` is told what it waits for."""
        self._segment = segment
        self._check = check
        self._timing = timing
        self._say = say
        self._accepted = False  # Segment has taken an event, so the key is good

    def send(self, messages: list[tuple[Number, Message]], rate: float) -> Iterator[tuple[Number, str]]:
        """Upload all messages, `rate` a second at most.

        Yield each number with the reason why Segment did not take the message, "" if it did. Raise RetryLater if
        Segment would take nothing else either.
        """
        start = 0
        while start < len(messages):
            began = self._timing.now()
            batch = messages[start : start + MAX_BATCH]
            batch = batch[: fitting(message for _, message in batch)]
            yield from self._send_batch(batch)
            start += len(batch)
            self._timing.sleep(max(0.0, len(batch) / rate - (self._timing.now() - began)))

    def _send_batch(self, batch: list[tuple[Number, Message]]) -> Iterator[tuple[Number, str]]:
        try:
            self._upload([message for _, message in batch])
        except Rejected as error:
            if len(batch) > 1:
                for part in parts(batch):
                    yield from self._send_batch(part)
                return
            if not self._accepted and error.may_be_for_all:
                self._check_key()
            yield batch[0][0], str(error)
        except RetryLater as error:
            if not may_pass(error):
                raise
            yield from ((number, str(error)) for number, _ in batch)
            if not self._accepted:  # the next would take as long, and fail too
                raise
        else:
            self._accepted = True
            yield from ((number, "") for number, _ in batch)

    def _upload(self, messages: list[Message]) -> None:
        for attempt in range(ATTEMPTS):
            try:
                self._segment.upload(messages, self._timing.upload)
                return
            except RetryLater as error:
                if not may_pass(error) or attempt == ATTEMPTS - 1:
                    raise
                seconds = error.retry_after if isinstance(error, RateLimited) else 2**attempt
                self._say(f"{error}: again in {seconds} s")
                self._timing.sleep(seconds)

    def _check_key(self) -> None:
        """Raise RetryLater if Segment rejects an event that has no fault, too: then it is the key."""
        try:
            self._upload([self._check])
        except Rejected as error:
            raise RetryLater(error.reason_for_all) from None
        self._accepted = True


def may_pass(error: RetryLater) -> bool:
    """Return whether another attempt may succeed: not after a refused key, a redirect, or what isn't Segment."""
    return isinstance(error, TransientError | RateLimited) or error.reason == "timeout"
