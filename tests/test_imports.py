"""What an import may do, and who may import whom."""

import ast
import os
import subprocess
import sys

import pytest
from conftest import KEYS, ROOT

ROOMS = ("relay", "server", "ops")
MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in [*ROOT.glob("*.py"), *(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))]
    if path.stem not in ("__init__", "gunicorn.conf")
)

WRONG = {
    "SEGMENT_HOST": "segment",
    "DRY_RUN": "maybe",
    "ALLOW_UNSIGNED": "maybe",
    "ECHO_TO_CUSTOMERIO": "maybe",
    "PORT": "http",
    "WEB_CONCURRENCY": "many",
    "LOG_LEVEL": "loud",
    "LOG_FORMAT": "xml",
    "DEAD_LETTER_FILE": "/nowhere/at/all",
}

IMPORT_ALL = f"""
import importlib, logging, os, sys

read = set()

class Watched(type(os.environ)):
    def __getitem__(self, name):
        frame = sys._getframe(1)
        while frame.f_code.co_filename.startswith("<frozen"):  # os.environ.get() and the like
            frame = frame.f_back
        read.add((name, frame.f_code.co_filename))
        return super().__getitem__(name)

os.environ.__class__ = Watched
os.environ.get("PORT")
assert read == {{("PORT", "<string>")}}, "reading is not noticed"
read.clear()
for name in {MODULES}:
    importlib.import_module(name)
ours = [(name, file) for name, file in read if file.startswith("{ROOT}/") and "/.venv/" not in file]
assert not ours, ours
assert not logging.getLogger().handlers, logging.getLogger().handlers
assert not logging.getLogger("relay").handlers
print("imported", len({MODULES}))
"""

MAKE_AN_APP = """
import select, socket, ssl, threading, time, logging
from segment.analytics import request as segment

before = segment._session, select.poll, socket.socket, threading.Thread, time.sleep, ssl.SSLContext
from app import create_app
from config import Config
from server.shared import Shared
app = create_app(Config.from_env({"DRY_RUN": "1"}), Shared())
assert app.test_client().post("/webhook", json={"metric": "m", "data": {"customer_id": "1"}}).status_code == 200
after = segment._session, select.poll, socket.socket, threading.Thread, time.sleep, ssl.SSLContext
assert all(one is other for one, other in zip(before, after, strict=True)), (before, after)
assert not logging.getLogger().handlers, logging.getLogger().handlers
print("the same")
"""


def run(code):
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=ROOT,
        env=WRONG | {"PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_reads_no_settings_and_configures_no_logging():
    assert {"app", "config", "translate", "relay.segment", "server.worker", "ops.page.routes"} <= set(MODULES)
    assert run(IMPORT_ALL) == f"imported {len(MODULES)}\n"


def test_making_an_app_replaces_nothing_of_the_process():
    assert run(MAKE_AN_APP).endswith("the same\n")


def test_the_arbiter_loads_nothing_that_gevent_has_yet_to_patch():
    """A worker patches the standard library after the fork: threads and sockets imported before stay as they were."""
    code = (
        "import runpy, sys; runpy.run_path('gunicorn.conf.py')\n"
        "rooms = {'app', 'relay.body', 'relay.delivery', 'relay.dead_letters', 'relay.key_check', 'relay.segment'}\n"
        "print(sorted((rooms | {'relay.exchange', 'requests'}) & set(sys.modules)))"
    )
    env = KEYS | {"PATH": os.environ["PATH"]}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


# A room of ours -> the rooms that it may import from: arrows run one way.
ARROWS = {
    "translate": set(),
    "relay": {"relay", "translate"},
    "server": {"server", "relay"},
    "config": {"relay", "translate"},
    "ops": {"ops", "server", "relay", "config", "translate"},
    "app": {"ops", "server", "relay", "config", "translate"},
    "gunicorn": {"server", "config"},
}


def room(path):
    return path.relative_to(ROOT).parts[0].partition(".")[0]


def imported(path):
    """Return the modules that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level  # a relative import would hide the arrow
            yield node.module


FILES = sorted([*ROOT.glob("*.py"), *(path for name in ROOMS for path in (ROOT / name).rglob("*.py"))])


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_arrows_run_one_way(path):
    rooms = {module.partition(".")[0] for module in imported(path)} & set(ARROWS) - {"gunicorn"}
    assert rooms <= ARROWS[room(path)]


def test_the_application_knows_what_people_see_by_one_import():
    assert {module for module in imported(ROOT / "app.py") if module.startswith("ops")} == {"ops.watch"}


def says_it_is_pure(path):
    return (ast.get_docstring(ast.parse(path.read_text())) or "").partition("\n")[0].endswith("Pure.")


PURE = list(filter(says_it_is_pure, FILES))
IMPURE = {"flask", "requests", "os", "time", "socket", "gevent", "gunicorn"}


def test_the_core_says_that_it_is_pure():
    core = {
        "translate.py",
        "config.py",
        "relay/outcomes.py",
        "relay/answers.py",
        "relay/signature.py",
        "relay/proxies.py",
    }
    assert core <= {str(path.relative_to(ROOT)) for path in PURE}


@pytest.mark.parametrize("path", PURE, ids=lambda path: str(path.relative_to(ROOT)))
def test_pure_modules_import_neither_flask_nor_requests_nor_os(path):
    assert {module.partition(".")[0] for module in imported(path)} & IMPURE == set()
