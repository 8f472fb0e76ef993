"""config.py: what the environment may contain, and the message when it is invalid."""

import re

import pytest
from conftest import ROOT

from config import Config, ConfigError
from relay.segment import SegmentClient

KEY = "0123456789abcdefghijklmnopqrstuv"
GOOD = {"SEGMENT_WRITE_KEY": KEY, "CUSTOMERIO_SIGNING_KEY": "s3cret"}


def read(**env):
    return Config.from_env(GOOD | env)


def problems(env):
    with pytest.raises(ConfigError) as error:
        Config.from_env(env)
    return error.value.problems


def test_two_settings_are_enough():
    assert read() == Config(segment_write_key=KEY, signing_keys=("s3cret",))
    assert read().segment_host == "https://api.segment.io"
    assert read().event_prefix == "customerio:"
    assert (read().port, read().workers, read().log_level) == (8080, 2, "info")
    assert read().warnings == ()


READ = {
    "spaces around": ({"SEGMENT_WRITE_KEY": f" {KEY}\n"}, "segment_write_key", KEY),
    "two signing keys": ({"CUSTOMERIO_SIGNING_KEY": "a, b,"}, "signing_keys", ("a", "b")),
    "the EU": (
        {"SEGMENT_HOST": "https://events.eu1.segmentapis.com"},
        "segment_host",
        "https://events.eu1.segmentapis.com",
    ),
    "a slash at the end": ({"SEGMENT_HOST": "https://api.segment.io/"}, "segment_host", "https://api.segment.io"),
    "a port": ({"SEGMENT_HOST": "http://127.0.0.1:9000"}, "segment_host", "http://127.0.0.1:9000"),
    "IPv6": ({"SEGMENT_HOST": "http://[::1]:9000"}, "segment_host", "http://[::1]:9000"),
    "an empty host": ({"SEGMENT_HOST": ""}, "segment_host", "https://api.segment.io"),
    "a prefix with a space": ({"EVENT_PREFIX": "Customer.io "}, "event_prefix", "Customer.io "),
    "no prefix": ({"EVENT_PREFIX": ""}, "event_prefix", ""),
    "a blank prefix": ({"EVENT_PREFIX": " "}, "event_prefix", ""),
    "Customer.io's names": ({"EVENT_NAMES": "customerio"}, "event_names", "customerio"),
    "their prefix": ({"EVENT_NAMES": "customerio"}, "event_prefix", "customerio:"),
    "blank names": ({"EVENT_NAMES": " "}, "event_names", "customerio"),
    "Segment's names": ({"EVENT_NAMES": " Segment\n"}, "event_names", "segment"),
    "they have no prefix": ({"EVENT_NAMES": "SEGMENT"}, "event_prefix", ""),
    "but for one that is set": ({"EVENT_NAMES": "segment", "EVENT_PREFIX": "CIO "}, "event_prefix", "CIO "),
    "even the usual one": ({"EVENT_NAMES": "segment", "EVENT_PREFIX": "customerio:"}, "event_prefix", "customerio:"),
    "or an empty one": ({"EVENT_NAMES": "segment", "EVENT_PREFIX": ""}, "event_prefix", ""),
    "properties to omit": ({"OMIT_PROPERTIES": "recipient, subject"}, "omit_properties", {"recipient", "subject"}),
    "echo": ({"ECHO_TO_CUSTOMERIO": "1"}, "echo_to_customerio", True),
    "true": ({"ECHO_TO_CUSTOMERIO": "true"}, "echo_to_customerio", True),
    "Yes": ({"ECHO_TO_CUSTOMERIO": "Yes"}, "echo_to_customerio", True),
    "0": ({"DRY_RUN": "0"}, "dry_run", False),
    "false": ({"DRY_RUN": "FALSE"}, "dry_run", False),
    "no": ({"DRY_RUN": "no"}, "dry_run", False),
    "an empty flag": ({"DRY_RUN": ""}, "dry_run", False),
    "a dry run without a write key": ({"DRY_RUN": "1", "SEGMENT_WRITE_KEY": ""}, "dry_run", True),
    "a dry run before there is one": ({"DRY_RUN": "1", "SEGMENT_WRITE_KEY": "unknown-yet"}, "segment_write_key", ""),
    "a dry run without a signing key": ({"DRY_RUN": "1", "CUSTOMERIO_SIGNING_KEY": ""}, "dry_run", True),
    "a dry run with both keys": ({"DRY_RUN": "Force"}, "dry_run", True),
    "a file": ({"DEAD_LETTER_FILE": "/x/y"}, "dead_letter_file", "/x/y"),
    "a port to listen on": ({"PORT": "5000"}, "port", 5000),
    "an empty port": ({"PORT": ""}, "port", 8080),
    "workers": ({"WEB_CONCURRENCY": "4"}, "workers", 4),
    "a log level": ({"LOG_LEVEL": "DEBUG"}, "log_level", "debug"),
    "a log of JSON": ({"LOG_FORMAT": "JSON"}, "log_format", "json"),
    "an empty log format": ({"LOG_FORMAT": ""}, "log_format", "text"),
    "the shortest write key": ({"SEGMENT_WRITE_KEY": "a-b_c."}, "segment_write_key", "a-b_c."),
    "the longest write key": ({"SEGMENT_WRITE_KEY": "x1" * 25 + "!"}, "segment_write_key", "x1" * 25 + "!"),
    "a signing key in another script": ({"CUSTOMERIO_SIGNING_KEY": "ключ"}, "signing_keys", ("ключ",)),
    "a quote within a prefix": ({"EVENT_PREFIX": "Ada's "}, "event_prefix", "Ada's "),
    "a quote within a file's name": ({"DEAD_LETTER_FILE": "/x/Ada's"}, "dead_letter_file", "/x/Ada's"),
    "one property to omit, and a comma": ({"OMIT_PROPERTIES": "recipient,\n"}, "omit_properties", {"recipient"}),
    "properties of any letters": (
        {"OMIT_PROPERTIES": "$a-1.b_c,имя"},
        *("omit_properties", {"$a-1.b_c", "имя"}),
    ),
}


@pytest.mark.parametrize(("env", "name", "value"), READ.values(), ids=READ.keys())
def test_reads(env, name, value):
    assert getattr(read(**env), name) == value


def test_a_dry_run_needs_no_keys():
    config = Config.from_env({"DRY_RUN": "1"})
    assert (config.segment_write_key, config.signing_keys) == ("", ())


def test_a_dry_run_checks_signatures_if_it_has_a_key():
    assert Config.from_env({"DRY_RUN": "1", "CUSTOMERIO_SIGNING_KEY": "k"}).signing_keys == ("k",)


def test_unsigned_webhooks_are_allowed_on_demand_and_warned_of():
    config = Config.from_env({"SEGMENT_WRITE_KEY": KEY, "ALLOW_UNSIGNED": "1"})
    assert config.signing_keys == ()
    assert ["ALLOW_UNSIGNED is on" in warning for warning in config.warnings] == [True]


def test_a_signing_key_is_used_whatever_else_is_allowed():
    config = read(ALLOW_UNSIGNED="1")
    assert config.signing_keys == ("s3cret",)
    assert ["no effect" in warning for warning in config.warnings] == [True]


WRONG = {
    "no write key": ({"SEGMENT_WRITE_KEY": ""}, "SEGMENT_WRITE_KEY is not set"),
    "no write key yet": ({"SEGMENT_WRITE_KEY": "Unknown yet"}, "SEGMENT_WRITE_KEY is not set"),
    "a blank write key": ({"SEGMENT_WRITE_KEY": " "}, "SEGMENT_WRITE_KEY is not set"),
    "no signing key": ({"CUSTOMERIO_SIGNING_KEY": ""}, "CUSTOMERIO_SIGNING_KEY is not set"),
    "commas only": ({"CUSTOMERIO_SIGNING_KEY": " , ,"}, "CUSTOMERIO_SIGNING_KEY is not set"),
    "unsigned not allowed": ({"CUSTOMERIO_SIGNING_KEY": "", "ALLOW_UNSIGNED": "0"}, "CUSTOMERIO_SIGNING_KEY"),
    "a host without scheme": ({"SEGMENT_HOST": "api.segment.io"}, "SEGMENT_HOST is a URL"),
    "a host with a path": ({"SEGMENT_HOST": "https://api.segment.io/v1"}, "SEGMENT_HOST is a URL"),
    "a host with a query": ({"SEGMENT_HOST": "https://api.segment.io?x=1"}, "SEGMENT_HOST is a URL"),
    "a host with a fragment": ({"SEGMENT_HOST": "https://api.segment.io#x"}, "SEGMENT_HOST is a URL"),
    "a host with a password": ({"SEGMENT_HOST": "https://u:hidden@api.segment.io"}, "SEGMENT_HOST is a URL"),
    "another scheme": ({"SEGMENT_HOST": "ftp://api.segment.io"}, "SEGMENT_HOST is a URL"),
    "a scheme alone": ({"SEGMENT_HOST": "https://"}, "SEGMENT_HOST is a URL"),
    "a host with an invalid port": ({"SEGMENT_HOST": "https://api.segment.io:x"}, "SEGMENT_HOST is a URL"),
    "a host's port that is too high": ({"SEGMENT_HOST": "https://api.segment.io:70000"}, "SEGMENT_HOST is a URL"),
    "half of an IPv6 address": ({"SEGMENT_HOST": "http://[::1"}, "SEGMENT_HOST is a URL"),
    "a host with a space": ({"SEGMENT_HOST": "https://api segment.io"}, "SEGMENT_HOST is a URL"),
    "a host of three dots": ({"SEGMENT_HOST": "https://..."}, "SEGMENT_HOST is a URL"),
    "a host that is an ellipsis": ({"SEGMENT_HOST": "https://…"}, "SEGMENT_HOST is a URL"),
    "a host of one dot": ({"SEGMENT_HOST": "https://."}, "SEGMENT_HOST is a URL"),
    "a host with two dots": ({"SEGMENT_HOST": "https://api..segment.io"}, "SEGMENT_HOST is a URL"),
    "a host with a dot first": ({"SEGMENT_HOST": "https://.segment.io"}, "SEGMENT_HOST is a URL"),
    "a wildcard": ({"SEGMENT_HOST": "https://*.segment.io"}, "SEGMENT_HOST is a URL"),
    "a host to fill in": ({"SEGMENT_HOST": "https://<region>.segment.io"}, "SEGMENT_HOST is a URL"),
    "a host of the shell": ({"SEGMENT_HOST": "https://${REGION}.segment.io"}, "SEGMENT_HOST is a URL"),
    "a host with a quote": ({"SEGMENT_HOST": 'https://api.segment.io"'}, "SEGMENT_HOST is a URL"),
    "a host in quotes": ({"SEGMENT_HOST": "https://'api.segment.io'"}, "SEGMENT_HOST is a URL"),
    "a host with a control character": ({"SEGMENT_HOST": "https://api.\x01segment.io"}, "SEGMENT_HOST is a URL"),
    "a host with a line break": ({"SEGMENT_HOST": "https://api.\nsegment.io"}, "SEGMENT_HOST is a URL"),
    "a host with an empty query": ({"SEGMENT_HOST": "https://api.segment.io?"}, "SEGMENT_HOST is a URL"),
    "a host with an empty fragment": ({"SEGMENT_HOST": "https://api.segment.io/#"}, "SEGMENT_HOST is a URL"),
    "a host with a dash first": ({"SEGMENT_HOST": "https://-api.segment.io"}, "SEGMENT_HOST is a URL"),
    "a host with a letter that only looks like k": ({"SEGMENT_HOST": "https://\u212a.io"}, "SEGMENT_HOST is a URL"),
    "two hosts": ({"SEGMENT_HOST": "https://a.io,https://b.io"}, "SEGMENT_HOST is a URL"),
    "an invalid IPv6 address": ({"SEGMENT_HOST": "http://[12345::1]"}, "SEGMENT_HOST is a URL"),
    "an invalid flag": ({"DRY_RUN": "on"}, "DRY_RUN is a flag"),
    "another invalid flag": ({"ECHO_TO_CUSTOMERIO": "2"}, "ECHO_TO_CUSTOMERIO is a flag"),
    "a third invalid flag": ({"ALLOW_UNSIGNED": "maybe"}, "ALLOW_UNSIGNED is a flag"),
    "an invalid port": ({"PORT": "http"}, "PORT is a whole number"),
    "port zero": ({"PORT": "0"}, "PORT is a whole number"),
    "a port that is too high": ({"PORT": "65536"}, "PORT is a whole number"),
    "a port in digits of another script": ({"PORT": "٨٠٨٠"}, "PORT is a whole number"),
    "no workers": ({"WEB_CONCURRENCY": "0"}, "WEB_CONCURRENCY is a whole number"),
    "too many workers": ({"WEB_CONCURRENCY": "1000"}, "WEB_CONCURRENCY is a whole number"),
    "a fraction of workers": ({"WEB_CONCURRENCY": "1.5"}, "WEB_CONCURRENCY is a whole number"),
    "an invalid log level": ({"LOG_LEVEL": "loud"}, "LOG_LEVEL is one of"),
    "an invalid log format": ({"LOG_FORMAT": "xml"}, "LOG_FORMAT is one of text, json"),
    "workers that are set but blank": ({"WEB_CONCURRENCY": " "}, "WEB_CONCURRENCY is set but blank"),
    "workers that are set but empty": ({"WEB_CONCURRENCY": ""}, "WEB_CONCURRENCY is set but blank"),
    "a dry run with both keys": ({"DRY_RUN": "1"}, "DRY_RUN is on while both keys are set"),
    "a write key that is too short": ({"SEGMENT_WRITE_KEY": "abcde"}, "SEGMENT_WRITE_KEY is not a write key: those"),
    "a write key that is too long": ({"SEGMENT_WRITE_KEY": "x1" * 26}, "SEGMENT_WRITE_KEY is not a write key: those"),
    "a write key of other letters": ({"SEGMENT_WRITE_KEY": "ключключ"}, "SEGMENT_WRITE_KEY is not a write key: those"),
    "quoted properties": ({"OMIT_PROPERTIES": '"recipient,subject"'}, "OMIT_PROPERTIES has quotes in it"),
    "properties, each quoted": ({"OMIT_PROPERTIES": "'recipient', 'subject'"}, "OMIT_PROPERTIES has quotes in it"),
    "one quoted property": ({"OMIT_PROPERTIES": "recipient, 'subject'"}, "OMIT_PROPERTIES has quotes in it"),
    "a list of JSON": ({"OMIT_PROPERTIES": '["recipient"]'}, "OMIT_PROPERTIES has quotes in it"),
    "a quote within a property": ({"OMIT_PROPERTIES": "recipient's"}, "OMIT_PROPERTIES has quotes in it"),
    "properties in square brackets": ({"OMIT_PROPERTIES": "[recipient,subject]"}, "OMIT_PROPERTIES is a list"),
    "properties in brackets": ({"OMIT_PROPERTIES": "(recipient,subject)"}, "OMIT_PROPERTIES is a list"),
    "properties in braces": ({"OMIT_PROPERTIES": "{recipient}"}, "OMIT_PROPERTIES is a list"),
    "properties separated by a blank": ({"OMIT_PROPERTIES": "recipient subject"}, "OMIT_PROPERTIES is a list"),
    "properties separated by a semicolon": ({"OMIT_PROPERTIES": "recipient;subject"}, "OMIT_PROPERTIES is a list"),
    "properties separated by a bar": ({"OMIT_PROPERTIES": "recipient|subject"}, "OMIT_PROPERTIES is a list"),
    "properties separated by a line break": ({"OMIT_PROPERTIES": "recipient\nsubject"}, "OMIT_PROPERTIES is a list"),
    "properties of three dots": ({"OMIT_PROPERTIES": "..."}, "OMIT_PROPERTIES is a list"),
    "a property, and so on": ({"OMIT_PROPERTIES": "recipient, ..."}, "OMIT_PROPERTIES is a list"),
    "a property with a control character": ({"OMIT_PROPERTIES": "reci\x01pient"}, "OMIT_PROPERTIES is a list"),
    "other names": ({"EVENT_NAMES": "rudderstack"}, "EVENT_NAMES is one of customerio, segment"),
    "quoted names": ({"EVENT_NAMES": '"segment"'}, "EVENT_NAMES is one of customerio, segment"),
    "names in two words": ({"EVENT_NAMES": "customer.io"}, "EVENT_NAMES is one of customerio, segment"),
    "a quoted prefix": ({"EVENT_PREFIX": '"cio "'}, "EVENT_PREFIX has quotes around its value"),
    "an empty prefix in quotes": ({"EVENT_PREFIX": '""'}, "EVENT_PREFIX has quotes around its value"),
    "a prefix with a line break": ({"EVENT_PREFIX": "cio\n"}, "EVENT_PREFIX has a control character in it"),
    "a quoted file": ({"DEAD_LETTER_FILE": "'/x/y'"}, "DEAD_LETTER_FILE has quotes around its value"),
    "a quoted host": ({"SEGMENT_HOST": '"https://api.segment.io"'}, "SEGMENT_HOST is a URL"),
    "a quoted port": ({"PORT": '"8080"'}, "PORT is a whole number"),
    "a quoted flag": ({"ECHO_TO_CUSTOMERIO": "'1'"}, "ECHO_TO_CUSTOMERIO is a flag"),
    "a quoted log level": ({"LOG_LEVEL": '"debug"'}, "LOG_LEVEL is one of"),
}


# Hosts that the client can take.
HOSTS = [
    "https://api.segment.io",
    "https://api.segment.io.",
    "HTTPS://API.Segment.io:443",
    "http://jitsu_server:8000",
    "http://a",
    "https://xn--mller-kva.example",
    "http://10.0.0.1:80",
    "http://[2001:db8::1]",
]


@pytest.mark.parametrize("host", HOSTS)
def test_a_host_is_taken_as_it_is(host):
    assert read(SEGMENT_HOST=host).segment_host == host
    assert SegmentClient(KEY, host)


@pytest.mark.parametrize(("env", "message"), WRONG.values(), ids=WRONG.keys())
def test_a_wrong_value_is_a_problem(env, message):
    (problem,) = problems(GOOD | env)
    assert problem.startswith(message)


# A key as people paste it -> the message, for either key.
NOT_KEYS = {
    "in quotes": (f'"{KEY}"', "has quotes in it"),
    "in single quotes": (f"'{KEY}'", "has quotes in it"),
    "in the quotes of a text processor": (f"“{KEY}”", "has quotes in it"),
    "in backticks": (f"`{KEY}`", "has quotes in it"),
    "with half a pair of quotes": (f'{KEY}"', "has quotes in it"),
    "two, separated by a blank": (f"{KEY} {KEY[::-1]}", "has a blank or a control character in it"),
    "two, separated by a line break": (f"{KEY}\n{KEY[::-1]}", "has a blank or a control character in it"),
    "with a tab": (f"{KEY[:9]}\t{KEY[9:]}", "has a blank or a control character in it"),
    "with a zero byte's neighbour": (f"{KEY[:9]}\x01{KEY[9:]}", "has a blank or a control character in it"),
    "with a blank without width": (f"{KEY[:9]}\u200b{KEY[9:]}", "has a blank or a control character in it"),
    "with a blank that does not break": (f"{KEY[:9]}\u00a0{KEY[9:]}", "has a blank or a control character in it"),
    "three dots": ("...", "is still the placeholder of an example"),
    "an ellipsis": ("…", "is still the placeholder of an example"),
    "a beginning and dots": ("abc123...", "is still the placeholder of an example"),
    "in angle brackets": ("<your-key>", "is still the placeholder of an example"),
    "in square brackets": ("[key]", "is still the placeholder of an example"),
    "in braces": ("{{write_key}}", "is still the placeholder of an example"),
    "a variable of the shell": ("$SEGMENT_WRITE_KEY", "is still the placeholder of an example"),
    "your key": ("YOUR_WRITE_KEY", "is still the placeholder of an example"),
    "xxx": ("xxxxxxxx", "is still the placeholder of an example"),
    "stars": ("********", "is still the placeholder of an example"),
    "change me": ("change-me", "is still the placeholder of an example"),
    "replace me": ("REPLACE_ME", "is still the placeholder of an example"),
    "to do": ("TODO", "is still the placeholder of an example"),
    "none": ("null", "is still the placeholder of an example"),
    "its own name": ("write_key", "is still the placeholder of an example"),
    "my key": ("my_write_key", "is still the placeholder of an example"),
    "a key in angle brackets": ("<key>", "is still the placeholder of an example"),
    "paste": ("PASTE_HERE", "is still the placeholder of an example"),
    "paste a key": ("paste-your-key-here", "is still the placeholder of an example"),
    "enter": ("ENTER_YOUR_KEY", "is still the placeholder of an example"),
    "insert": ("insert-key-here", "is still the placeholder of an example"),
    "an example": ("example", "is still the placeholder of an example"),
    "undefined": ("undefined", "is still the placeholder of an example"),
    "the variable's name": ("CUSTOMERIO_SIGNING_KEY", "is still the placeholder of an example"),
}


NEARLY = ["my-signing-key", "examplary", "insertion", "pasted", "key", "unknown-yesterday", "yet"]


@pytest.mark.parametrize("key", NEARLY)
def test_a_word_that_only_begins_like_a_placeholder_is_a_key(key):
    assert read(CUSTOMERIO_SIGNING_KEY=key).signing_keys == (key,)


def test_the_word_for_a_signing_key_that_nobody_has_yet():
    """It is needed to deploy, before Customer.io shows the key."""
    word = "unknown-yet"
    assert f"`CUSTOMERIO_SIGNING_KEY` to `{word}`" in (ROOT / "README.md").read_text()
    assert f"enter {word} and" in (ROOT / "app.json").read_text()
    config = read(CUSTOMERIO_SIGNING_KEY=word)
    assert (config.not_set_up, config.signing_keys) == (True, ())


DOCUMENTS = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.*ml"), *ROOT.glob("docs/*.md"), ROOT / "app.json"]
# How they name a value for CUSTOMERIO_SIGNING_KEY. Anybody can read those.
SUGGESTED = sorted(
    {
        word
        for path in DOCUMENTS
        for form in (
            r"CUSTOMERIO_SIGNING_KEY=([^`\n]+)",
            r"CUSTOMERIO_SIGNING_KEY`?\sto\s`?([^`\n]+?)`",
            r"[Ss]igning key.* (?:later|then) `([^`=]+)`",
            r"[Ss]igning key.* set `([^`=]+)`",
            r"If you have no key yet, enter (\S+)",
        )
        for word in re.findall(form, path.read_text())
    }
)


def test_there_are_suggestions():
    assert {"unknown-yet", "...", "<new key>", "<new key>,<old key>"} <= set(SUGGESTED)


SPELLINGS = {
    "as it stands": str,
    "in capitals": str.upper,
    "with a capital": str.title,
    "with blanks": lambda word: f" {word.replace('-', ' ')}\n",
    "with a low line": lambda word: word.replace("-", "_"),
    "with a dash": lambda word: word.replace("-", "\N{EN DASH}"),
    "as one word": lambda word: word.replace("-", ""),
    "in two lines": lambda word: word.replace("-", "\n"),
    "with a comma": lambda word: word.replace("-", ", "),
    "in quotes": lambda word: f'"{word}"',
    "with a full stop": lambda word: f"{word}.",
    "twice": lambda word: f"{word},{word}",
}


@pytest.mark.parametrize("word", SUGGESTED)
@pytest.mark.parametrize("spelling", SPELLINGS.values(), ids=SPELLINGS.keys())
@pytest.mark.parametrize("more", [{}, {"ALLOW_UNSIGNED": "1"}], ids=["", "unsigned"])
def test_what_a_document_suggests_is_never_a_key(word, spelling, more):
    try:
        config = read(CUSTOMERIO_SIGNING_KEY=spelling(word), **more)
    except ConfigError:
        return  # it doesn't even start
    assert (config.not_set_up, config.signing_keys) == (True, ())
    (warning,) = config.warnings
    assert "no webhook is accepted" in warning


def test_a_word_in_the_place_of_a_key_does_not_count_beside_a_key():
    config = read(CUSTOMERIO_SIGNING_KEY="unknown-yet,s3cret")
    assert (config.not_set_up, config.signing_keys) == (False, ("s3cret",))
    (warning,) = config.warnings
    assert "has a word in place of a key beside other keys" in warning


def test_a_dry_run_needs_no_signing_key_so_it_takes_webhooks_without_one():
    config = read(CUSTOMERIO_SIGNING_KEY="unknown-yet", DRY_RUN="1")
    assert (config.not_set_up, config.signing_keys, config.signatures) == (False, (), "not checked")


def test_two_signing_keys_with_a_semicolon_between_them():
    (problem,) = problems(GOOD | {"CUSTOMERIO_SIGNING_KEY": "abc;def"})
    assert problem.startswith("CUSTOMERIO_SIGNING_KEY has a semicolon in it")
    assert problem.endswith("Two keys are separated by a comma.")


@pytest.mark.parametrize("name", ["SEGMENT_WRITE_KEY", "CUSTOMERIO_SIGNING_KEY"])
@pytest.mark.parametrize(("value", "wrong"), NOT_KEYS.values(), ids=NOT_KEYS.keys())
def test_an_invalid_key_is_one_problem_that_says_where_the_key_is(name, value, wrong):
    (problem,) = problems(GOOD | {name: value})
    assert problem.startswith(f"{name} {wrong}. Copy it again from ")
    assert ("Segment:" if name == "SEGMENT_WRITE_KEY" else "Customer.io:") in problem


def test_the_second_signing_key_is_looked_at_too():
    (problem,) = problems(GOOD | {"CUSTOMERIO_SIGNING_KEY": "s3cret, 'old'"})
    assert problem.startswith("CUSTOMERIO_SIGNING_KEY has quotes in it")
    assert "Two keys are separated by a comma" in problem


def test_a_dry_run_with_both_keys_says_how_to_go_on():
    """In production its 200s would lose every event."""
    (problem,) = problems(GOOD | {"DRY_RUN": "yes"})
    assert "webhooks would be answered with 200, and their events be gone" in problem
    assert problem.endswith("Unset DRY_RUN to deliver them, or set DRY_RUN=force.")


# What a command needs -> the keys it may do without.
NEEDED = {
    "replay": (["SEGMENT_WRITE_KEY"], ["CUSTOMERIO_SIGNING_KEY"]),
    "sample": ([], ["SEGMENT_WRITE_KEY", "CUSTOMERIO_SIGNING_KEY"]),
}


@pytest.mark.parametrize(("needs", "missing"), NEEDED.values(), ids=NEEDED.keys())
def test_only_the_keys_that_are_needed_must_be_set(needs, missing):
    env = GOOD | dict.fromkeys(missing, "")
    assert Config.from_env(env, needs=needs).event_prefix == "customerio:"
    assert len(problems(env)) == len(missing)


def test_a_key_that_is_not_needed_but_set_is_still_looked_at():
    with pytest.raises(ConfigError, match="CUSTOMERIO_SIGNING_KEY has quotes in it"):
        Config.from_env(GOOD | {"CUSTOMERIO_SIGNING_KEY": "'k'"}, needs=["SEGMENT_WRITE_KEY"])


def test_every_problem_is_reported_at_once():
    found = problems(
        {
            "SEGMENT_HOST": "x",
            "PORT": "x",
            "WEB_CONCURRENCY": "x",
            "LOG_LEVEL": "x",
            "LOG_FORMAT": "x",
            "ECHO_TO_CUSTOMERIO": "x",
        }
    )
    assert [problem.split()[0] for problem in found] == [
        "SEGMENT_WRITE_KEY",
        "CUSTOMERIO_SIGNING_KEY",
        "SEGMENT_HOST",
        "ECHO_TO_CUSTOMERIO",
        "PORT",
        "WEB_CONCURRENCY",
        "LOG_LEVEL",
        "LOG_FORMAT",
    ]


def test_a_file_that_cannot_be_written_is_a_problem():
    with pytest.raises(ConfigError, match="DEAD_LETTER_FILE cannot be appended to: it is a folder"):
        Config.from_env(GOOD | {"DEAD_LETTER_FILE": "/x"}, lambda path: f"it is a folder: {path}")


WARNED = {
    "a short write key": ({"SEGMENT_WRITE_KEY": "abc123"}, "does not look like a write key"),
    "a write key with a dash": ({"SEGMENT_WRITE_KEY": f"{KEY[:31]}-"}, "does not look like a write key"),
    "a dry run": ({"DRY_RUN": "force"}, "nothing is sent to Segment, and the events are not kept"),
    "http": ({"SEGMENT_HOST": "http://segment.example"}, "not https"),
    "an address left out in one property": (
        {"OMIT_PROPERTIES": "recipient,subject"},
        "leaves the person's address in identifiers.email, email_address: add that too",
    ),
    "an address left out in two": (
        {"OMIT_PROPERTIES": "identifiers,recipient"},
        "leaves the person's address in email_address: add that too",
    ),
}


@pytest.mark.parametrize(("env", "warning"), WARNED.values(), ids=WARNED.keys())
def test_warns(env, warning):
    (found,) = read(**env).warnings
    assert warning in found


@pytest.mark.parametrize(
    "names",
    [
        "identifiers.email,email_address,recipient",
        "identifiers,email_address,recipient,subject",
        "content,headers,variables",
        "identifiers.id,identifiers.email_,recipients",
        "",
    ],
)
def test_does_not_warn_where_the_address_is_left_out_in_all_properties_or_in_none(names):
    assert read(OMIT_PROPERTIES=names).warnings == ()


HEX = "0123456789abcdef" * 2
SWAPPED = {  # the write key, the signing key -> whether the question is asked
    "as they are": (KEY, "s3cret", False),
    "as they are, and a hexadecimal signing key": (KEY, HEX, False),
    "a hexadecimal write key": (HEX, "s3cret", False),
    "both look like a write key": (KEY, KEY[::-1], False),
    "swapped": ("s3cret", KEY, True),
    "swapped, and a hexadecimal signing key": (HEX, KEY, True),
    "swapped, and two signing keys": ("s3cret", f"a,{KEY}", True),
}


@pytest.mark.parametrize(("write_key", "signing_key", "asked"), SWAPPED.values(), ids=SWAPPED.keys())
def test_swapped_keys(write_key, signing_key, asked):
    warnings = read(SEGMENT_WRITE_KEY=write_key, CUSTOMERIO_SIGNING_KEY=signing_key).warnings
    assert any(warning.endswith("did you swap them?") for warning in warnings) == asked


def test_swapped_keys_of_which_one_cannot_be_a_write_key():
    problem, question = problems(GOOD | {"SEGMENT_WRITE_KEY": HEX * 2, "CUSTOMERIO_SIGNING_KEY": KEY})
    assert problem.startswith("SEGMENT_WRITE_KEY is not a write key")
    assert question.endswith("did you swap them?")


def test_the_same_key_twice():
    (warning,) = read(CUSTOMERIO_SIGNING_KEY=KEY).warnings
    assert warning == "SEGMENT_WRITE_KEY and CUSTOMERIO_SIGNING_KEY are the same: one of them is wrong."


SECRETS = {"SEGMENT_WRITE_KEY": "hidden-write-key", "CUSTOMERIO_SIGNING_KEY": "hidden-signing-key"}


def test_no_secret_in_repr_nor_in_warnings():
    config = Config.from_env(SECRETS)
    assert "hidden" not in repr(config)
    assert "hidden" not in str(config.warnings)


def test_no_secret_in_problems():
    env = SECRETS | {
        "SEGMENT_HOST": "https://user:hidden@host",
        "PORT": "hidden",
        "DRY_RUN": "hidden",
        "LOG_LEVEL": "hidden",
    }
    assert len(problems(env)) == 4
    assert "hidden" not in str(problems(env))


@pytest.mark.parametrize("form", ["'{}'", "{} x", "your-{}", "<{}>", "é{}"])
def test_no_secret_in_what_is_said_of_it(form):
    env = {name: form.format(secret) for name, secret in SECRETS.items()}
    assert "hidden" not in str(problems(env))
