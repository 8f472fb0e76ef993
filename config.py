"""The environment, read once: a frozen Config, or every problem at once."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from translate import namespace

SEGMENT_HOST = "https://api.segment.io"
EVENT_PREFIX = "customerio:"

LOG_LEVELS = ("debug", "info", "warning", "error", "critical")
LOOPBACK = ("localhost", "127.0.0.1", "::1")
FLAGS = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}


class ConfigError(Exception):
    """The relay cannot start; `problems` says why, a sentence each, none with a secret in it."""

    def __init__(self, problems: list[str]):
        self.problems = problems
        super().__init__("The relay cannot start:\n  - " + "\n  - ".join(problems))


@dataclass(frozen=True)
class Config:
    """What the operator decided. `warnings` are sentences to log, none with a secret in it."""

    # Secrets stay out of repr, and so out of tracebacks and error reports.
    segment_write_key: str = field(repr=False)
    signing_keys: tuple[str, ...] = field(repr=False)
    segment_host: str = SEGMENT_HOST
    event_prefix: str = EVENT_PREFIX
    omit_properties: frozenset[str] = frozenset()
    echo_to_customerio: bool = False
    dead_letter_file: str | None = None
    dry_run: bool = False
    port: int = 8080
    workers: int = 2
    log_level: str = "info"
    warnings: tuple[str, ...] = ()

    def mapping(self) -> dict[str, Any]:
        """Return the arguments of `translate` that the operator decided."""
        return {
            "namespace": namespace(self.segment_write_key),
            "prefix": self.event_prefix,
            "omit": self.omit_properties,
            "echo": self.echo_to_customerio,
        }

    @classmethod
    def from_env(
        cls, env: Mapping[str, str], file_problem: Callable[[str], str | None] = lambda path: None
    ) -> "Config":
        """Build a Config from the variables in `env`, or raise one ConfigError that lists every problem.

        A variable that is set but blank counts as not set. `file_problem` says what keeps
        a file from being appended to, or None; it is asked about DEAD_LETTER_FILE.
        """
        read = _Reader(env)
        dry_run = read.flag("DRY_RUN")
        write_key = read.text("SEGMENT_WRITE_KEY")
        if not write_key and not dry_run:
            read.problems.append(
                "SEGMENT_WRITE_KEY is not set. In Segment: Connections > Sources > your source > Settings > API Keys."
            )
        elif write_key and not re.fullmatch(r"[A-Za-z0-9]{32}", write_key):
            read.warnings.append(
                "SEGMENT_WRITE_KEY does not look like a write key (32 letters and digits). "
                "Segment answers 200 to wrong keys and drops the events."
            )

        signing_keys = read.names("CUSTOMERIO_SIGNING_KEY")
        allow_unsigned = read.flag("ALLOW_UNSIGNED")
        if signing_keys and allow_unsigned:
            read.warnings.append(
                "ALLOW_UNSIGNED has no effect: CUSTOMERIO_SIGNING_KEY is set, so signatures are checked."
            )
        elif allow_unsigned:
            read.warnings.append("ALLOW_UNSIGNED is on: anybody who finds the address can send events to Segment.")
        elif not signing_keys and not dry_run:
            read.problems.append(
                "CUSTOMERIO_SIGNING_KEY is not set. In Customer.io: Integrations > Reporting Webhooks > your webhook. "
                "(ALLOW_UNSIGNED=1 goes without, and takes events from anybody.)"
            )

        dead_letter_file = read.text("DEAD_LETTER_FILE") or None
        if dead_letter_file and (why := file_problem(dead_letter_file)):
            read.problems.append(f"DEAD_LETTER_FILE cannot be appended to: {why}.")

        config = cls(
            segment_write_key=write_key,
            signing_keys=signing_keys,
            segment_host=read.host("SEGMENT_HOST"),
            # Not stripped: a prefix may end in a space, and an empty one means none.
            event_prefix=env.get("EVENT_PREFIX", EVENT_PREFIX),
            omit_properties=frozenset(read.names("OMIT_PROPERTIES")),
            echo_to_customerio=read.flag("ECHO_TO_CUSTOMERIO"),
            dead_letter_file=dead_letter_file,
            dry_run=dry_run,
            port=read.number("PORT", 8080, 1, 65535),
            workers=read.number("WEB_CONCURRENCY", 2, 1, 64),
            log_level=read.choice("LOG_LEVEL", "info", LOG_LEVELS),
            warnings=tuple(read.warnings),
        )
        if read.problems:
            raise ConfigError(read.problems)
        return config


class _Reader:
    """Reads variables one by one and collects what is wrong with them."""

    def __init__(self, env: Mapping[str, str]):
        self._env = env
        self.problems: list[str] = []
        self.warnings: list[str] = []

    def text(self, name: str) -> str:
        return self._env.get(name, "").strip()

    def names(self, name: str) -> tuple[str, ...]:
        return tuple(part.strip() for part in self.text(name).split(",") if part.strip())

    def flag(self, name: str) -> bool:
        value = self.text(name).lower()
        if value and value not in FLAGS:
            self.problems.append(f"{name} is a flag: 1 or 0, true or false, yes or no.")
        return FLAGS.get(value, False)

    def number(self, name: str, default: int, least: int, most: int) -> int:
        value = self.text(name)
        if not value:
            return default
        # ASCII digits only: int() alone would also take "1_0" and digits of other scripts.
        if not re.fullmatch(r"[0-9]{1,9}", value) or not least <= int(value) <= most:
            self.problems.append(f"{name} is a whole number from {least} to {most}.")
            return default
        return int(value)

    def choice(self, name: str, default: str, choices: tuple[str, ...]) -> str:
        value = self.text(name).lower() or default
        if value not in choices:
            self.problems.append(f"{name} is one of {', '.join(choices)}.")
        return value

    def host(self, name: str) -> str:
        value = self.text(name) or SEGMENT_HOST
        try:
            url = urlsplit(value)
            sound = url.scheme in ("http", "https") and bool(url.hostname) and url.port != 0
            # The client appends /v1/batch, so "https://api.segment.io/v1" would be a wrong address.
            # A user or password in it would replace the write key in the Authorization header.
            sound = sound and url.path in ("", "/") and not (url.query or url.fragment or "@" in url.netloc)
            sound = sound and not re.search(r"[\s\\]", value)
        except ValueError:  # a port that is not a number, half of an IPv6 address
            sound = False
        if not sound:
            self.problems.append(
                f"{name} is a URL without a path: {SEGMENT_HOST} or, in the EU, https://events.eu1.segmentapis.com."
            )
        elif url.scheme == "http" and url.hostname not in LOOPBACK:
            self.warnings.append(f"{name} is not https: the write key and every event travel readably.")
        return value.rstrip("/")
