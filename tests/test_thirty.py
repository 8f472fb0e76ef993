"""What thirty lines would do (`make thirty`), and that the relay doesn't."""

import pytest
import thirty

pytestmark = pytest.mark.gunicorn

LOST = "**the event is lost**"
AN_HOUR = "**no event for an hour**"
A_WEEK = "**no event for a week; this one is lost**"
ANYBODY = "**anybody can send events**"
IN_THE_LOG = "; the person's address is in the log"

# What fails -> what it costs in thirty lines.
COSTS = {
    "nothing": "nothing",
    "the relay restarts": AN_HOUR,
    "Segment's address redirects": LOST,
    "a captive portal answers 200 with a page": LOST,
    'Segment answers 200 and `"success": false`': LOST,
    "the connection ends within the head of a 200": LOST,
    "Segment answers 500": AN_HOUR,
    "Segment answers 429": AN_HOUR,
    "Segment answers 401": AN_HOUR,
    "Segment resets the connection": AN_HOUR,
    "Segment can't be reached": AN_HOUR,
    "Segment doesn't answer": "a retry in seconds",
    "Segment answers byte by byte": "a retry in seconds",
    "Segment rejects the event": A_WEEK,
    "the event is above 32 KB": A_WEEK + IN_THE_LOG,
    "the event contains NaN": A_WEEK,
    "the event contains half a character": A_WEEK,
    "the event is nested 600 deep": A_WEEK,
    "the event knows only an email address": A_WEEK,
    "the event names nobody": A_WEEK,
    "the event has no object_type": A_WEEK,
    "the event's timestamp is a text": A_WEEK,
    "a stranger sends without a signature": ANYBODY,
    "a stranger guesses the signature": ANYBODY,
    "Customer.io is a destination of the source": "**the event returns to Customer.io, as a new one**",
    "a second source has the same events": "**Segment drops the events of one of them**",
}
HARMLESS = {"nothing", "nothing: kept as a dead letter", "a retry in seconds"}


@pytest.fixture(scope="module")
def results():
    # More patient than Customer.io, so that a busy machine changes nothing; the thirty lines wait for 15 s and more.
    return thirty.results(patience=10)


@pytest.mark.parametrize(("case", "cost"), COSTS.items(), ids=COSTS.keys())
def test_thirty_lines(results, case, cost):
    assert results["thirty lines"][case].cost(thirty.CASES[case]) == cost


@pytest.mark.parametrize("case", thirty.CASES)
def test_relay(results, case):
    assert results["relay"][case].cost(thirty.CASES[case]) in HARMLESS
