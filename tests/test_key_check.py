"""A key that Segment refuses costs at most five dead letters a worker, and a refused event stops nobody."""

import threading
from time import monotonic

import pytest
from conftest import InProcess, make_event, until

from key_check import IN_A_ROW, PROBE_EVERY, KeyCheck
from outcomes import RateLimited, Rejected, RetryLater, TransientError
from translate import NO_ECHO

KEY = "Segment refuses every event (400): check SEGMENT_WRITE_KEY"
REFUSED = Rejected(400)
DOWN = TransientError("segment_500")


class Case:
    """A KeyCheck on a clock of its own, and a Segment whose answers to probes are given."""

    def __init__(self, monkeypatch):
        self.now = 1_000.0
        self.answer = None  # to a probe: None, or the exception
        self.probes = 0
        self.check = KeyCheck(self.probe)
        monkeypatch.setattr("key_check.monotonic", lambda: self.now)

    def probe(self, seconds):
        assert seconds > 0
        self.probes += 1
        if self.answer:
            raise self.answer

    def reject(self):
        """Let Segment reject an event; return "dead" for a dead letter, or why it is to be sent again."""
        try:
            self.check.rejected(self.now + 3)
        except RetryLater as error:
            return error.reason
        return "dead"

    def outcomes(self, steps):
        """Play steps: r(ejected), a(ccepted), or what a probe is answered; return what became of each r."""
        answers = {"ok": None, "400": REFUSED, "500": DOWN, "429": RateLimited("rate_limited", retry_after=2)}
        outcomes = []
        for step in steps.split():
            if step == "a":
                self.check.accepted()
            elif step == "r":
                outcomes.append(self.reject())
            elif step.startswith("+"):
                self.now += float(step)
            else:
                self.answer = answers[step]
        return " ".join(outcomes)


@pytest.fixture
def case(monkeypatch):
    return Case(monkeypatch)


DEAD = " dead" * 5
CASES = {  # what Segment does -> what becomes of the rejected events, and how many probes were sent
    "five in a row": ("400 r r r r r", DEAD, 0),
    "the sixth, with a wrong key": ("400 r r r r r r", f"{DEAD} every_event", 1),
    "the sixth, with a right key": ("ok r r r r r r", f"{DEAD} dead", 1),
    "the sixth, not in a row": ("400 r r r r r a r r r r r", DEAD * 2, 0),
    "one accepted among them": ("400 r r r a r r r r r r", f"{DEAD} dead dead dead every_event", 1),
    "five more after an accepted probe": ("ok r r r r r r r r r r", DEAD * 2, 1),
    "and the next one": ("ok r r r r r r r r r r r", f"{DEAD * 2} dead", 2),
    "the key is changed at Segment meanwhile": ("ok r r r r r r r r r r 400 r", f"{DEAD * 2} every_event", 2),
    "no second probe within ten seconds": (
        "400 r r r r r r r +9.9 r",
        f"{DEAD} every_event every_event every_event",
        1,
    ),
    "a second probe after ten": ("400 r r r r r r +10 r r", f"{DEAD} every_event every_event every_event", 2),
    "a second probe, and the key is right": ("400 r r r r r r ok +10 r r", f"{DEAD} every_event dead dead", 2),
    "an event is accepted after all": ("400 r r r r r r a r", f"{DEAD} every_event dead", 1),
    "a failed probe decides nothing": ("500 r r r r r r r", f"{DEAD} segment_500 segment_500", 2),
    "a failed probe, then a rejected one": ("500 r r r r r r 400 r", f"{DEAD} segment_500 every_event", 2),
    "a failed probe, then an accepted one": ("500 r r r r r r ok r r", f"{DEAD} segment_500 dead dead", 2),
    "a limited probe decides nothing": ("429 r r r r r r", f"{DEAD} rate_limited", 1),
}


@pytest.mark.parametrize(("steps", "outcomes", "probes"), CASES.values(), ids=CASES.keys())
def test_key_check(case, steps, outcomes, probes):
    assert case.outcomes(steps) == outcomes.strip()
    assert case.probes == probes


def test_the_numbers_are_those_of_the_documentation():
    assert (IN_A_ROW, PROBE_EVERY) == (5, 10)


def test_one_probe_is_sent_however_many_events_wait_for_it_and_none_waits_beyond_its_deadline():
    asked, answer = threading.Event(), threading.Event()
    outcomes, probes = [], []

    def probe(seconds):
        probes.append(seconds)
        asked.set()
        answer.wait(10)
        raise REFUSED

    check = KeyCheck(probe)

    def reject(seconds):
        try:
            check.rejected(monotonic() + seconds)
        except RetryLater as error:
            outcomes.append(error.reason)

    for _ in range(IN_A_ROW):
        check.rejected(monotonic() + 1)
    patient = [threading.Thread(target=reject, args=(9,)) for _ in range(20)]
    for thread in patient:
        thread.start()
    assert asked.wait(10)
    reject(0.05)
    assert outcomes == ["timeout"]
    answer.set()
    for thread in patient:
        thread.join(10)
    assert outcomes == ["timeout"] + ["every_event"] * 20
    assert len(probes) == 1


# In the relay. -----------------------------------------------------------------------------------


def reject(client, number):
    """Send webhooks that Segment rejects; return the statuses of the answers."""
    return [client.post(make_event(f"{n}", metric="poison")).status_code for n in range(number)]


def probes(segment):
    return sum(upload == ["customerio:relay_check"] for upload in segment.uploads)


@pytest.fixture
def every_event(segment):
    """Segment answers 400 to every event, as it does where the key is wrong."""
    segment.poison = {"customerio:email_opened", "customerio:email_poison", "customerio:relay_check"}


@pytest.mark.usefixtures("every_event")
def test_a_wrong_key_is_said_and_loses_at_most_five_events_to_dead_letters(client, segment):
    assert reject(client, 5) == [202] * 5
    answer = client.post(make_event("a"))
    assert (answer.status_code, answer.json()) == (503, {"status": "retry", "reason": KEY})
    assert answer.headers["Retry-After"] == "1"
    assert reject(client, 20) == [503] * 20
    assert probes(segment) == 1
    segment.poison = set()
    assert client.post(make_event("a")).status_code == 200
    assert segment.events() == ["event-a"]


def test_a_poisoned_event_stops_nobody_however_often_it_comes(client, segment):
    segment.poison = {"customerio:email_poison"}
    assert reject(client, 12) == [202] * 12
    assert probes(segment) == 2
    assert client.post(make_event("a")).status_code == 200


def test_an_accepted_event_speaks_for_the_key(client, segment):
    segment.poison = {"customerio:email_poison"}
    assert reject(client, 5) == [202] * 5
    assert client.post(make_event("a")).status_code == 200
    assert reject(client, 5) == [202] * 5
    assert probes(segment) == 0


PROBES = {  # settings -> the name of the probe, and of what Segment rejects
    "a prefix": ({"EVENT_PREFIX": "cio "}, "cio relay_check", "cio email_poison"),
    "Segment's names": ({"EVENT_NAMES": "segment"}, "Relay Check", "Email Poison"),
}


@pytest.mark.parametrize(("settings", "name", "poison"), PROBES.values(), ids=PROBES.keys())
def test_the_probe_is_the_event_that_check_sends(segment, settings, name, poison):
    client = InProcess(segment, **settings)
    segment.poison = {poison}
    reject(client, 6)
    (probe,) = segment.kept.values()
    assert (probe["event"], probe["anonymousId"]) == (name, "relay_check")
    assert probe["messageId"].startswith("customerio-check-")
    assert probe["integrations"] == NO_ECHO


def test_without_an_answer_to_the_probe_it_is_to_be_sent_again(client, segment):
    segment.poison = {"customerio:email_poison"}
    assert reject(client, 5) == [202] * 5
    segment.faults.extend(["400", "500"])
    answer = client.post(make_event(metric="poison"))
    assert (answer.status_code, answer.json()["reason"]) == (503, "Segment answered 500")
    assert reject(client, 1) == [202]  # probed again


def test_an_event_that_is_too_large_for_segment_says_nothing_about_the_key(client, segment):
    segment.fault = "413"
    assert reject(client, 12) == [202] * 12
    assert len(segment.requests) == 12


def test_what_never_reached_segment_says_nothing_about_the_key(client, segment):
    assert [client.post(make_event(metric=None)).status_code for _ in range(12)] == [202] * 12
    assert segment.requests == []


@pytest.mark.usefixtures("every_event")
def test_each_worker_counts_for_itself(client, segment):
    other = InProcess(segment)
    assert reject(client, 6) == [202] * 5 + [503]
    assert reject(other, 6) == [202] * 5 + [503]


@pytest.mark.usefixtures("every_event")
def test_under_gunicorn_a_wrong_key_stops_at_five_even_where_webhooks_share_uploads(start, segment):
    relay = start(segment, WEB_CONCURRENCY="1")
    segment.latency = 0.02
    answers = relay.post_all([make_event(number) for number in range(60)])
    assert sorted(answer.status_code for answer in answers) == [202] * 5 + [503] * 55
    assert {answer.json()["reason"] for answer in answers if answer.status_code == 503} == {KEY}
    assert max(answer.seconds for answer in answers) < 4
    assert probes(segment) == 1
    segment.poison = set()
    until(lambda: relay.post(make_event("after")).status_code == 200)
