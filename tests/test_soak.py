"""A short run of `make soak`, and the week's arithmetic."""

import re
import subprocess
import sys

import fake_customerio
import pytest
import week
from conftest import ROOT


@pytest.mark.gunicorn
def test_nothing_is_lost_in_a_short_soak():
    soak = subprocess.run(
        [sys.executable, "proof/soak.py", "6"], cwd=ROOT, capture_output=True, text=True, timeout=200, check=False
    )
    assert soak.returncode == 0, soak.stdout + soak.stderr
    assert "Nothing lost." in soak.stdout
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
