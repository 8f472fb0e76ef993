"""The documents say what the code does."""

import json
import re

import pytest
from conftest import ROOT

README = (ROOT / "README.md").read_text()
SETTINGS = sorted(set(re.findall(r'read\.\w+\("([A-Z_]+)"|env\.get\("([A-Z_]+)"', (ROOT / "config.py").read_text())))
SETTINGS = sorted({name for pair in SETTINGS for name in pair if name})


def test_there_are_settings():
    assert len(SETTINGS) == 12


@pytest.mark.parametrize("name", SETTINGS)
def test_every_setting_is_in_the_readme(name):
    assert f"| `{name}` |" in README


@pytest.mark.parametrize("name", sorted(set(SETTINGS) - {"PORT", "WEB_CONCURRENCY"}))
def test_every_setting_that_heroku_does_not_set_is_in_app_json(name):
    assert name in json.loads((ROOT / "app.json").read_text())["env"]


def test_app_json_has_no_other_settings():
    assert set(json.loads((ROOT / "app.json").read_text())["env"]) <= set(SETTINGS)


@pytest.mark.parametrize("target", re.findall(r"`make ([a-z]+)", README))
def test_every_make_command_of_the_readme_exists(target):
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


def test_the_example_of_the_readme_is_the_one_that_is_tested():
    example = json.loads((ROOT / "tests/events/legacy.json").read_text())
    assert example["event_id"] in README


@pytest.mark.parametrize("path", re.findall(r"\]\((?!http)([^)#]+)\)", README))
def test_every_link_of_the_readme_leads_somewhere(path):
    assert (ROOT / path).exists()
