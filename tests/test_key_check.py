"""A key that Segment refuses costs at most five dead letters a worker, and a refused event stops nobody."""

import threading
from time import monotonic

import pytest
from conftest import IN_TIME, InProcess, make_event, until

from relay.key_check import IN_A_ROW, PROBE_EVERY, KeyCheck
from relay.outcomes import RateLimited, Rejected, RetryLater, TransientError
from translate import NO_ECHO

NOT_SEGMENT = "what answered is not Segment: check SEGMENT_HOST and proxies"
KEY = "Segment refuses every event (400): check SEGMENT_WRITE_KEY"
REFUSED = Rejected(400)
LARGE = Rejected(413)
PROXY = Rejected(413, by_segment=False)
DOWN = TransientError("segment_500")


class Case:
    """A KeyCheck on a clock of its own, and a Segment whose answers to probes are given."""

    def __init__(self):
        self.now = 1_000.0
        self.answer = None  # to a probe: None, or the exception
        self.probes = 0
        self.check = KeyCheck(self.probe, clock=lambda: self.now)

    def probe(self, seconds):
        assert seconds > 0
        self.probes += 1
        if self.answer:
            raise self.answer

    def reject(self, error=REFUSED):
        """Let Segment reject an event; return "dead" for a dead letter, or why it is to be sent again."""
        try:
            self.check.rejected(error, self.now + 3)
        except RetryLater as error:
            return error.reason
        return "dead"

    def outcomes(self, steps):
        """Play steps: r(ejected), l(arge), p(roxy), a(ccepted), or what a probe is answered; return the outcomes."""
        events = {"r": REFUSED, "l": LARGE, "p": PROXY}
        answers = {
            "ok": None,
            "page": PROXY,
            "400": REFUSED,
            "500": DOWN,
            "429": RateLimited(2),
        }
        outcomes = []
        for step in steps.split():
            if step == "a":
                self.check.accepted()
            elif step in events:
                self.now += 0.01
                outcomes.append(self.reject(events[step]))
            elif step.startswith("+"):
                self.now += float(step)
            else:
                self.answer = answers[step]
        return " ".join(outcomes)


@pytest.fixture
def case():
    return Case()


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
    "an event that is too large": ("400 l l l l l l l l", DEAD + " dead" * 3, 0),
    "a proxy refuses one event": ("ok p", " dead", 1),
    "a proxy refuses one event after the other": ("ok p p p", " dead" * 3, 3),
    "a proxy refuses all": ("page p p", "not_segment not_segment", 1),
    "a proxy refuses all, and then none": ("page p +10 ok p p", "not_segment dead dead", 3),
    "a proxy refuses all, until an event is accepted": ("page p a ok p", "not_segment dead", 2),
    "a proxy refuses one event, and Segment the probe": ("400 p", "not_segment", 1),
    "a probe fails after a proxy's refusal": ("500 p ok p", "segment_500 dead", 2),
    "events that a proxy refuses say nothing about the key": ("ok p p p p p p 400 r", " dead" * 7, 6),
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
            check.rejected(REFUSED, monotonic() + seconds)
        except RetryLater as error:
            outcomes.append(error.reason)

    for _ in range(IN_A_ROW):
        check.rejected(REFUSED, monotonic() + 1)
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


def test_events_that_wait_for_a_probe_share_the_next_one():
    probes, outcomes = [], []
    go_on = threading.Event()

    def probe(seconds):
        probes.append(seconds)
        go_on.wait(10)

    check = KeyCheck(probe)
    threads = [
        threading.Thread(target=lambda: outcomes.append(check.rejected(PROXY, monotonic() + 9))) for _ in range(64)
    ]
    for thread in threads:
        thread.start()
    until(lambda: probes)
    go_on.set()
    for thread in threads:
        thread.join(10)
    assert len(outcomes) == 64
    assert len(probes) <= 3
    check.rejected(PROXY, monotonic() + 9)
    assert len(probes) <= 4


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


WAYS = {  # what Segment's place answers to the event and to the check event -> what becomes of the event
    "a proxy dislikes one event": (["html:400", None], 202, "it is refused on the way to Segment (400)"),
    "a proxy finds one event too large": (["html:413", None], 202, "it is refused on the way to Segment (413)"),
    "a captive portal": (["html:400", "html:400"], 503, NOT_SEGMENT),
    "another limit for the body": (["html:413", "html:413"], 503, NOT_SEGMENT),
}


@pytest.mark.parametrize(("faults", "status", "reason"), WAYS.values(), ids=WAYS.keys())
def test_a_refusal_that_is_not_segments_is_decided_at_once(client, segment, faults, status, reason):
    segment.faults.extend(faults)
    answer = client.post(make_event("a"))
    assert (answer.status_code, answer.json()["reason"]) == (status, reason)
    assert len(segment.requests) == 2
    assert client.post(make_event("after")).status_code == 200


def test_all_check_events_of_a_worker_are_one_for_segment(client, segment):
    segment.poison = {"customerio:email_poison"}
    reject(client, 30)
    assert probes(segment) > 1
    assert [message["event"] for message in segment.kept.values()] == ["customerio:relay_check"]
    assert segment.duplicates == probes(segment) - 1


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
    assert max(answer.seconds for answer in answers) < IN_TIME
    assert probes(segment) == 1
    segment.poison = set()
    until(lambda: relay.post(make_event("after")).status_code == 200)
