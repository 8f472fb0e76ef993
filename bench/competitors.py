"""Who is measured: the relay and what one would run instead, how each starts, and what it does not do."""

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "proof"))
from harness import APP  # noqa: E402 - needs the path


class Competitor(NamedTuple):
    what: str  # what it is, and what it doesn't do
    options: dict[str, Any]  # of harness.Relay
    waits: bool = True  # for Segment, before it answers


UNGUARDED = "*Unguarded*"  # introduction.md says what that means


def present() -> dict[str, Competitor]:
    """Return by name who can take part on this machine, the relay first."""
    found = {"relay": Competitor("This relay, with everything on.", {"command": [APP]})}
    if importlib.util.find_spec("aiohttp") and importlib.util.find_spec("uvloop"):
        options = {"program": [sys.executable], "command": [str(HERE / "aiohttp_relay.py")]}
        found["aiohttp"] = Competitor(
            f"[A relay](../bench/aiohttp_relay.py) on aiohttp and uvloop, two processes. {UNGUARDED}.", options
        )
    if shutil.which("go"):
        found["Go"] = Competitor(
            f"[A relay](../bench/relay.go) on Go's `net/http`. {UNGUARDED}.", {"program": [built()], "command": []}
        )
    if program := node_red():
        flow = ["--settings", str(HERE / "node-red-settings.js"), str(HERE / "node-red-flow.json")]
        found["Node-RED"] = Competitor(
            f"[A flow](../bench/node-red-flow.json), one process. {UNGUARDED}.", {"program": program, "command": flow}
        )
    found["bare Flask"] = Competitor(
        "Parses the JSON and answers, under the relay's gunicorn settings. Sends nothing to Segment.",
        {"command": ["others:bare()"]},
        waits=False,
    )
    if folder := os.environ.get("OTHER"):
        command = {"command": [os.environ.get("APP") or APP], "folder": Path(folder)}
        found["other"] = Competitor(f"The relay in {folder}.", command)
    return found


# These would disturb others that run beside them, so each is measured alone.
CLIENTS = {
    "one call each": Competitor(
        f"Flask and Segment's client with `sync_mode`. {UNGUARDED}; follows redirects.",
        {"command": ["others:with_client(sync_mode=True)"]},
    ),
    "fire and forget": Competitor(
        f"Flask and Segment's client with its queue in memory, which a crash empties. {UNGUARDED}.",
        {"command": ["others:with_client(max_queue_size=1_000_000)"]},
        waits=False,
    ),
}


def absent() -> list[str]:
    """Return how to have those take part who can't."""
    missing = {
        "aiohttp": (importlib.util.find_spec("aiohttp"), "make install the development tools"),
        "Go": (shutil.which("go"), "apt-get install golang-go"),
        "Node-RED": (node_red(), "npm install -g node-red, or set NODE_RED to its red.js"),
    }
    return [f"{name} is left out: {how}." for name, (found, how) in missing.items() if not found]


def node_red() -> list[str]:
    """Return the command of Node-RED, or nothing if it isn't installed."""
    if script := os.environ.get("NODE_RED"):
        return ["node", script]
    command = shutil.which("node-red")
    return [command] if command else []


def built() -> str:
    """Return the path of relay.go's program."""
    program = str(Path(tempfile.mkdtemp(prefix="bench-")) / "relay")
    subprocess.run(["go", "build", "-o", program, HERE / "relay.go"], check=True)
    return program
