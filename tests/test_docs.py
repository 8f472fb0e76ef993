"""The documents say what the code does."""

import ast
import json
import re
import shutil
import subprocess
from datetime import UTC, datetime

import pytest
from conftest import ROOT
from test_thirty import COSTS

from config import KEY_PAGE, KEYS, SETTINGS, VERSION, WEBHOOK_PAGE, Config, ConfigError
from relay.message import to_message
from relay.outcomes import ENDS
from translate import parse, translate

README = (ROOT / "README.md").read_text()
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()
OPERATING = (ROOT / "docs/operating.md").read_text()
DESIGN = (ROOT / "docs/design.md").read_text()
DOCUMENTS = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "docs").glob("**/*.md"), *(ROOT / ".github").glob("**/*.md")],
    key=str,
)


def rows(text):
    """Return the cells of each row of the tables in a document, but for their heads."""
    tables = re.findall(r"^\|.+\n\|[ :|-]+\n((?:\|.+\n)+)", text, re.MULTILINE)
    return [[cell.strip() for cell in line.strip("|").split("|")] for table in tables for line in table.splitlines()]


def relative(path):
    return str(path.relative_to(ROOT))


def test_there_are_documents():
    assert {"README.md", "SECURITY.md", "CONTRIBUTING.md", "CHANGELOG.md"} <= set(map(relative, DOCUMENTS))
    assert {"docs/operating.md", "docs/design.md", "docs/moving.md", "docs/performance.md"} <= set(
        map(relative, DOCUMENTS)
    )


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 240


SET_BY_HEROKU = {"PORT", "WEB_CONCURRENCY"}
APP_JSON = json.loads((ROOT / "app.json").read_text())["env"]


def default(setting):
    """Return a default as a person would set it."""
    return str(int(setting.default)) if isinstance(setting.default, bool) else str(setting.default or "")


def test_the_settings_of_the_readme_are_the_declared_ones():
    declared = [
        [
            f"`{setting.name}`",
            "required" if setting.name in KEYS else f"`{default(setting)}`" if default(setting) else "",
            setting.meaning,
        ]
        for setting in SETTINGS.values()
    ]
    assert [row for row in rows(README) if row[0] in [name for name, *_ in declared]] == declared


def test_app_json_has_the_settings_that_heroku_does_not_set():
    assert list(APP_JSON) == [setting.name for setting in SETTINGS.values() if setting.name not in SET_BY_HEROKU]


@pytest.mark.parametrize("setting", [each for each in SETTINGS.values() if each.name in APP_JSON], ids=lambda s: s.name)
def test_app_json_says_of_a_setting_what_its_declaration_says(setting):
    entry = APP_JSON[setting.name]
    assert entry["description"].startswith(setting.meaning.replace("`", ""))
    assert entry.get("required", True) == (setting.name in KEYS)
    assert entry.get("value", default(setting)) == default(setting)


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
    message = to_message(call)
    assert f"```\ntrack call:\n{json.dumps(json.loads(message.json), indent=2)}\n```" in README
    assert f'{{"status":"dry-run","message_id":"{message.id}"}}' in README


EXAMPLES = [
    (relative(path), *example)
    for path in DOCUMENTS
    for example in re.findall(
        r"^\$ (?:([A-Z_]+=\S+) )?\S+ -m ops translate (\S+)\n(\{.+)$", path.read_text(), re.MULTILINE
    )
]


def test_there_are_examples_of_a_command():
    assert len(EXAMPLES) >= 2


@pytest.mark.parametrize(("_path", "setting", "file", "printed"), EXAMPLES, ids=[" ".join(e[:3]) for e in EXAMPLES])
def test_what_a_command_prints_in_a_document_is_what_it_prints(_path, setting, file, printed):
    config = Config.from_env({"DRY_RUN": "1"} | dict([setting.split("=")] if setting else []))
    call = translate(parse((ROOT / file).read_bytes()), received=datetime.now(UTC), **config.mapping())
    assert to_message(call).json == printed


def test_the_example_of_todays_form_comes_first():
    assert README.index("tests/events/email_opened.json") < README.index("tests/events/legacy.json")


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


MODULES = sorted(relative(path) for room in (".", "relay", "server") for path in (ROOT / room).glob("[!_]*.py"))


@pytest.mark.parametrize("name", [*MODULES, "ops"])
def test_every_module_is_in_the_design(name):
    assert f"](../{name})" in DESIGN


def test_the_thirty_lines_of_the_design_are_those_that_run():
    _, _, lines = (ROOT / "bench/thirty_lines.py").read_text().split('"""', 2)
    assert f"```python\n{lines.strip()}\n```" in DESIGN


def test_the_design_says_what_each_failure_costs_in_thirty_lines():
    said = [(case, row[0]) for row in rows(DESIGN) if len(row) == 2 for case in row[1].split("; ")]
    costs = {case: "; ".join(cost for other, cost in said if other == case) for case, _ in said}
    assert {"nothing": "nothing"} | costs == COSTS


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


# The log. -----------------------------------------------------------------------------------------

# What a live relay can log stands in these.
TABLES = {"relay/outcomes.py", "translate.py"}  # their sentences are read from the table of outcomes
TO_SEGMENT = {
    "relay/segment.py",
    "relay/exchange.py",
    "relay/tls.py",
    "relay/proxies.py",
}  # these talk to Segment, not to the log
LOGGING = [ROOT / name for name in MODULES if name not in TABLES | TO_SEGMENT]
LOGGING.append(ROOT / "ops/monitor/observe.py")
SENTENCES = {sentence.replace("{}", "…") for kind in ENDS for sentence in kind.sentences.values()}
NOT_LOGGED = {
    "not set up: no webhook is accepted",  # the page and `check`
    "and … more",  # omitted_properties, and the room for it
    '"omitted_properties": [], "and 1000000 more", ',
    '{"batch": […], "sentAt": …, "writeKey": …}',  # an upload
    "HTTP/1.1 … …\r\nContent-Type: application/json\r\n",  # an answer
    "Retry-After: …\r\n",
    "…Content-Length: …\r\n…Connection: close\r\n\r\n…",
    "the mapping leaves it out…",  # only in the answer, and on the page of a dry run
    "the head is too large",  # as "not an HTTP request"
    "Copy it again from Segment: your source > Settings > API Keys.",  # the end of a problem
    KEY_PAGE,  # in problems
    WEBHOOK_PAGE,
}


def texts(path):
    """Return what reads like a text in a module, but for docstrings: at least three words, … for what varies."""
    tree = ast.parse(path.read_text())
    nodes = list(ast.walk(tree))
    others = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}  # docstrings
    others |= {id(node.value) for node in nodes if isinstance(node, ast.Attribute) and node.attr == "split"}
    settings = [node for node in nodes if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "_setting"]
    others |= {id(part) for node in settings for part in ast.walk(node)}  # README.md says those
    parts = {id(part) for node in nodes if isinstance(node, ast.JoinedStr) for part in ast.walk(node) if part != node}
    found = set()
    for node in nodes:
        if id(node) in others | parts:
            continue
        if isinstance(node, ast.JoinedStr):
            pieces = [part.value if isinstance(part, ast.Constant) else "…" for part in node.values]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            pieces = [node.value]
        else:
            continue
        text = "".join(pieces)
        if len(re.findall(r"[A-Za-z]{2,}|…", text)) >= 3 and re.search(r"[\w…,:] [\w…]", text):
            found.add(text)
    return found


LOGGED = sorted(SENTENCES.union(*map(texts, LOGGING)) - NOT_LOGGED)

SEEN = OPERATING[OPERATING.index("## What you see") : OPERATING.index("## 200s, but")]
EXPLAINED = sorted(
    set(re.findall(r"(?<!\*)\*([^*]+)\*(?!\*)", re.sub(r"\*\*[^*]+\*\*", "", SEEN).replace("\n  ", " ")))
)


def covers(explained, text):
    """Return whether "a ... b" of the document stands for a text of the source, in which … stands for what varies."""
    setting = re.compile(rf"^({'|'.join(SETTINGS)})\b")
    explained, text = setting.sub("...", explained), setting.sub("…", text)
    parts = [re.escape(part.strip()) for part in explained.split("...")]
    return re.fullmatch(r"\s*.*\s*".join(parts), text.strip(), re.DOTALL) is not None


def test_there_are_texts_that_are_logged():
    assert len(LOGGED) > 50
    assert "Segment did not answer in time" in LOGGED
    assert not any(covers(explained, "A text that nobody explains: it is new") for explained in EXPLAINED)


@pytest.mark.parametrize("text", LOGGED)
def test_every_text_that_the_log_can_have_is_explained(text):
    assert any(covers(explained, text) for explained in EXPLAINED)


ELSEWHERE = {"the proxy got no answer from the relay", "not found", "method not allowed"}  # a proxy's, and werkzeug's


@pytest.mark.parametrize("explained", sorted(set(EXPLAINED) - ELSEWHERE))
def test_every_text_that_is_explained_can_be_logged(explained):
    assert any(covers(explained, text) for text in LOGGED)


ALERTS = re.findall(r"- alert: (\w+)", (ROOT / "docs/alerts.yml").read_text())


@pytest.mark.parametrize("name", ALERTS)
def test_every_alert_has_a_case_in_which_it_fires(name):
    assert f'ALERTS{{alertname="{name}",alertstate="firing"' in (ROOT / "tests/alerts.yml").read_text()


@pytest.mark.skipif(not shutil.which("promtool"), reason="no promtool here; Debian has it in the package prometheus")
def test_every_alert_fires_when_it_should_and_only_then():
    done = subprocess.run(
        ["promtool", "test", "rules", ROOT / "tests/alerts.yml"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
