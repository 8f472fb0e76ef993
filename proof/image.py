"""Build the image and try it as docs/operating.md runs it (`make image-test`).

It needs Linux, because the container uses this machine's loopback to reach a fake Segment. The arguments go to the
build. Exits 1 if anything is not as promised, or if the image could not be built or started.

    python proof/image.py [ARGUMENTS OF THE BUILD]
"""

import contextlib
import http.client
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator

from fake_segment import FakeSegment
from harness import KEYS, ROOT, SIGNING_KEY, answers, free_port, until

sys.path.insert(0, str(ROOT))
from config import VERSION
from relay.signature import sign

ENGINES = ("docker", "podman", "buildah")
NAME = f"relay-image-test-{os.getpid()}"  # of the image, the container and the volume
LETTERS = "/var/lib/relay/letters.jsonl"
VOLUME = f"{NAME}:/var/lib/relay"
GRACE = 15  # seconds, as in compose.yaml
HARDENED = ("--read-only", "--cap-drop", "ALL", "--security-opt", "no-new-privileges")
# What the kernel says of the container's first process, and of its root file system.
FACTS = """
import json
status = dict(line.split(":", 1) for line in open("/proc/1/status"))
root = next(line.split()[3] for line in open("/proc/mounts") if line.split()[1] == "/")
names = "Uid", "Gid", "CapEff", "CapBnd", "NoNewPrivs"
print(json.dumps({name: status[name].split()[0] for name in names} | {"root": root.split(",")[0]}))
"""

OPENED = {
    "event_id": "01J0000000000000000000OPEN",
    "object_type": "email",
    "metric": "opened",
    "timestamp": 1764000000,
    "data": {"customer_id": "42"},
}
NAMELESS = {"event_id": "01J000000000000000000NAMED", "timestamp": 1764000000, "data": {"customer_id": "42"}}


class Failed(Exception):
    """The image is not as promised, or can't be tried; `str()` says why in a sentence."""


def check(promise: str, kept: bool, found: object) -> None:
    """Print a promise that is kept; raise Failed with what was found if it isn't."""
    if not kept:
        raise Failed(f"Not so: {promise}. Found: {found}")
    print(f"ok  {promise}", flush=True)


def works(engine: str) -> bool:
    """Return whether an engine is installed and, if it has a daemon, that one answers."""
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        return subprocess.run([engine, "info"], capture_output=True, check=False, timeout=60).returncode == 0
    return False


class Engine:
    """The program that builds the image and runs the container."""

    def __init__(self, name: str) -> None:
        self.name = name

    def build(self, *arguments: str) -> None:
        """Build the image, showing the engine's own output."""
        # From another format, Podman and Buildah drop the health check. Layers would stay behind.
        env = os.environ | {"BUILDAH_FORMAT": "docker", "BUILDAH_LAYERS": "false"}
        command = [self.name, "build", "--tag", NAME, "--build-arg", f"VERSION={VERSION}", *arguments, str(ROOT)]
        if subprocess.run(command, env=env, check=False, timeout=1200).returncode != 0:
            raise Failed(f"{self.name} could not build the image; it says why above.")

    def run(self, *arguments: str) -> str:
        """Run a command of the engine and return its output; raise Failed if it fails."""
        done = subprocess.run([self.name, *arguments], capture_output=True, text=True, check=False, timeout=60)
        if done.returncode != 0:
            raise Failed(f"{self.name} {arguments[0]} failed ({done.returncode}): {done.stderr.strip()}")
        return done.stdout.strip()

    def inspect(self, kind: str, field: str) -> str:
        return self.run(kind, "inspect", "--format", field, NAME)

    def logs(self) -> str:
        done = subprocess.run([self.name, "logs", NAME], capture_output=True, text=True, check=False, timeout=60)
        return done.stdout + done.stderr

    def remove(self) -> None:
        """Remove what this run made, as far as it was made."""
        for command in (["rm", "--force"], ["volume", "rm"], ["rmi"]):
            with contextlib.suppress(subprocess.TimeoutExpired):
                subprocess.run([self.name, *command, NAME], capture_output=True, check=False, timeout=60)


def find_engine() -> Engine:
    """Return the first engine that works; raise Failed if there is none."""
    for name in ENGINES:
        if works(name):
            return Engine(name)
    raise Failed(f"None of {', '.join(ENGINES)} works here, so no image was built.")


@contextlib.contextmanager
def started(engine: Engine, segment: FakeSegment) -> Iterator[int]:
    """Run the container with everything taken from it that can be; yield its port."""
    port = free_port()
    settings = KEYS | {"SEGMENT_HOST": segment.url, "DEAD_LETTER_FILE": LETTERS, "PORT": str(port)}
    settings["NO_PROXY"] = "127.0.0.1"  # engines hand their own proxy to the container
    env = [part for name, value in settings.items() for part in ("--env", f"{name}={value}")]
    engine.run("run", "--detach", "--name", NAME, "--network", "host", "--volume", VOLUME, *HARDENED, *env, NAME)
    try:
        until(lambda: answers(f"http://127.0.0.1:{port}/health"), 30)
        yield port
    except (AssertionError, OSError) as error:
        raise Failed(f"The container does not serve ({error}). Its log:\n{engine.logs()}") from error


def request(port: int, method: str, path: str, body: bytes = b"", headers: dict[str, str] | None = None) -> int:
    """Return the status of one request to the container."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    with contextlib.closing(connection):
        connection.request(method, path, body, headers or {})
        return connection.getresponse().status


def post(port: int, event: object, key: str = SIGNING_KEY) -> int:
    """Return the status of a webhook that is signed with `key`."""
    body = json.dumps(event).encode()
    return request(port, "POST", "/webhook", body, sign(body, str(int(time.time())), key))


def try_image(engine: Engine) -> None:
    """Check what the image says of itself."""
    label = engine.inspect("image", '{{index .Config.Labels "org.opencontainers.image.version"}}')
    check(f"the version label is {VERSION}", label == VERSION, label)
    user = engine.inspect("image", "{{.Config.User}}")
    check("the user is a number and not root", user == "10001:10001", user)


def try_container(engine: Engine) -> None:
    """Start the container, send it webhooks, and stop it."""
    with FakeSegment() as segment, started(engine, segment) as port:
        facts = json.loads(engine.run("exec", NAME, "python", "-c", FACTS))
        none = "0" * 16
        expected = {"Uid": "10001", "Gid": "10001", "CapEff": none, "CapBnd": none, "NoNewPrivs": "1", "root": "ro"}
        check("it runs read-only, as its user, without capabilities", facts == expected, facts)
        status = request(port, "GET", "/health")
        check("GET /health is answered with 200", status == 200, status)
        probe = json.loads(engine.inspect("image", "{{json .Config.Healthcheck.Test}}"))
        done = subprocess.run([engine.name, "exec", NAME, *probe[1:]], check=False, timeout=60)
        check("the image's health check succeeds", done.returncode == 0, probe)
        log = engine.logs()
        check("the log begins with the version", f"Route to Segment {VERSION}" in log, log)

        status = post(port, OPENED, key="another key")
        check("a webhook with a wrong signature is refused", status >= 400 and not segment.kept, status)
        status = post(port, OPENED)
        kept = segment.events()
        check("a signed webhook is in Segment", status == 200 and kept == [OPENED["event_id"]], (status, kept))
        status = post(port, NAMELESS)
        check("an event without a name is a dead letter", status == 202, status)

        began = time.monotonic()
        engine.run("stop", "-t", str(GRACE), NAME)
        took, code = time.monotonic() - began, engine.inspect("container", "{{.State.ExitCode}}")
        check(f"SIGTERM ends it within {GRACE} s, here in {took:.1f} s", code == "0", f"exit code {code}")
    engine.run("rm", NAME)
    letters = engine.run("run", "--rm", "--name", NAME, "--volume", VOLUME, NAME, "cat", LETTERS)
    events = [json.loads(line)["event"] for line in letters.splitlines()]
    check("the dead letter is in the volume, without the container", events == [NAMELESS], letters)


def main() -> int:
    """Build, try and remove the image; return the exit status."""
    engine = None
    try:
        engine = find_engine()
        began = time.monotonic()
        engine.build(*sys.argv[1:])
        print(f"ok  {engine.name} built the image in {time.monotonic() - began:.0f} s", flush=True)
        if engine.name == "buildah":
            raise Failed("buildah starts no containers: with podman or docker the image would be tried, too.")
        try_image(engine)
        try_container(engine)
        print(f"The image has {int(engine.inspect('image', '{{.Size}}')) / 1e6:.0f} MB.")
    except (Failed, subprocess.TimeoutExpired) as problem:
        print(problem, file=sys.stderr)
        return 1
    finally:
        if engine:
            engine.remove()
    return 0


if __name__ == "__main__":
    sys.exit(main())
