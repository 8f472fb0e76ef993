"""Every way in which a webhook can end, in one table: answers, metrics, log and page read it. Pure."""

from math import ceil
from typing import NamedTuple

from translate import UNDELIVERABLE, Ended, Ignored, NotAnObject, Undeliverable


class Outcome(NamedTuple):
    """What became of a webhook."""

    label: str  # in the metrics
    word: str  # the `status` in the body of the answer
    title: str  # on the page
    meaning: str  # what the sender makes of it


DELIVERED = Outcome("delivered", "delivered", "delivered", "Segment has it.")
DRY_RUN = Outcome("dry_run", "dry-run", "dry run", "A live relay answers so once Segment has it.")
DEAD_LETTERED = Outcome(
    "dead_lettered",
    "dead-lettered",
    "dead-lettered",
    "Segment could never take it: it is kept whole, as a dead letter, and holds up nothing.",
)
IGNORED = Outcome("ignored", "ignored", "ignored", "translate.py leaves such events out: it is not kept.")
RETRIED = Outcome("retried", "retry", "retried", "Customer.io sends it again, soon.")
UNAUTHORIZED = Outcome(
    "unauthorized",
    "unauthorized",
    "unauthorized",
    "Customer.io would send it again for seven days, and hold back all others.",
)
REJECTED = Outcome("rejected", "rejected", "rejected", "Customer.io doesn't send such webhooks.")


class RetryLater(Ended):
    """Not delivered yet: Customer.io sends it again."""

    retry_after = 1  # seconds

    sentences = {
        "timeout": "Segment did not answer in time",
        "connection": "the connection to Segment failed",
        "rate_limited": "Segment is limiting the rate",
        "write_key": "Segment refuses the write key{}: check SEGMENT_WRITE_KEY",
        "every_event": "Segment refuses every event (400): check SEGMENT_WRITE_KEY",
        "not_segment": "what answered is not Segment: check SEGMENT_HOST and proxies",
        "redirect": "Segment's address redirects elsewhere: check SEGMENT_HOST",
        "not_success": "Segment answered that it failed",
        "interrupted": "the upload was interrupted",
        "body": "the body did not arrive whole",
        "body.slow": "it took too long",
        "busy": "too many large webhooks at once",
        "dead_letter": "the dead letter could not be kept{}",
        "dead_letter.slow": "the disk is too slow",
        "dead_letter.unread": "the dead letter could not be kept: nobody reads the log",
        "not_set_up": "the relay has no signing key yet: set CUSTOMERIO_SIGNING_KEY",
        "internal": "the relay failed on it",
    } | {f"segment_{status}": f"Segment answered {status}" for status in range(100, 600)}


class TransientError(RetryLater):
    """A failure that a second attempt may fix: a 5xx, a 408, a dropped connection."""


class RateLimited(RetryLater):
    """Segment answered 429: no worker calls it for some seconds."""

    def __init__(self, seconds: float):
        super().__init__("rate_limited")
        self.retry_after = max(1, ceil(seconds))


class Unauthorized(Ended):
    """The signature is missing, wrong or too old."""

    sentences = {
        "missing": "the X-CIO-Timestamp and X-CIO-Signature headers are required",
        "bad_timestamp": "X-CIO-Timestamp is not a number of seconds",
        "mismatch": "no configured key made this signature",
        "expired": "X-CIO-Timestamp is more than eight days away from now",
    }


class BodyTooLarge(Ended):
    """The body is above the limit of body.py."""

    sentences = {"too_large": "the body is larger than 8,388,608 bytes"}


class NotHttp(Ended):
    """A request that can't be read as HTTP, or contradicts itself."""

    sentences = {"not_http": "not an HTTP request"}


class Rejected(Exception):
    """An upload is refused for good, because of an event in it, or of the key.

    `status` is that of the answer. `by_segment` is False if what refuses it is not Segment, but something on the way.
    `reason` and `detail` are those of Undeliverable for a single event; `reason_for_all` is that of RetryLater if
    every event is refused.
    """

    def __init__(self, status: int, by_segment: bool = True):
        self.status, self.by_segment = status, by_segment
        self.reason = "segment_rejects" if by_segment else "segment_rejects.on_the_way"
        self.detail = f" ({status})"
        self.reason_for_all = "every_event" if by_segment else "not_segment"
        super().__init__(UNDELIVERABLE[self.reason].format(self.detail))

    @property
    def may_be_for_all(self) -> bool:
        """Whether every event may be refused so: a 413 of Segment's own is about this one."""
        return self.status == 400 or not self.by_segment


# One exception, one status. Customer.io waits an hour after 400, 401, 403, 404, 405, 429, 500 and 502
# (docs.customer.io, Reporting webhooks, "Timeouts and failures"). 503 and 422 are not on its list, and
# proxies that eject a server after several 5xx (Envoy, outlier detection) don't count a stranger's 422.
ENDS: dict[type[Ended], tuple[int, Outcome]] = {
    Undeliverable: (202, DEAD_LETTERED),
    Ignored: (202, IGNORED),
    RetryLater: (503, RETRIED),
    Unauthorized: (422, UNAUTHORIZED),
    NotAnObject: (422, REJECTED),
    BodyTooLarge: (413, REJECTED),
    NotHttp: (422, REJECTED),
}

ACKNOWLEDGED = (DELIVERED, DRY_RUN, DEAD_LETTERED, IGNORED)  # with a 2xx: Customer.io doesn't send them again
OUTCOMES = (*ACKNOWLEDGED, RETRIED, UNAUTHORIZED, REJECTED)


def _reasons(outcome: Outcome) -> dict[str, str]:
    sentences = [kind.sentences for kind, (_, its_outcome) in ENDS.items() if its_outcome is outcome]
    reasons = {
        reason: sentence.format("") for each in sentences for reason, sentence in each.items() if "." not in reason
    }
    return reasons | {"other": "for another reason"} if reasons else {"": outcome.title}


# The label of an outcome -> each of its reasons, as a label -> its sentence, without a detail.
REASONS = {outcome.label: _reasons(outcome) for outcome in OUTCOMES}
