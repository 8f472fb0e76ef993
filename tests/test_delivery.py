"""delivery.Delivery by itself: which messages share an upload, and what each request is told."""

import sys
import threading
from time import monotonic

import gevent
import pytest
from conftest import until

from relay import delivery
from relay.delivery import MAX_BATCH, MAX_BATCH_BYTES, MAX_UPLOADS, Delivery, fitting, parts
from relay.message import Message
from relay.outcomes import RateLimited, Rejected, RetryLater, TransientError
from server.shared import MAX_PAUSE, Pause


class Segment:
    """Holds uploads until `open` is set; `fails` says which event's uploads end with which exception."""

    def __init__(self):
        self.open = threading.Event()
        self.batches = []
        self.fails = {}

    def upload(self, messages, seconds):
        names = [message.id for message in messages]
        self.batches.append(names)
        self.open.wait(10)
        for name in names:
            if name in self.fails:
                raise self.fails[name]


class Request(threading.Thread):
    """A request that delivers one message; `result` is None for a 200, or the exception."""

    def __init__(self, relay, message, patience):
        super().__init__(daemon=True)
        self.relay, self.message, self.deadline = relay, message, monotonic() + patience
        self.result = "no answer"

    def run(self):
        try:
            self.result = self.relay.deliver(self.message, self.deadline)
        except Exception as error:
            self.result = error

    def outcome(self):
        self.join(10)
        return self.result


@pytest.fixture
def segment():
    segment = Segment()
    yield segment
    segment.open.set()  # lets every thread end


@pytest.fixture
def send(segment, monkeypatch):
    """Send messages, each once the request before waits for an upload: send("a", "b") -> requests."""
    waiting = threading.Semaphore(0)

    class Watched(threading.Event):
        def wait(self, timeout=None):
            waiting.release()
            return super().wait(timeout)

    monkeypatch.setattr(delivery, "Event", Watched)
    relay = Delivery(segment.upload, Pause())

    def _send(*names, size=100, patience=8.0, relay=relay):
        requests = [Request(relay, Message(name, "x" * size), patience) for name in names]
        for request in requests:
            request.start()
            assert waiting.acquire(timeout=10)
        return requests

    return _send


@pytest.fixture
def busy(send, segment):
    """As many lone messages as there may be uploads, each in an upload that Segment holds."""
    requests = send(*(f"busy-{number}" for number in range(MAX_UPLOADS)))
    until(lambda: len(segment.batches) == MAX_UPLOADS)
    return requests


def results(requests):
    return [request.outcome() for request in requests]


# Who shares an upload with whom. -----------------------------------------------------------------


def test_a_lone_message_goes_at_once_and_alone(send, segment):
    requests = []
    for number in range(MAX_UPLOADS):
        requests += send(str(number))
        until(lambda: len(segment.batches) == len(requests))  # noqa: B023 - waited for here
    assert segment.batches == [[str(number)] for number in range(MAX_UPLOADS)]
    segment.open.set()
    assert results(requests) == [None] * MAX_UPLOADS


@pytest.mark.usefixtures("busy")
def test_messages_that_come_while_all_uploads_are_out_share_the_next(send, segment):
    requests = send(*"abcde")
    assert len(segment.batches) == MAX_UPLOADS
    segment.open.set()
    assert results(requests) == [None] * 5
    assert segment.batches[MAX_UPLOADS:] == [list("abcde")]


def test_at_most_max_uploads_are_out_at_once(busy, send, segment):
    requests = send(*(str(number) for number in range(5 * MAX_BATCH // 2)))
    assert len(segment.batches) == MAX_UPLOADS
    segment.open.set()
    assert set(results(busy + requests)) == {None}
    assert sorted(len(batch) for batch in segment.batches[MAX_UPLOADS:]) == [50, MAX_BATCH, MAX_BATCH]


def test_uploads_go_on_as_before_once_all_is_delivered(busy, send, segment):
    segment.open.set()
    assert results(busy) == [None] * MAX_UPLOADS
    segment.open.clear()
    again = send(*(f"again-{number}" for number in range(MAX_UPLOADS)))
    until(lambda: len(segment.batches) == 2 * MAX_UPLOADS)
    segment.open.set()
    assert results(again) == [None] * MAX_UPLOADS
    assert {len(batch) for batch in segment.batches} == {1}


def test_messages_may_come_while_a_batch_is_taken(segment, monkeypatch):
    """With real threads; a thread that fails would fail this test."""
    monkeypatch.setattr(delivery, "MAX_UPLOADS", 2)
    relay = Delivery(segment.upload, Pause())
    segment.open.set()
    usual = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        requests = [Request(relay, Message(str(number), "{}"), 8.0) for number in range(400)]
        for request in requests:
            request.start()
        assert set(results(requests)) == {None}
    finally:
        sys.setswitchinterval(usual)


COMMA = len(", ")
FITTING = {  # sizes of the messages -> how many go together
    "none": ([], 0),
    "one": ([100], 1),
    "one that is larger than an upload may be": ([MAX_BATCH_BYTES + 1], 1),
    "what just fits": ([MAX_BATCH_BYTES - 100 - 2 * COMMA, 100], 2),
    "one byte too many": ([MAX_BATCH_BYTES - 99 - 2 * COMMA, 100], 1),
    "a hundred": ([100] * MAX_BATCH, MAX_BATCH),
    "a hundred and one": ([100] * (MAX_BATCH + 1), MAX_BATCH),
    "fourteen large ones": ([32_000] * 14, 14),
    "fifteen large ones": ([32_000] * 15, 14),
}


@pytest.mark.parametrize(("sizes", "together"), FITTING.values(), ids=FITTING.keys())
def test_fitting(sizes, together):
    assert fitting(Message("id", "x" * size) for size in sizes) == together


@pytest.mark.usefixtures("busy")
@pytest.mark.parametrize(("sizes", "together"), list(FITTING.values())[3:], ids=list(FITTING)[3:])
def test_a_batch_is_bounded(send, segment, sizes, together):
    requests = [request for number, size in enumerate(sizes) for request in send(str(number), size=size)]
    segment.open.set()
    assert set(results(requests)) == {None}
    expected = {together, len(sizes) - together} - {0}
    assert {len(batch) for batch in segment.batches[MAX_UPLOADS:]} == expected


# What each request is told. ----------------------------------------------------------------------


@pytest.mark.usefixtures("busy")
def test_everybody_is_told_the_failure_of_their_own_batch(send, segment):
    large = MAX_BATCH_BYTES // 2  # two of those don't fit together
    requests = [send(name, size=large)[0] for name in "abc"]
    segment.fails["b"] = RetryLater("not_success")
    segment.open.set()
    first, second, third = results(requests)
    assert (first, third) == (None, None)
    assert (type(second), str(second), second.reason, second.retry_after) == (
        RetryLater,
        "Segment answered that it failed",
        "not_success",
        1,
    )


@pytest.mark.usefixtures("busy")
def test_a_failure_is_told_to_the_whole_batch(send, segment):
    segment.fails["b"] = RetryLater("not_success")
    requests = send(*"abc")
    segment.open.set()
    assert [str(result) for result in results(requests)] == ["Segment answered that it failed"] * 3
    assert segment.batches[MAX_UPLOADS:] == [["a", "b", "c"]]


@pytest.mark.usefixtures("busy")
@pytest.mark.parametrize("at_fault", ["a", "d", "g", "ag", "bcd", "abcdefg"])
def test_the_event_at_fault_is_found_and_its_neighbours_are_delivered(send, segment, at_fault):
    segment.fails = dict.fromkeys(at_fault, Rejected(400))
    requests = send(*"abcdefg")
    segment.open.set()
    outcomes = {request.message.id: request.outcome() for request in requests}
    assert {name for name, outcome in outcomes.items() if isinstance(outcome, Rejected)} == set(at_fault)
    assert {(str(outcomes[name]), outcomes[name].status) for name in at_fault} == {("Segment refuses it (400)", 400)}
    assert {outcomes[name] for name in "abcdefg" if name not in at_fault} <= {None}


SIZES = {  # messages in a rejected batch -> in each of its parts
    "two": (2, [1, 1]),
    "ten": (10, [1] * 10),
    "eleven": (11, [2] * 5 + [1]),
    "a hundred": (100, [10] * 10),
}


@pytest.mark.parametrize(("messages", "sizes"), SIZES.values(), ids=SIZES.keys())
def test_parts(messages, sizes):
    batch = list(range(messages))
    assert [len(part) for part in parts(batch)] == sizes
    assert [number for part in parts(batch) for number in part] == batch


@pytest.mark.usefixtures("busy")
def test_an_event_at_fault_among_a_hundred_is_found_in_three_rounds(send, segment):
    requests = send(*(str(number) for number in range(100)))
    segment.fails["7"] = Rejected(400)
    segment.open.set()
    assert [type(result) for result in results(requests)].count(Rejected) == 1
    assert sorted(len(batch) for batch in segment.batches[MAX_UPLOADS:]) == [1] * 10 + [10] * 10 + [100]
    assert results(send("after")) == [None]


class Refusing:
    """Refuses whatever is sent: a batch of `whole` at once, parts of it when `open` is set. It takes "lone"."""

    def __init__(self, whole):
        self.whole = whole
        self.open = threading.Event()
        self.parts = []

    def upload(self, messages, seconds):
        if messages[0].id == "lone":
            return
        if len(messages) != self.whole:
            self.parts.append(len(messages))
            self.open.wait(10)
        raise Rejected(400)


def rejected_batch(send, monkeypatch, patience):
    """Return requests of one rejected batch, and the upload that rejects its parts."""
    monkeypatch.setattr(delivery, "MAX_UPLOADS", 1)
    held, refusing = Segment(), Refusing(64)
    relay = Delivery(lambda *upload: (refusing if held.open.is_set() else held).upload(*upload), Pause())
    send("first", relay=relay)
    until(lambda: held.batches)
    requests = send(*(str(number) for number in range(64)), relay=relay, patience=patience)
    held.open.set()
    return relay, requests, refusing


def test_uploads_of_parts_are_bounded_and_hold_up_nobody_else(send, monkeypatch):
    """As with a key that Segment refuses, where everything is rejected."""
    monkeypatch.setattr(delivery, "MAX_SPLITS", 3)
    relay, requests, refusing = rejected_batch(send, monkeypatch, 8.0)
    until(lambda: len(refusing.parts) == 3)
    relay.deliver(Message("lone", "{}"), monotonic() + 5)
    assert refusing.parts == [7] * 3
    refusing.open.set()
    assert {type(result) for result in results(requests)} == {Rejected}
    assert sorted(refusing.parts) == [1] * 64 + [7] * 9  # the tenth part is one message
    relay.deliver(Message("lone", "{}"), monotonic() + 5)


def test_parts_whose_requests_are_gone_are_not_sent(send, monkeypatch):
    monkeypatch.setattr(delivery, "MAX_SPLITS", 1)
    before = threading.active_count()
    _, requests, refusing = rejected_batch(send, monkeypatch, 1.0)
    until(lambda: refusing.parts)
    assert {type(result) for result in results(requests)} == {RetryLater}
    refusing.open.set()
    until(lambda: threading.active_count() <= before)
    assert refusing.parts == [7]


def test_without_an_answer_by_the_deadline_it_is_to_be_sent_again(send):
    (result,) = results(send("a", patience=0.05))
    assert (type(result), str(result), result.reason) == (RetryLater, "Segment did not answer in time", "timeout")


@pytest.mark.parametrize("seconds", [0, -1])
def test_an_upload_without_time_is_not_made(segment, seconds):
    segment.open.set()
    with pytest.raises(RetryLater, match="Segment did not answer in time"):
        Delivery(segment.upload, Pause()).attempt([Message("a", "{}")], monotonic() + seconds)
    assert segment.batches == []


@pytest.mark.usefixtures("busy")
def test_one_who_gave_up_is_not_sent(send, segment):
    impatient, patient = *send("impatient", patience=0.05), *send("patient")
    assert isinstance(impatient.outcome(), RetryLater)
    segment.open.set()
    assert patient.outcome() is None
    assert segment.batches[MAX_UPLOADS:] == [["patient"]]


def test_an_upload_has_until_the_last_deadline_in_it(send, segment, monkeypatch):
    monkeypatch.setattr(delivery, "MAX_UPLOADS", 1)
    given = []

    def upload(messages, seconds):
        given.append((len(messages), seconds))
        segment.upload(messages, seconds)

    relay = Delivery(upload, Pause())
    requests = [send(str(patience), patience=patience, relay=relay)[0] for patience in (9, 90, 60)]
    segment.open.set()
    assert results(requests) == [None] * 3
    assert [number for number, _ in given] == [1, 2]
    assert [round(seconds, -1) for _, seconds in given] == [10, 90]


# Second attempts. --------------------------------------------------------------------------------

ATTEMPTS = {
    "a transient failure": (TransientError("segment_500"), 2),
    "what comes later": (RetryLater("write_key"), 1),
    "a rate limit": (RateLimited(1), 1),
    "a rejection": (Rejected(400), 1),
    "a bug": (KeyError("a bug"), 1),
}


@pytest.mark.parametrize(("failure", "attempts"), ATTEMPTS.values(), ids=ATTEMPTS.keys())
def test_a_transient_failure_is_retried_once_and_nothing_else(send, segment, failure, attempts):
    segment.fails["a"] = failure
    segment.open.set()
    (result,) = results(send("a"))
    assert type(result) is type(failure)
    assert segment.batches == [["a"]] * attempts


def test_a_second_attempt_that_succeeds_is_a_success(segment):
    answers = iter([TransientError("segment_500"), None])

    def upload(messages, seconds):
        if error := next(answers):
            raise error

    Delivery(upload, Pause()).deliver(Message("a", "{}"), monotonic() + 5)
    assert next(answers, "none left") == "none left"


def test_there_is_no_second_attempt_once_nobody_waits(segment, monkeypatch):
    monkeypatch.setattr(delivery, "MAX_UPLOADS", 1)
    relay = Delivery(segment.upload, Pause())
    segment.fails["impatient"] = TransientError("connection")
    with pytest.raises(RetryLater, match="in time"):
        relay.deliver(Message("impatient", "{}"), monotonic() + 0.01)
    segment.open.set()
    relay.deliver(Message("next", "{}"), monotonic() + 5)
    assert segment.batches == [["impatient"], ["next"]]


# Whatever ends an upload. ------------------------------------------------------------------------

DEATHS = [SystemExit(1), gevent.GreenletExit(), KeyError("a bug"), MemoryError(), RecursionError()]


@pytest.fixture
def threads_may_die(monkeypatch):
    before = threading.active_count()
    monkeypatch.setattr(threading, "excepthook", lambda death: None)
    yield
    until(lambda: threading.active_count() <= before)


@pytest.mark.usefixtures("threads_may_die")
@pytest.mark.parametrize("death", DEATHS, ids=lambda death: type(death).__name__)
@pytest.mark.parametrize("deaths", [1, 100])
def test_nobody_is_told_success_when_an_upload_dies_and_the_next_is_served(segment, death, deaths):
    relay = Delivery(segment.upload, Pause())
    segment.open.set()
    segment.fails["dies"] = death
    for _ in range(deaths):
        with pytest.raises((RetryLater, type(death))):
            relay.deliver(Message("dies", "{}"), monotonic() + 5)
    assert relay.deliver(Message("next", "{}"), monotonic() + 5) is None


@pytest.mark.usefixtures("threads_may_die", "busy")
@pytest.mark.parametrize("death", DEATHS, ids=lambda death: type(death).__name__)
def test_a_death_is_told_to_the_whole_batch(send, segment, death):
    segment.fails["dies"] = death
    requests = send("a", "dies", "b")
    segment.open.set()
    told = results(requests)
    assert [isinstance(result, RetryLater | type(death)) for result in told] == [True] * 3
    assert results(send("next")) == [None]


@pytest.mark.usefixtures("threads_may_die")
@pytest.mark.parametrize("death", DEATHS, ids=lambda death: type(death).__name__)
def test_what_is_queued_is_sent_although_every_upload_that_is_out_dies(busy, send, segment, death):
    segment.fails = {request.message.id: death for request in busy}
    queued = send("queued", patience=1.0)
    segment.open.set()
    assert all(isinstance(result, Exception) for result in results(busy))
    assert results(queued) == [None]


@pytest.mark.parametrize("failure", [RuntimeError("can't start new thread"), MemoryError()], ids=repr)
def test_when_no_thread_can_be_started_that_request_fails_and_the_next_is_served(segment, monkeypatch, failure):
    start, failures = threading.Thread.start, [failure] * 20

    def fails_at_first(thread):
        if failures:
            raise failures.pop()
        start(thread)

    segment.open.set()
    relay = Delivery(segment.upload, Pause())
    monkeypatch.setattr(threading.Thread, "start", fails_at_first)
    for _ in range(20):
        with pytest.raises(type(failure)):
            relay.deliver(Message("a", "{}"), monotonic() + 5)
    relay.deliver(Message("next", "{}"), monotonic() + 5)
    assert segment.batches == [["next"]]


def test_threads_that_never_begin_and_never_end_cost_no_upload_for_good(segment, monkeypatch):
    now = monotonic()
    monkeypatch.setattr(delivery, "monotonic", lambda: now)
    monkeypatch.setattr(threading.Thread, "start", lambda thread: None)
    segment.open.set()
    relay = Delivery(segment.upload, Pause())
    for number in range(2 * MAX_UPLOADS):
        with pytest.raises(RetryLater):
            relay.deliver(Message(f"lost-{number}", "{}"), now)
    monkeypatch.undo()
    now += delivery.LOST_AFTER + 1
    monkeypatch.setattr(delivery, "monotonic", lambda: now)
    relay.deliver(Message("next", "{}"), now + 5)
    assert segment.batches == [["next"]]


# Pauses. -----------------------------------------------------------------------------------------


def test_a_pause_is_for_everybody(send, segment):
    pause = Pause()
    one, other = Delivery(segment.upload, pause), Delivery(segment.upload, pause)
    segment.open.set()
    segment.fails["a"] = RateLimited(3)
    first = results(send("a", relay=one))[0]
    assert (str(first), first.reason, first.retry_after) == ("Segment is limiting the rate", "rate_limited", 3)
    for relay in (one, other):
        (result,) = results(send("b", relay=relay))
        assert (type(result), result.retry_after) == (RateLimited, 3)
    assert segment.batches == [["a"]]


def test_a_pause_ends_before_a_second_attempt_too(segment):
    """A transient failure isn't retried while somebody else's 429 is in force."""
    pause = Pause()
    calls = []

    def upload(messages, seconds):
        calls.append(messages)
        pause.extend(2)
        raise TransientError("segment_500")

    with pytest.raises(RateLimited):
        Delivery(upload, pause).deliver(Message("a", "{}"), monotonic() + 5)
    assert len(calls) == 1


def test_a_pause_is_never_shortened():
    pause = Pause()
    assert pause.remaining() <= 0
    pause.extend(4)
    pause.extend(1)
    assert 3 < pause.remaining() <= 4


def test_a_pause_has_a_bound():
    pause = Pause()
    pause.extend(300)
    assert 4 < pause.remaining() <= MAX_PAUSE == 5


@pytest.mark.parametrize(("given", "told"), [(0, 1), (0.2, 1), (1, 1), (1.5, 2), (300, 300)])
def test_retry_after_is_a_whole_number_of_seconds(given, told):
    assert RateLimited(given).retry_after == told
