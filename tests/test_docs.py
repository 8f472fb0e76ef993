"""The documents say what the code does."""

import json
import re
import shutil
import subprocess
from datetime import UTC, datetime

import pytest
from conftest import ROOT

from config import VERSION, Config, ConfigError
from segment_client import SegmentClient
from translate import parse, translate

README = (ROOT / "README.md").read_text()
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()
OPERATING = (ROOT / "docs/operating.md").read_text()
DESIGN = (ROOT / "docs/design.md").read_text()
DOCUMENTS = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "docs").glob("**/*.md"), *(ROOT / ".github").glob("**/*.md")],
    key=str,
)
SETTINGS = sorted(set(re.findall(r'read\.\w+\("([A-Z_]+)"', (ROOT / "config.py").read_text())))


def rows(text):
    """Return the cells of each row of the tables in a document, but for their heads."""
    tables = re.findall(r"^\|.+\n\|[ :|-]+\n((?:\|.+\n)+)", text, re.MULTILINE)
    return [[cell.strip() for cell in line.strip("|").split("|")] for table in tables for line in table.splitlines()]


def relative(path):
    return str(path.relative_to(ROOT))


def test_there_are_settings():
    assert len(SETTINGS) == 13


def test_there_are_documents():
    assert {"README.md", "SECURITY.md", "CONTRIBUTING.md", "CHANGELOG.md"} <= set(map(relative, DOCUMENTS))
    assert {"docs/operating.md", "docs/design.md", "docs/performance.md"} <= set(map(relative, DOCUMENTS))


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 220


@pytest.mark.parametrize("name", SETTINGS)
def test_every_setting_is_in_the_readme(name):
    assert f"| `{name}` |" in README


@pytest.mark.parametrize("name", sorted(set(SETTINGS) - {"PORT", "WEB_CONCURRENCY"}))
def test_every_setting_that_heroku_does_not_set_is_in_app_json(name):
    assert name in json.loads((ROOT / "app.json").read_text())["env"]


def test_app_json_has_no_other_settings():
    assert set(json.loads((ROOT / "app.json").read_text())["env"]) <= set(SETTINGS)


@pytest.mark.parametrize("path", DOCUMENTS, ids=relative)
def test_every_make_command_exists(path):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {"run", "test"} <= targets
    named = re.findall(r"`make ([a-z-]+)|^\$? ?make ([a-z-]+)", path.read_text(), re.MULTILINE)
    assert {one or other for one, other in named} <= targets


@pytest.mark.parametrize("path", DOCUMENTS, ids=relative)
def test_every_command_of_the_relay_exists(path):
    from ops.__main__ import main

    assert set(re.findall(r"python -m ops ([a-z]+)", path.read_text())) <= set(main.commands)


def test_the_example_of_the_readme_is_what_the_relay_makes_of_its_webhook():
    webhook = re.search(r"curl -d @(\S+)", README)[1]
    config = Config.from_env({"DRY_RUN": "1"})
    call = translate(parse((ROOT / webhook).read_bytes()), received=datetime.now(UTC), **config.mapping())
    message = SegmentClient(config.segment_write_key, config.segment_host).to_message(call)
    assert f"```\ntrack call:\n{json.dumps(json.loads(message.json), indent=2)}\n```" in README
    assert f'{{"status":"dry-run","message_id":"{message.id}"}}' in README


def test_the_message_about_wrong_settings_is_the_one_that_is_printed():
    command, *printed = re.search(r"\$ (DRY_RUN=maybe .+\n(?:.+\n)+)```", OPERATING)[1].splitlines()
    with pytest.raises(ConfigError) as error:
        Config.from_env(dict(re.findall(r"([A-Z_]+)=(\S+)", command)))
    assert printed[1:] == str(error.value).splitlines()  # below gunicorn's own line


@pytest.mark.skipif(not shutil.which("make"), reason="no make here")
def test_the_list_of_make_targets_is_that_of_make_help():
    done = subprocess.run(
        ["make", "--no-print-directory", "help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert f"$ make\n{done.stdout}```" in CONTRIBUTING


PLACES = [(re.findall(r"`([^`]+)`", files), re.findall(r"`(\w+)`", tables)) for _, files, tables in rows(CONTRIBUTING)]


def test_every_file_of_tests_has_a_place():
    named = [name for files, _ in PLACES for name in files]
    assert sorted(named) == sorted(relative(path) for path in (ROOT / "tests").glob("*") if is_of_tests(path))


def is_of_tests(path):
    return path.suffix == ".yml" or path.match("test_*.py")


@pytest.mark.parametrize(("files", "tables"), PLACES, ids=[" ".join(files) for files, _ in PLACES])
def test_every_table_of_tests_is_in_its_file(files, tables):
    text = "".join((ROOT / name).read_text() for name in files)
    assert [name for name in tables if not re.search(rf"^{name} = ", text, re.MULTILINE)] == []


def test_every_module_is_in_the_design():
    named = [re.search(r"\(\.\./([\w.]+)\)", file)[1] for file, *_ in rows(DESIGN) if file.startswith("[")]
    assert sorted(named) == sorted(["ops", *(path.name for path in ROOT.glob("*.py"))])


def test_the_latest_version_is_in_the_changelog():
    sections = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert sections[sections[0] == "Unreleased"] == VERSION  # what is next comes before it


def anchors(path):
    """Return the anchors that GitHub gives the headings of a document."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", DOCUMENTS, ids=relative)
def test_every_link_leads_somewhere(path):
    broken = []
    for target in re.findall(r"\]\((?!http|mailto:)([^)\s]+)\)", path.read_text()):
        file, _, anchor = target.partition("#")
        there = (path.parent / file) if file else path
        if not there.exists() or (anchor and there.suffix == ".md" and anchor not in anchors(there)):
            broken.append(target)
    assert broken == []


@pytest.mark.parametrize("path", [path for path in DOCUMENTS if path.name != "CHANGELOG.md"], ids=relative)
def test_every_test_that_a_document_names_exists(path):
    tests = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    named = re.findall(r"`(test_\w+)`", path.read_text())
    assert [name for name in named if f"def {name}(" not in tests] == []


ATTACKS = {f"{attacker} {attack}": tests for attacker, attack, _, tests in rows((ROOT / "SECURITY.md").read_text())}


def test_there_are_attacks():
    assert len(ATTACKS) > 20


@pytest.mark.parametrize("tests", ATTACKS.values(), ids=ATTACKS.keys())
def test_every_promise_of_the_security_page_names_a_test(tests):
    assert re.fullmatch(r"`test_\w+`(, `test_\w+`)*", tests)


@pytest.mark.parametrize("name", ["requirements.txt", "requirements-dev.txt"])
def test_every_dependency_is_pinned_with_a_hash(name):
    entries = re.split(r"\n(?=[a-zA-Z])", re.sub(r"(?m)^ *#.*\n", "", (ROOT / name).read_text()).strip())
    assert len(entries) > 10
    for entry in entries:
        assert re.match(r"[\w.-]+==[\w.]+ \\\n    --hash=sha256:", entry), entry


ALERTS = re.findall(r"- alert: (\w+)", (ROOT / "docs/alerts.yml").read_text())


@pytest.mark.parametrize("name", ALERTS)
def test_every_alert_has_a_case_in_which_it_fires(name):
    assert f'ALERTS{{alertname="{name}",alertstate="firing"' in (ROOT / "tests/alerts.yml").read_text()


@pytest.mark.skipif(not shutil.which("promtool"), reason="no promtool here")
def test_every_alert_fires_when_it_should_and_only_then():
    done = subprocess.run(
        ["promtool", "test", "rules", ROOT / "tests/alerts.yml"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
