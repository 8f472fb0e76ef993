"""delivery.GroupCommit by itself: who goes with whom, and what each is told, whatever ends an upload."""

from time import monotonic

import gevent
import pytest
from gevent.event import Event

import pause
from delivery import (
    ENVELOPE_BYTES,
    FEW,
    MAX_BATCH,
    MAX_BODY_BYTES,
    MAX_UPLOADS,
    GroupCommit,
    NotAccepted,
    Refused,
    _Passing,
)
from translate import Undeliverable


class Segment:
    """Takes batches once `open` is set; `fails` says how, by the name of an event in the batch."""

    def __init__(self):
        self.open = Event()
        self.batches = []
        self.fails = {}

    def __call__(self, messages, seconds):
        names = [message["name"] for message in messages]
        self.batches.append(names)
        self.open.wait(seconds)
        for name in names:
            if name in self.fails:
                raise self.fails[name]


@pytest.fixture
def segment():
    return Segment()


@pytest.fixture
def commit(segment):
    commit = GroupCommit(segment)
    commit._latency = MAX_UPLOADS / 10  # an upload may start every tenth of a second
    return commit


def deliver_together(commit, names, make=lambda name: ({"name": name}, 100), patience=5.0):
    """Deliver in greenlets that arrive in the same turn of the event loop; their values are None or the error."""

    def run(name):
        try:
            commit.deliver(lambda: make(name), monotonic() + patience)
        except Exception as error:
            return error
        return None

    waiting = [gevent.spawn(run, name) for name in names]
    gevent.sleep(0.001)  # a turn or two
    return waiting


def deliver(commit, name, size=100, patience=5.0):
    return deliver_together(commit, [name], lambda name: ({"name": name}, size), patience)[0]


def results(waiting):
    gevent.joinall(waiting, timeout=10)
    assert all(greenlet.ready() for greenlet in waiting)
    return [greenlet.value for greenlet in waiting]


def test_the_first_goes_at_once_and_those_who_come_then_go_together(commit, segment):
    waiting = [deliver(commit, name) for name in "abc"]
    gevent.sleep(0.01)
    assert segment.batches == [["a"]]
    assert repr(commit) == "<GroupCommit 1 out, 2 waiting>"
    segment.open.set()
    assert results(waiting) == [None, None, None]
    assert segment.batches == [["a"], ["b", "c"]]
    assert repr(commit) == "<GroupCommit 0 out, 0 waiting>"


def test_a_second_upload_starts_while_the_first_is_out(commit, segment):
    waiting = [deliver(commit, name) for name in "ab"]
    gevent.sleep(0.2)
    assert segment.batches == [["a"], ["b"]]
    segment.open.set()
    assert results(waiting) == [None, None]


def test_few_who_come_together_to_an_idle_relay_go_in_halves_so_that_they_drift_apart(commit, segment):
    waiting = deliver_together(commit, "abcde")
    assert segment.batches == [["a", "b", "c"]]
    gevent.sleep(0.2)
    assert segment.batches == [["a", "b", "c"], ["d", "e"]]
    segment.open.set()
    assert results(waiting) == [None] * 5


def test_many_who_come_together_go_together(commit, segment):
    names = [str(number) for number in range(FEW + 1)]
    waiting = deliver_together(commit, names)
    assert segment.batches == [names]
    segment.open.set()
    assert set(results(waiting)) == {None}


def test_messages_are_made_together_and_whose_cannot_be_made_is_told_so_alone(commit, segment):
    segment.open.set()
    made = []

    def make(name):
        made.append(name)
        if name == "b":
            raise Undeliverable("no name")
        return {"name": name}, 100

    waiting = deliver_together(commit, "abc", make)
    assert made == ["a", "b", "c"]
    first, second, third = results(waiting)
    assert (first, third) == (None, None)
    assert str(second) == "no name"
    assert sorted(name for batch in segment.batches for name in batch) == ["a", "c"]


def test_a_full_batch_does_not_wait(commit, segment):
    waiting = [deliver(commit, "first")]
    waiting += deliver_together(commit, [str(number) for number in range(2 * MAX_BATCH + 1)])
    assert [len(batch) for batch in segment.batches] == [1, MAX_BATCH, MAX_BATCH]
    segment.open.set()
    assert set(results(waiting)) == {None}


ROOM = MAX_BODY_BYTES - ENVELOPE_BYTES - len('""')
BYTES = {
    "what just fits": ([ROOM - 104, 100], 1),
    "one byte too many": ([ROOM - 103, 100], 2),
    "fifteen large ones": ([32_000] * 15, 2),
    "fourteen large ones": ([32_000] * 14, 1),
}


@pytest.mark.parametrize(("sizes", "uploads"), BYTES.values(), ids=BYTES.keys())
def test_a_batch_is_bounded_in_bytes(commit, segment, sizes, uploads):
    waiting = [deliver(commit, "first")]
    gevent.sleep(0.01)
    waiting += [deliver(commit, str(number), size) for number, size in enumerate(sizes)]
    segment.open.set()
    assert set(results(waiting)) == {None}
    assert len(segment.batches) == 1 + uploads


def test_everybody_is_told_the_failure_of_their_own_batch(commit, segment):
    segment.fails["b"] = NotAccepted("down")
    waiting = [deliver(commit, name) for name in "abc"]
    segment.open.set()
    assert [str(result) for result in results(waiting)] == ["None", "down", "down"]


def test_the_event_at_fault_is_found_and_its_neighbours_are_delivered(commit, segment):
    segment.fails["d"] = Refused("refused")
    waiting = [deliver(commit, name) for name in "abcdefg"]
    segment.open.set()
    by_name = dict(zip("abcdefg", results(waiting), strict=True))
    assert isinstance(by_name.pop("d"), Undeliverable)
    assert set(by_name.values()) == {None}


@pytest.mark.parametrize("death", [gevent.GreenletExit(), KeyError("a bug")], ids=repr)
def test_nobody_is_told_success_when_the_upload_dies(commit, segment, death):
    def dies(messages, seconds):
        raise death

    waiting = [deliver(commit, "a")]
    gevent.sleep(0.01)
    commit._post = dies
    waiting += [deliver(commit, name) for name in "bc"]
    segment.open.set()
    first, *others = results(waiting)
    assert first is None
    assert len(others) == 2
    assert all(isinstance(other, Exception) for other in others)


def test_one_who_gave_up_is_not_sent(commit, segment):
    waiting = [deliver(commit, "a"), deliver(commit, "b", patience=0.05), deliver(commit, "c")]
    assert isinstance(waiting[1].get(timeout=1), NotAccepted)
    segment.open.set()
    assert results(waiting)[2] is None
    assert segment.batches == [["a"], ["c"]]


def test_a_first_failure_in_passing_is_retried_once(commit, segment):
    segment.open.set()
    segment.fails["a"] = _Passing("500")
    assert isinstance(results([deliver(commit, "a")])[0], NotAccepted)
    assert segment.batches == [["a"], ["a"]]


def test_without_an_answer_a_second_attempt_starts_at_half_time_and_the_first_still_counts(commit, segment):
    waiting = deliver(commit, "a", patience=1.0)
    gevent.sleep(0.4)
    assert segment.batches == [["a"]]
    gevent.sleep(0.25)
    assert segment.batches == [["a"], ["a"]]
    segment.open.set()
    assert results([waiting]) == [None]


def test_who_cannot_be_served_in_time_is_told_early(commit, segment):
    commit._latency = 3.0
    for _ in range(MAX_UPLOADS):  # all uploads are out, and take three seconds
        commit._last_start = 0.0
        deliver(commit, "out")
        gevent.sleep(0.001)
    assert repr(commit) == f"<GroupCommit {MAX_UPLOADS} out, 0 waiting>"
    early = deliver(commit, "late", patience=2.0)
    gevent.sleep(0.01)
    assert early.ready()  # long before its patience ends
    assert str(early.value) == "Segment is slower than events arrive"
    patient = deliver(commit, "patient", patience=5.0)
    assert not patient.ready()
    segment.open.set()
    assert results([patient]) == [None]


@pytest.fixture
def no_pause_left():
    yield
    pause._memory[:] = bytes(8)


@pytest.mark.usefixtures("no_pause_left")
def test_a_pause_is_for_everybody(commit, segment):
    waiting = [deliver(commit, name) for name in "ab"]
    gevent.sleep(0.01)
    pause.extend(60)
    segment.open.set()
    first, second = results(waiting)
    assert first is None
    assert (str(second), second.retry_after) == ("Segment is limiting the rate", 5)
    assert results([deliver(commit, "c")])[0].retry_after == 5
    assert segment.batches == [["a"]]


@pytest.mark.usefixtures("no_pause_left")
def test_a_pause_is_never_shortened():
    pause.extend(4)
    pause.extend(1)
    assert 3 < pause.remaining() <= 4
    pause.extend(100)
    assert 4 < pause.remaining() <= 5
