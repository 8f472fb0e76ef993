"""The settings, declared once each, and read from the environment into a frozen Config. Pure."""

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from relay import proxies
from translate import ADDRESSES, CUSTOMERIO, NAMES, PREFIX, namespace

VERSION = "1.0.0"

SEGMENT_HOST = "https://api.segment.io"
EU_HOST = "https://events.eu1.segmentapis.com"

# Where the two keys are found.
KEY_PAGE = "Segment: Connections > Sources > your source > Settings > API Keys"
WEBHOOK_PAGE = "Customer.io: Integrations > Reporting Webhooks > your webhook"

LOOPBACK = ("localhost", "127.0.0.1", "::1")
KEYS = ("SEGMENT_WRITE_KEY", "CUSTOMERIO_SIGNING_KEY")

# Placeholders in examples.
PLACEHOLDER = re.compile(
    r".*(\.{3}|…).*|<.*>|\[.*\]|\{.*\}|\$.*|x{3,}|\*{3,}|your.*|(paste|enter|insert)[-_ ].*|(change|replace)[-_ ]?me|"
    r"placeholder|todo|example|none|null|undefined|my[-_ ]write[-_ ]key|"
    r"(segment[-_ ]?|customerio[-_ ]?)?(write|signing)[-_ ]?key",
    re.IGNORECASE,
)
# Placeholders in our own documents, to deploy before Customer.io shows the key. Anybody can read them, so none is
# ever a key. Letters and digits alone, since people also write "Unknown yet".
NO_KEY_YET = ("unknownyet", "unknown")
QUOTES = "\"'`“”‘’„«»"

# What DNS and the client take. The client appends /v1/batch, so "https://api.segment.io/v1" would be a wrong
# address. A user or password would replace the write key in the Authorization header.
LABEL = "[A-Za-z0-9_]([A-Za-z0-9_-]*[A-Za-z0-9_])?"
ORIGIN = re.compile(rf"https?://({LABEL}(\.{LABEL})*\.?|\[[0-9A-Fa-f:.]+\])(:[0-9]*)?/?", re.IGNORECASE | re.ASCII)
PROPERTY = re.compile(r"[\w$-]+(\.[\w$-]+)*")

WRITE_KEY = re.compile(r"[A-Za-z0-9]{32}")  # a new one; old ones are shorter

FLAGS = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}


NOT_SET_UP = (
    f"CUSTOMERIO_SIGNING_KEY has a word in place of the key: no webhook is accepted until it is set. In {WEBHOOK_PAGE}."
)
DRY_RUN_ON = "DRY_RUN is on: nothing is sent to Segment, and the events are not kept."


class ConfigError(Exception):
    """The relay cannot start; `problems` says why, a sentence each, none with a secret in it; `listed` lists them."""

    def __init__(self, problems: list[str]):
        self.problems = problems
        self.listed = "".join(f"\n  - {problem}" for problem in problems)
        super().__init__(f"The relay cannot start:{self.listed}")


class Invalid(ValueError):
    """A value that a setting can't have. `str()` follows its name in the problem, and quotes no secret."""


# The kinds of settings: each turns a text into a value, or raises Invalid.


def write_key(text: str) -> str:
    if _is_no_key_yet(text):
        return ""
    where = "Copy it again from Segment: your source > Settings > API Keys."
    if wrong := _wrong_key(text):
        raise Invalid(f"{wrong}. {where}")
    if not re.fullmatch(r"[!-~]{6,51}", text):
        raise Invalid("is not a write key: those have 6 to 51 printable characters.")
    return text


def signing_keys(text: str) -> tuple[str, ...]:
    if _is_no_key_yet(text):  # "unknown, yet" too
        return ()
    keys = tuple(key for key in _listed(text) if not _is_no_key_yet(key))
    wrong = next(filter(None, map(_wrong_key, keys)), "has a semicolon in it" if ";" in text else None)
    if wrong:
        raise Invalid(
            f"{wrong}. Copy it again from Customer.io: Reporting Webhooks > your webhook. "
            "Two keys are separated by a comma."
        )
    return keys


def origin(text: str) -> str:
    if not is_origin(text):
        raise Invalid(f"is a URL without a path: {SEGMENT_HOST} or, in the EU, {EU_HOST}.")
    return text.rstrip("/")


def prefix(text: str) -> str:
    unquoted(text.strip())
    if not text.isprintable():
        raise Invalid("has a control character in it, like a line break: set it again.")
    return text if text.strip() else ""


def properties(text: str) -> frozenset[str]:
    if any(character in QUOTES for character in text):
        raise Invalid("has quotes in it: set it to the names alone, like recipient,subject.")
    names = frozenset(_listed(text))
    if not all(map(PROPERTY.fullmatch, names)):
        raise Invalid(
            "is a list of names with commas between them, like recipient,subject. "
            "A name has letters, digits, _ - . and $."
        )
    return names


def flag(text: str) -> bool:
    if text.lower() not in FLAGS:
        raise Invalid("is a flag: 1 or 0, true or false, yes or no.")
    return FLAGS[text.lower()]


def dry_run(text: str) -> bool:
    return text.lower() == "force" or flag(text)


def unquoted(text: str) -> str:
    if text and text[0] in QUOTES and text[-1] in QUOTES:
        raise Invalid("has quotes around its value: set it without them.")
    return text


def number(least: int, most: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        # ASCII digits only: int() alone would also take "1_0" and digits of other scripts.
        if not re.fullmatch(r"[0-9]{1,9}", text) or not least <= int(text) <= most:
            raise Invalid(f"is a whole number from {least} to {most}.")
        return int(text)

    return read


def workers(text: str) -> int:
    if not text.strip():  # gunicorn itself reads it, and fails
        raise Invalid("is set but blank: set it to a number, or unset it.")
    return number(1, 64)(text.strip())


def choice(*choices: str) -> Callable[[str], str]:
    def read(text: str) -> str:
        if text.lower() not in choices:
            raise Invalid(f"is one of {', '.join(choices)}.")
        return text.lower()

    return read


class Setting(NamedTuple):
    """A variable of the environment."""

    name: str
    meaning: str  # in README.md and app.json
    read: Callable[[str], Any]
    default: Any
    argument: str = ""  # of `translate`, if a track call depends on it
    verbatim: bool = False  # blanks count: otherwise a blank value is as good as none


def _setting(
    name: str, meaning: str, read: Callable[[str], Any], default: Any, secret: bool = False, **more: Any
) -> Any:
    # Secrets stay out of repr, and so out of tracebacks and error reports.
    return field(default=default, repr=not secret, metadata={"setting": Setting(name, meaning, read, default, **more)})


@dataclass(frozen=True)
class Config:
    """The operator's settings. `warnings` are sentences to log, none with a secret in it."""

    segment_write_key: str = _setting(
        "SEGMENT_WRITE_KEY",
        "The write key of your Segment source. Segment answers 200 to wrong keys, so the relay warns if it does not "
        "look like one.",
        read=write_key,
        default="",
        secret=True,
        argument="namespace",
    )
    signing_keys: tuple[str, ...] = _setting(
        "CUSTOMERIO_SIGNING_KEY",
        "The signing key of your webhook. To rotate it, set `<new key>,<old key>`, and later `<new key>`.",
        read=signing_keys,
        default=(),
        secret=True,
    )
    segment_host: str = _setting("SEGMENT_HOST", f"In the EU: `{EU_HOST}`. A URL without a path.", origin, SEGMENT_HOST)
    event_names: str = _setting(
        "EVENT_NAMES",
        "`customerio` for names like `email_clicked`, or `segment` for names like `Email Link Clicked`. "
        "Properties are the same.",
        read=choice(*NAMES),
        default=CUSTOMERIO,
        argument="names",
    )
    event_prefix: str = _setting(
        "EVENT_PREFIX",
        "Goes before the name of every event. With `EVENT_NAMES=segment` there is none by default.",
        read=prefix,
        default=PREFIX,
        argument="prefix",
        verbatim=True,  # it may end in a blank, and an empty one means none
    )
    omit_properties: frozenset[str] = _setting(
        "OMIT_PROPERTIES",
        "Properties to leave out, separated by commas: names in `data`, or `recipients.device_id` for what is in an "
        "object or in each object of a list. The relay does not use them to identify the person either.",
        read=properties,
        default=frozenset(),
        argument="omit",
    )
    echo_to_customerio: bool = _setting(
        "ECHO_TO_CUSTOMERIO",
        "`1` lets Segment send the events on to Customer.io destinations.",
        read=flag,
        default=False,
        argument="echo",
    )
    dead_letter_file: str | None = _setting(
        "DEAD_LETTER_FILE", "The file to append dead letters to. Without it they go to the log.", unquoted, None
    )
    allow_unsigned: bool = _setting(
        "ALLOW_UNSIGNED", "`1` runs without a signing key. Anybody can then send events.", flag, False
    )
    dry_run: bool = _setting(
        "DRY_RUN",
        "`1` does everything but the upload, prints the track calls, and shows webhooks on the page. Needs no keys. "
        "With both keys it is refused, because the events would be gone; `force` overrides this.",
        read=dry_run,
        default=False,
    )
    port: int = _setting("PORT", "The port to listen on. Heroku sets it.", number(1, 65535), 8080)
    workers: int = _setting(
        "WEB_CONCURRENCY",
        "The number of worker processes: one for each processor. Heroku sets it.",
        read=workers,
        default=2,
        verbatim=True,
    )
    log_level: str = _setting(
        "LOG_LEVEL",
        "`debug`, `info`, `warning`, `error` or `critical`.",
        read=choice("debug", "info", "warning", "error", "critical"),
        default="info",
    )
    log_format: str = _setting(
        "LOG_FORMAT", "`text`, or `json` for one JSON object a line.", choice("text", "json"), "text"
    )
    proxy: str | None = field(default=None, repr=False)  # there may be a password in it
    ca_bundle: str | None = None  # a file or a folder
    not_set_up: bool = False  # deployed before there was a signing key: no webhook is accepted
    warnings: tuple[str, ...] = ()

    @property
    def signatures(self) -> str:
        """What becomes of signatures, in words."""
        if self.not_set_up:
            return "not set up: no webhook is accepted"
        return "checked" if self.signing_keys else "not checked"

    def mapping(self) -> dict[str, Any]:
        """Return the arguments of `translate` that are settings."""
        arguments = {setting.argument: getattr(self, name) for name, setting in SETTINGS.items() if setting.argument}
        return arguments | {"namespace": namespace(self.segment_write_key)}

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
        values, invalid = _values(env)
        config = cls(**values)
        problems = _missing(config, env, needs) + invalid
        if config.dry_run and config.segment_write_key and config.signing_keys and not _is_forced(env):
            problems.append(
                "DRY_RUN is on while both keys are set: webhooks would be answered with 200, and their events be gone. "
                "Unset DRY_RUN to deliver them, or set DRY_RUN=force."
            )
        compared = _compare_keys(env.get("SEGMENT_WRITE_KEY", "").strip(), config.signing_keys)
        if problems:
            problems += compared  # warnings aren't seen where there are problems
        if config.dead_letter_file and (why := file_problem(config.dead_letter_file)):
            problems.append(f"DEAD_LETTER_FILE cannot be appended to: {why}.")
        if not config.dry_run:
            values["proxy"], proxy_problems = _proxy(config.segment_host, env)
            values["ca_bundle"], bundle_problems = _ca_bundle(config.segment_host, env, bundle_problem)
            problems += proxy_problems + bundle_problems
        if problems:
            raise ConfigError(problems)
        # A dry run needs no key. ALLOW_UNSIGNED changes nothing here: it doesn't where there is a key, either.
        words = _words_for_keys(env)
        not_set_up = bool(words) and not config.signing_keys and not config.dry_run
        warnings = [*_warnings(config, words, not_set_up), *compared]
        return cls(**values, not_set_up=not_set_up, warnings=tuple(warnings))


SETTINGS: dict[str, Setting] = {
    each.name: each.metadata["setting"] for each in fields(Config) if "setting" in each.metadata
}
MAPPING = tuple(setting.name for setting in SETTINGS.values() if setting.argument)  # a track call depends on them


def is_origin(url: str) -> bool:
    """Return whether `url` has a scheme and a host, perhaps a port, and nothing else."""
    try:
        return bool(ORIGIN.fullmatch(url)) and bool(urlsplit(url).hostname) and urlsplit(url).port != 0
    except ValueError:  # a port that is too high, half of an IPv6 address
        return False


def in_clear_text(url: str) -> bool:
    """Return whether others can read what goes to `url`."""
    return is_origin(url) and urlsplit(url).scheme == "http" and urlsplit(url).hostname not in LOOPBACK


def _values(env: Mapping[str, str]) -> tuple[dict[str, Any], list[str]]:
    """Return the values of the settings that are set, by their names in Config, and what is wrong with the others."""
    values: dict[str, Any] = {}
    problems: list[str] = []
    for name, setting in SETTINGS.items():
        text = env.get(setting.name, "")
        if (setting.verbatim and setting.name in env) or text.strip():
            try:
                values[name] = setting.read(text if setting.verbatim else text.strip())
            except Invalid as error:
                problems.append(f"{setting.name} {error}")
    if values.get("event_names", CUSTOMERIO) != CUSTOMERIO:
        values.setdefault("event_prefix", "")
    return values, problems


def _proxy(host: str, env: Mapping[str, str]) -> tuple[str | None, list[str]]:
    """Return the address of the proxy that leads to `host`, if there is one, and what is wrong with it."""
    if not (name := proxies.variable_for(host, env)):
        return None, []
    try:
        proxies.parse(env[name])
    except ValueError:
        problem = (
            f"{name} is not an http:// address, like http://proxy.example.com:3128. The relay can't use "
            "https:// and SOCKS proxies. NO_PROXY names what is reached without one."
        )
        return None, [problem]
    return env[name], []


def _ca_bundle(host: str, env: Mapping[str, str], problem: Callable[[str], str | None]) -> tuple[str | None, list[str]]:
    """Return the file or folder of certificates to trust, if one is set, and what is wrong with it."""
    name = "REQUESTS_CA_BUNDLE" if env.get("REQUESTS_CA_BUNDLE", "").strip() else "CURL_CA_BUNDLE"
    path = env.get(name, "").strip() or None
    if path and host.lower().startswith("https:") and (why := problem(path)):
        return path, [f"{name} has no certificates to trust: {why}."]
    return path, []


def _missing(config: Config, env: Mapping[str, str], needs: Collection[str]) -> list[str]:
    """Return a problem for each key that must be set and isn't. An invalid one has its problem already."""
    missing: list[str] = []
    if config.dry_run:
        return missing
    key = env.get("SEGMENT_WRITE_KEY", "").strip()
    if "SEGMENT_WRITE_KEY" in needs and (not key or _is_no_key_yet(key)):
        missing.append(f"SEGMENT_WRITE_KEY is not set. In {KEY_PAGE}.")
    unsigned = not list(_listed(env.get("CUSTOMERIO_SIGNING_KEY", "")))
    if "CUSTOMERIO_SIGNING_KEY" in needs and unsigned and not config.allow_unsigned:
        missing.append(
            f"CUSTOMERIO_SIGNING_KEY is not set. In {WEBHOOK_PAGE}. "
            "(ALLOW_UNSIGNED=1 runs without one, and takes events from anyone.)"
        )
    return missing


def _warnings(config: Config, words: list[str], not_set_up: bool) -> list[str]:
    """Return the sentences to log. `words` are those in place of a signing key."""
    warnings = []
    if config.segment_write_key and not WRITE_KEY.fullmatch(config.segment_write_key):
        warnings.append(
            "SEGMENT_WRITE_KEY does not look like a write key (32 letters and digits). "
            "Segment answers 200 to wrong keys and drops the events."
        )
    left = [
        address
        for address in ADDRESSES
        if not any(f"{address}.".startswith(f"{name}.") for name in config.omit_properties)
    ]
    if left and len(left) < len(ADDRESSES):
        warnings.append(
            f"OMIT_PROPERTIES leaves the person's address in {', '.join(left)}: "
            "add that too, to keep it out of Segment."
        )
    if config.dry_run:
        warnings.append(DRY_RUN_ON)
    if words and config.signing_keys:
        warnings.append("CUSTOMERIO_SIGNING_KEY has a word in place of a key beside other keys: only those count.")
    if not_set_up:
        warnings.append(NOT_SET_UP)
    elif config.allow_unsigned and config.signing_keys:
        warnings.append("ALLOW_UNSIGNED has no effect: CUSTOMERIO_SIGNING_KEY is set, so signatures are checked.")
    elif config.allow_unsigned:
        warnings.append("ALLOW_UNSIGNED is on: anyone who finds the address can send events to Segment.")
    if in_clear_text(config.segment_host):
        warnings.append("SEGMENT_HOST is not https: the write key and every event are sent in clear text.")
    return warnings


def _compare_keys(write_key: str, keys: Collection[str]) -> list[str]:
    """Ask whether the two were swapped: both are long and random, and Segment answers 200 to any key."""
    if write_key and write_key in keys:
        return ["SEGMENT_WRITE_KEY and CUSTOMERIO_SIGNING_KEY are the same: one of them is wrong."]
    if write_key and _likeness(write_key) < max(map(_likeness, keys), default=0):
        return ["CUSTOMERIO_SIGNING_KEY looks more like a write key than SEGMENT_WRITE_KEY does: did you swap them?"]
    return []


def _likeness(key: str) -> int:
    """Return how much a key looks like a write key. Hexadecimal digits alone may be a signature's key, too."""
    if not WRITE_KEY.fullmatch(key):
        return 0
    return 1 if re.fullmatch("[0-9a-f]*|[0-9A-F]*", key) else 2


def _words_for_keys(env: Mapping[str, str]) -> list[str]:
    """Return the placeholders among the signing keys."""
    text = env.get("CUSTOMERIO_SIGNING_KEY", "")
    return [text] if _is_no_key_yet(text) else [key for key in _listed(text) if _is_no_key_yet(key)]


def _is_no_key_yet(key: str) -> bool:
    return "".join(filter(str.isalnum, key)).lower() in NO_KEY_YET


def _is_forced(env: Mapping[str, str]) -> bool:
    return env["DRY_RUN"].strip().lower() == "force"


def _listed(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _wrong_key(key: str) -> str | None:
    """Return what is wrong with a key, Segment's or Customer.io's, or None."""
    if any(character in QUOTES for character in key):
        return "has quotes in it"
    if PLACEHOLDER.fullmatch(key):
        return "is still the placeholder of an example"
    if not key.isprintable() or " " in key:
        return "has a blank or a control character in it"
    return None
