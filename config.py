"""Read the environment once, into a frozen Config, or report every problem at once."""

import re
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import proxies
from translate import namespace

VERSION = "1.0.0"

SEGMENT_HOST = "https://api.segment.io"
EU_HOST = "https://events.eu1.segmentapis.com"
EVENT_PREFIX = "customerio:"

LOG_LEVELS = ("debug", "info", "warning", "error", "critical")
LOOPBACK = ("localhost", "127.0.0.1", "::1")
LOG_FORMATS = ("text", "json")
KEYS = ("SEGMENT_WRITE_KEY", "CUSTOMERIO_SIGNING_KEY")

# What stands in an example in the place of a value.
PLACEHOLDER = re.compile(
    r".*(\.{3}|…).*|<.*>|\[.*\]|\{.*\}|\$.*|x{3,}|\*{3,}|your.*|(paste|enter|insert)[-_ ].*|(change|replace)[-_ ]?me|"
    r"placeholder|todo|example|none|null|undefined|my[-_ ]write[-_ ]key|"
    r"(segment[-_ ]?|customerio[-_ ]?)?(write|signing)[-_ ]?key",
    re.IGNORECASE,
)
QUOTES = "\"'`“”‘’„«»"

# What DNS and the client take. The client appends /v1/batch, so "https://api.segment.io/v1" would be a wrong
# address. A user or password would replace the write key in the Authorization header.
LABEL = "[A-Za-z0-9_]([A-Za-z0-9_-]*[A-Za-z0-9_])?"
HOST = re.compile(rf"https?://({LABEL}(\.{LABEL})*\.?|\[[0-9A-Fa-f:.]+\])(:[0-9]*)?/?", re.IGNORECASE | re.ASCII)
PROPERTY = re.compile(r"[\w$-]+(\.[\w$-]+)*")

FLAGS = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}


class ConfigError(Exception):
    """The relay cannot start; `problems` says why, a sentence each, none with a secret in it."""

    def __init__(self, problems: list[str]):
        self.problems = problems
        super().__init__("The relay cannot start:\n  - " + "\n  - ".join(problems))


@dataclass(frozen=True)
class Config:
    """The operator's settings. `warnings` are sentences to log, none with a secret in it."""

    # Secrets stay out of repr, and so out of tracebacks and error reports.
    segment_write_key: str = field(repr=False)
    signing_keys: tuple[str, ...] = field(repr=False)
    segment_host: str = SEGMENT_HOST
    event_prefix: str = EVENT_PREFIX
    omit_properties: frozenset[str] = frozenset()
    echo_to_customerio: bool = False
    proxy: str | None = field(default=None, repr=False)  # there may be a password in it
    ca_bundle: str | None = None  # a file or a folder
    dead_letter_file: str | None = None
    dry_run: bool = False
    port: int = 8080
    workers: int = 2
    log_level: str = "info"
    log_format: str = "text"
    warnings: tuple[str, ...] = ()

    def mapping(self) -> dict[str, Any]:
        """Return the arguments of `translate` that are settings."""
        return {
            "namespace": namespace(self.segment_write_key),
            "prefix": self.event_prefix,
            "omit": self.omit_properties,
            "echo": self.echo_to_customerio,
        }

    @classmethod
    def from_env(
        cls,
        env: Mapping[str, str],
        file_problem: Callable[[str], str | None] = lambda path: None,
        needs: Collection[str] = KEYS,
        bundle_problem: Callable[[str], str | None] = lambda path: None,
    ) -> "Config":
        """Build a Config from the variables in `env`, or raise one ConfigError that lists every problem.

        A variable that is set but blank counts as not set. `file_problem` says what keeps a file
        from being appended to, or None; it is asked about DEAD_LETTER_FILE. `needs` names the keys
        that must be there, unless DRY_RUN is on. `bundle_problem` says what keeps certificates from
        being loaded, or None; it is asked about REQUESTS_CA_BUNDLE.
        """
        read = _Reader(env)
        write_key = read.write_key("SEGMENT_WRITE_KEY")
        signing_keys = read.signing_keys("CUSTOMERIO_SIGNING_KEY")
        dry_run = read.dry_run("DRY_RUN", bool(write_key and signing_keys))
        allow_unsigned = read.flag("ALLOW_UNSIGNED")
        if dry_run:
            needs = ()
        if "SEGMENT_WRITE_KEY" in needs and not read.text("SEGMENT_WRITE_KEY"):
            read.problems.append(
                "SEGMENT_WRITE_KEY is not set. In Segment: Connections > Sources > your source > Settings > API Keys."
            )
        if signing_keys and allow_unsigned:
            read.warnings.append(
                "ALLOW_UNSIGNED has no effect: CUSTOMERIO_SIGNING_KEY is set, so signatures are checked."
            )
        elif allow_unsigned:
            read.warnings.append("ALLOW_UNSIGNED is on: anyone who finds the address can send events to Segment.")
        elif "CUSTOMERIO_SIGNING_KEY" in needs and not read.names("CUSTOMERIO_SIGNING_KEY"):
            read.problems.append(
                "CUSTOMERIO_SIGNING_KEY is not set. In Customer.io: Integrations > Reporting Webhooks > your webhook. "
                "(ALLOW_UNSIGNED=1 runs without one, and takes events from anyone.)"
            )

        dead_letter_file = read.unquoted("DEAD_LETTER_FILE") or None
        if dead_letter_file and (why := file_problem(dead_letter_file)):
            read.problems.append(f"DEAD_LETTER_FILE cannot be appended to: {why}.")

        host = read.host("SEGMENT_HOST")
        config = cls(
            segment_write_key=write_key,
            signing_keys=signing_keys,
            segment_host=host,
            proxy=None if dry_run else read.proxy(host),
            ca_bundle=None if dry_run else read.ca_bundle(host, bundle_problem),
            event_prefix=read.prefix("EVENT_PREFIX"),
            omit_properties=read.omitted("OMIT_PROPERTIES"),
            echo_to_customerio=read.flag("ECHO_TO_CUSTOMERIO"),
            dead_letter_file=dead_letter_file,
            dry_run=dry_run,
            port=read.number("PORT", 8080, 1, 65535),
            workers=read.workers("WEB_CONCURRENCY"),
            log_level=read.choice("LOG_LEVEL", "info", LOG_LEVELS),
            log_format=read.choice("LOG_FORMAT", "text", LOG_FORMATS),
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

    def unquoted(self, name: str) -> str:
        value = self.text(name)
        if value and value[0] in QUOTES and value[-1] in QUOTES:
            self.problems.append(f"{name} has quotes around its value: set it without them.")
        return value

    def names(self, name: str) -> tuple[str, ...]:
        return tuple(part.strip() for part in self.text(name).split(",") if part.strip())

    def omitted(self, name: str) -> frozenset[str]:
        names = self.names(name)
        if any(character in QUOTES for character in self.text(name)):
            self.problems.append(f"{name} has quotes in it: set it to the names alone, like recipient,subject.")
        elif not all(map(PROPERTY.fullmatch, names)):
            self.problems.append(
                f"{name} is a list of names with commas between them, like recipient,subject. "
                "A name has letters, digits, _ - . and $."
            )
        return frozenset(names)

    def prefix(self, name: str) -> str:
        # Not stripped: a prefix may end in a space, and an empty one means none.
        value = self._env.get(name, EVENT_PREFIX)
        self.unquoted(name)
        if not value.isprintable():
            self.problems.append(f"{name} has a control character in it, like a line break: set it again.")
        return value

    def write_key(self, name: str) -> str:
        key = self.text(name)
        if not key:
            return ""
        if wrong := _wrong_key(key):
            self.problems.append(f"{name} {wrong}. Copy it again from Segment: your source > Settings > API Keys.")
        elif not re.fullmatch(r"[!-~]{6,51}", key):
            self.problems.append(f"{name} is not a write key: those have 6 to 51 printable characters.")
        elif not re.fullmatch(r"[A-Za-z0-9]{32}", key):
            self.warnings.append(
                f"{name} does not look like a write key (32 letters and digits). "
                "Segment answers 200 to wrong keys and drops the events."
            )
        return key

    def signing_keys(self, name: str) -> tuple[str, ...]:
        keys = self.names(name)
        wrong = next(filter(None, map(_wrong_key, keys)), "has a semicolon in it" if ";" in self.text(name) else None)
        if wrong:
            self.problems.append(
                f"{name} {wrong}. Copy it again from Customer.io: Reporting Webhooks > your webhook. "
                "Two keys are separated by a comma."
            )
        return keys

    def dry_run(self, name: str, both_keys: bool) -> bool:
        forced = self.text(name).lower() == "force"
        on = forced or self.flag(name)
        if on and both_keys and not forced:
            self.problems.append(
                f"{name} is on while both keys are set: webhooks would be answered with 200, and their events be gone. "
                f"Unset {name} to deliver them, or set {name}=force."
            )
        if on:
            self.warnings.append(f"{name} is on: nothing is sent to Segment, and the events are not kept.")
        return on

    def workers(self, name: str) -> int:
        if name in self._env and not self.text(name):  # gunicorn itself reads it, and fails
            self.problems.append(f"{name} is set but blank: set it to a number, or unset it.")
        return self.number(name, 2, 1, 64)

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
            sound = bool(HOST.fullmatch(value)) and url.port != 0
        except ValueError:  # a port that is too high, half of an IPv6 address
            sound = False
        if not sound:
            self.problems.append(f"{name} is a URL without a path: {SEGMENT_HOST} or, in the EU, {EU_HOST}.")
        elif url.scheme == "http" and url.hostname not in LOOPBACK:
            self.warnings.append(f"{name} is not https: the write key and every event are sent in clear text.")
        return value.rstrip("/")

    def proxy(self, host: str) -> str | None:
        with suppress(ValueError):  # `host` is no address, which is said already
            if not (name := proxies.variable_for(host, self._env)):
                return None
            try:
                proxies.parse(self._env[name])
            except ValueError:
                self.problems.append(
                    f"{name} is not an http:// address, like http://proxy.example.com:3128. The relay can't use "
                    "https:// and SOCKS proxies. NO_PROXY names what is reached without one."
                )
            return self._env[name]
        return None

    def ca_bundle(self, host: str, problem: Callable[[str], str | None]) -> str | None:
        name = "REQUESTS_CA_BUNDLE" if self.text("REQUESTS_CA_BUNDLE") else "CURL_CA_BUNDLE"
        path = self.text(name) or None
        if path and host.lower().startswith("https:") and (why := problem(path)):
            self.problems.append(f"{name} has no certificates to trust: {why}.")
        return path


def _wrong_key(key: str) -> str | None:
    """Return what is wrong with a key whoever issued it, or None."""
    if any(character in QUOTES for character in key):
        return "has quotes in it"
    if PLACEHOLDER.fullmatch(key):
        return "is still the placeholder of an example"
    if not key.isprintable() or " " in key:
        return "has a blank or a control character in it"
    return None
