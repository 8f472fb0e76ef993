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


def test_every_test_that_the_security_page_names_exists():
    tests = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    named = re.findall(r"`(test_\w+)`", (ROOT / "SECURITY.md").read_text())
    assert len(named) > 20
    assert [name for name in named if f"def {name}(" not in tests] == []


@pytest.mark.parametrize("name", ["requirements.txt", "requirements-dev.txt"])
def test_every_dependency_is_pinned_with_a_hash(name):
    entries = re.split(r"\n(?=[a-zA-Z])", re.sub(r"(?m)^ *#.*\n", "", (ROOT / name).read_text()).strip())
    assert len(entries) > 10
    for entry in entries:
        assert re.match(r"[\w.-]+==[\w.]+ \\\n    --hash=sha256:", entry), entry
