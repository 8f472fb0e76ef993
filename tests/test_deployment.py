"""The image, the workflows and the manifest for Kubernetes: what matters in them. `make image-test` runs the image."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import ROOT

DOCKERFILE = (ROOT / "Dockerfile").read_text()
ADMITTED = re.findall(r"^!(.+)$", (ROOT / ".dockerignore").read_text(), re.MULTILINE)

# Kubernetes -------------------------------------------------------------------------------------

MANIFEST = (ROOT / "docs/kubernetes.yaml").read_text()
BY_KIND = {one["kind"]: one["spec"] for one in yaml.safe_load_all(MANIFEST)}
POD = BY_KIND["Deployment"]["template"]["spec"]
(RELAY,) = POD["containers"]

# What must be so -> where it is in the manifest, and what must be there.
HARDENED = {
    "two relays": (BY_KIND["Deployment"], "replicas", 2),
    "an update stops none before another is ready": (BY_KIND["Deployment"], "strategy.rollingUpdate.maxUnavailable", 0),
    "a drain stops one at a time": (BY_KIND["PodDisruptionBudget"], "maxUnavailable", 1),
    "not root": (POD, "securityContext.runAsNonRoot", True),
    "the user of the image": (POD, "securityContext.runAsUser", int(re.search(r"^USER (\d+):", DOCKERFILE, re.M)[1])),
    "system calls are filtered": (POD, "securityContext.seccompProfile.type", "RuntimeDefault"),
    "no token of the cluster": (POD, "automountServiceAccountToken", False),
    "read-only": (RELAY, "securityContext.readOnlyRootFilesystem", True),
    "no capabilities": (RELAY, "securityContext.capabilities", {"drop": ["ALL"]}),
    "no other rights either": (RELAY, "securityContext.allowPrivilegeEscalation", False),
    "ready when it serves": (RELAY, "readinessProbe.httpGet", {"path": "/health", "port": "http"}),
    "alive while it serves": (RELAY, "livenessProbe.httpGet", {"path": "/health", "port": "http"}),
    "the port of the relay": (RELAY, "ports", [{"name": "http", "containerPort": 8080}]),
    "the Service calls it by its name": (BY_KIND["Service"]["ports"][0], "targetPort", "http"),
}


@pytest.mark.parametrize(("spec", "path", "value"), HARDENED.values(), ids=HARDENED.keys())
def test_the_manifest_has(spec, path, value):
    for name in path.split("."):
        spec = spec[name]
    assert spec == value


def test_the_manifest_has_two_names_to_fill_in():
    assert sorted(re.findall(r"^ *\w+: ([A-Z]+)$", MANIFEST, re.MULTILINE)) == ["IMAGE", "SETTINGS"]


def test_service_budget_and_deployment_mean_the_same_pods():
    labels = BY_KIND["Deployment"]["template"]["metadata"]["labels"]
    assert BY_KIND["Deployment"]["selector"] == BY_KIND["PodDisruptionBudget"]["selector"] == {"matchLabels": labels}
    assert BY_KIND["Service"]["selector"] == labels


def test_kubernetes_kills_after_the_sleep_and_the_graceful_timeout():
    command, seconds = RELAY["lifecycle"]["preStop"]["exec"]["command"]
    graceful = int(re.search(r"^graceful_timeout = (\d+)", (ROOT / "gunicorn.conf.py").read_text(), re.MULTILINE)[1])
    assert command == "sleep"
    assert int(seconds) >= 5  # the Service has noticed by then
    assert POD["terminationGracePeriodSeconds"] > int(seconds) + graceful


def test_memory_is_bounded_and_the_processor_is_not():
    assert set(RELAY["resources"]["requests"]) == {"cpu", "memory"}
    assert set(RELAY["resources"]["limits"]) == {"memory"}


def test_relays_share_no_file_for_dead_letters():
    assert "volumes" not in POD
    assert "DEAD_LETTER_FILE" not in [one["name"] for one in RELAY["env"]]


# The image --------------------------------------------------------------------------------------


def test_what_the_image_admits_is_enough_to_start(tmp_path):
    for pattern in ADMITTED:
        for path in ROOT.glob(pattern):
            copy, to = (shutil.copytree, tmp_path / path.name) if path.is_dir() else (shutil.copy, tmp_path)
            copy(path, to)
    started = subprocess.run(
        [Path(sys.executable).parent / "gunicorn", "--check-config", "app:create_app()"],
        cwd=tmp_path,
        env={"DRY_RUN": "1"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert started.returncode == 0, started.stderr
    for command in ("check", "sample", "replay", "translate"):
        subprocess.run([sys.executable, "-m", "ops", command, "--help"], cwd=tmp_path, timeout=60, check=True)


def test_the_image_admits_nothing_that_need_not_be_there():
    assert (ROOT / ".dockerignore").read_text().split("\n")[1] == "*"
    assert not {"tests", "proof", "bench", "docs", ".git", "relay.env"} & set(ADMITTED)


def test_the_base_image_is_in_a_line_that_dependabot_reads():
    stages = re.findall(r"^FROM (\S+)(?: AS (\w+))?$", DOCKERFILE, re.MULTILINE)
    assert re.fullmatch(r"python:3\.\d+-slim(@sha256:[0-9a-f]{64})?", stages[0][0])
    assert stages == [(stages[0][0], "base"), ("${PYTHON_IMAGE:-base}", "build"), ("${PYTHON_IMAGE:-base}", "")]


# Workflows and updates --------------------------------------------------------------------------

WORKFLOWS = {path.name: path.read_text() for path in (ROOT / ".github/workflows").glob("*.yml")}
USES = [line for text in WORKFLOWS.values() for line in re.findall(r"uses: (.+)", text)]
IMAGE = yaml.safe_load(WORKFLOWS["image.yml"])
TEST = yaml.safe_load(WORKFLOWS["test.yml"])
TRIGGERS = IMAGE[True]  # YAML reads "on" as a flag


@pytest.mark.parametrize("action", USES)
def test_an_action_is_pinned_by_its_commit(action):
    assert re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", action)


def test_only_the_push_of_a_tag_may_write():
    rights = {name: job.get("permissions", IMAGE["permissions"]) for name, job in IMAGE["jobs"].items()}
    assert rights == {"try": {"contents": "read"}, "push": {"contents": "read", "packages": "write"}}
    assert IMAGE["permissions"] == {}
    assert TRIGGERS["push"] == {"tags": ["v*"]}
    assert IMAGE["jobs"]["push"]["if"] == "github.event_name == 'push'"
    assert IMAGE["jobs"]["push"]["needs"] == "try"
    assert TEST["permissions"] == {"contents": "read"}


@pytest.mark.parametrize(("tag", "status"), {"v1.2.3": 0, "v1.2.4": 1, "1.2.3": 1, "v1.2": 1, "v1.2.3-1": 1}.items())
def test_a_tag_that_is_not_the_version_fails(tag, status, tmp_path):
    (tmp_path / "config.py").write_text('VERSION = "1.2.3"\n')
    (command,) = [step["run"] for step in IMAGE["jobs"]["try"]["steps"] if "GITHUB_REF_NAME" in step.get("run", "")]
    env = {"GITHUB_REF_NAME": tag, "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin"}
    assert subprocess.run(["/bin/bash", "-e", "-c", command], cwd=tmp_path, env=env, check=False).returncode == status


def test_a_release_is_for_both_processors_with_provenance_and_an_sbom():
    (build,) = [step["with"] for step in IMAGE["jobs"]["push"]["steps"] if "build-push-action" in step.get("uses", "")]
    assert build["platforms"] == "linux/amd64,linux/arm64"
    assert (build["provenance"], build["sbom"]) == ("mode=max", True)


def test_a_pull_request_that_changes_what_is_in_the_image_tries_it():
    ignored = TRIGGERS["pull_request"]["paths-ignore"]
    assert not {pattern.removesuffix("/**") for pattern in ignored} & {*ADMITTED, ".", "**", "proof"}
    assert all(pattern == "**.md" or (ROOT / pattern.removesuffix("/**")).is_dir() for pattern in ignored)


def test_ci_tests_every_python_up_to_that_of_the_image():
    newest = int(re.search(r"^FROM python:3\.(\d+)", DOCKERFILE, re.MULTILINE)[1])
    oldest = int(re.search(r'target-version = "py3(\d+)"', (ROOT / "pyproject.toml").read_text())[1])
    tested = TEST["jobs"]["test"]["strategy"]["matrix"]["python"]
    assert tested == [f"3.{minor}" for minor in range(oldest, newest + 1)]


def test_dependabot_updates_packages_image_and_actions_weekly_and_together():
    updates = yaml.safe_load((ROOT / ".github/dependabot.yml").read_text())["updates"]
    assert {one["package-ecosystem"] for one in updates} == {"pip", "docker", "github-actions"}
    assert {one["schedule"]["interval"] for one in updates} == {"weekly"}
    assert all(group["patterns"] == ["*"] for one in updates for group in one["groups"].values())


@pytest.mark.parametrize("name", ["requirements", "requirements-dev"])
def test_dependabot_finds_the_options_of_make_lock_in_the_header(name):
    lock = re.search(rf"^\t\S+/pip-compile -q (.+) \$\(UPGRADE\) {name}\.in$", (ROOT / "Makefile").read_text(), re.M)[1]
    header = re.search(rf"^#    pip-compile (.+) {name}\.in$", (ROOT / f"{name}.txt").read_text(), re.MULTILINE)[1]
    assert sorted(header.split()) == sorted(lock.split())


def test_dependabot_compiles_what_the_relay_runs_on_first():
    named = re.findall(r"^-.+", (ROOT / "requirements-dev.in").read_text(), re.MULTILINE)
    assert named == ["-r requirements.txt"]
