"""A short run of `make soak`, and the week's arithmetic."""

import re
import subprocess
import sys

import fake_customerio
import pytest
import week
from conftest import ROOT

# Promises that a busy machine can break; `make soak` by itself holds them, too.
OF_TIME = re.compile("no answer within|to stop")


@pytest.mark.gunicorn
def test_nothing_is_lost_in_a_short_soak():
    soak = subprocess.run(
        [sys.executable, "proof/soak.py", "6"], cwd=ROOT, capture_output=True, text=True, timeout=200, check=False
    )
    broken = re.findall("^BROKEN: (.*)$", soak.stdout, re.MULTILINE)
    assert [promise for promise in broken if not OF_TIME.search(promise)] == [], soak.stdout + soak.stderr
    assert ("promises broken." if broken else "Nothing lost.") in soak.stdout, soak.stderr
    assert int(re.search(r"acknowledged with 200, all at Segment +(\d+)", soak.stdout)[1]) > 100


WAITS = {
    "503": (503, 1, 10),
    "503 again": (503, 2, 20),
    "500": (500, 1, 3600),
    "500 again": (500, 2, 20),
    "refused": (fake_customerio.BROKEN, 1, 3600),
    "no answer": (fake_customerio.TIMED_OUT, 1, 10),
    "many": (503, 1000, 3600),
}


@pytest.mark.parametrize(("outcome", "failures", "seconds"), WAITS.values(), ids=WAITS.keys())
def test_customerio_waits(outcome, failures, seconds):
    assert fake_customerio.wait_before_retry(outcome, failures) == seconds


def test_the_table_of_the_design_is_what_the_simulation_says():
    assert week.table() in (ROOT / "docs/design.md").read_text()
