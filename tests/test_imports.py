"""Importing any module, and making an app, changes nothing else in the process."""

import os
import subprocess
import sys

from conftest import KEYS, ROOT

MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in [*ROOT.glob("*.py"), *(ROOT / "ops").glob("*.py")]
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
from shared import Shared
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
    assert {"app", "config", "delivery", "message", "segment_client", "shared", "translate", "ops.page"} <= set(MODULES)
    assert run(IMPORT_ALL) == f"imported {len(MODULES)}\n"


def test_making_an_app_replaces_nothing_of_the_process():
    assert run(MAKE_AN_APP).endswith("the same\n")


def test_the_arbiter_loads_nothing_that_gevent_has_yet_to_patch():
    """A worker patches the standard library after the fork: threads and sockets imported before stay as they were."""
    code = (
        "import runpy, sys; runpy.run_path('gunicorn.conf.py')\n"
        "late = {'app', 'body', 'delivery', 'dead_letters', 'key_check', 'message', 'requests', 'segment_client'}\n"
        "print(sorted(late & set(sys.modules)))"
    )
    env = KEYS | {"PATH": os.environ["PATH"]}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
