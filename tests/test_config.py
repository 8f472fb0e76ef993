"""config.py: what the environment may say, and what is said when it may not."""

import pytest

from config import Config, ConfigError

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
    "properties to omit": ({"OMIT_PROPERTIES": "recipient, subject"}, "omit_properties", {"recipient", "subject"}),
    "echo": ({"ECHO_TO_CUSTOMERIO": "1"}, "echo_to_customerio", True),
    "true": ({"DRY_RUN": "true"}, "dry_run", True),
    "Yes": ({"DRY_RUN": "Yes"}, "dry_run", True),
    "0": ({"DRY_RUN": "0"}, "dry_run", False),
    "false": ({"DRY_RUN": "FALSE"}, "dry_run", False),
    "no": ({"DRY_RUN": "no"}, "dry_run", False),
    "an empty flag": ({"DRY_RUN": ""}, "dry_run", False),
    "a file": ({"DEAD_LETTER_FILE": "/x/y"}, "dead_letter_file", "/x/y"),
    "a port to listen on": ({"PORT": "5000"}, "port", 5000),
    "an empty port": ({"PORT": ""}, "port", 8080),
    "workers": ({"WEB_CONCURRENCY": "4"}, "workers", 4),
    "a log level": ({"LOG_LEVEL": "DEBUG"}, "log_level", "debug"),
}


@pytest.mark.parametrize(("env", "name", "value"), READ.values(), ids=READ.keys())
def test_reads(env, name, value):
    assert getattr(read(**env), name) == value


def test_a_dry_run_needs_no_keys():
    config = Config.from_env({"DRY_RUN": "1"})
    assert config.signing_keys == ()
    assert config.warnings == ()


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
    "a host's port that is none": ({"SEGMENT_HOST": "https://api.segment.io:x"}, "SEGMENT_HOST is a URL"),
    "a host's port that is too high": ({"SEGMENT_HOST": "https://api.segment.io:70000"}, "SEGMENT_HOST is a URL"),
    "half of an IPv6 address": ({"SEGMENT_HOST": "http://[::1"}, "SEGMENT_HOST is a URL"),
    "a host with a space": ({"SEGMENT_HOST": "https://api segment.io"}, "SEGMENT_HOST is a URL"),
    "a flag that is none": ({"DRY_RUN": "on"}, "DRY_RUN is a flag"),
    "another flag that is none": ({"ECHO_TO_CUSTOMERIO": "2"}, "ECHO_TO_CUSTOMERIO is a flag"),
    "a third flag that is none": ({"ALLOW_UNSIGNED": "maybe"}, "ALLOW_UNSIGNED is a flag"),
    "a port that is none": ({"PORT": "http"}, "PORT is a whole number"),
    "port zero": ({"PORT": "0"}, "PORT is a whole number"),
    "a port that is too high": ({"PORT": "65536"}, "PORT is a whole number"),
    "a port in digits of another script": ({"PORT": "٨٠٨٠"}, "PORT is a whole number"),
    "no workers": ({"WEB_CONCURRENCY": "0"}, "WEB_CONCURRENCY is a whole number"),
    "too many workers": ({"WEB_CONCURRENCY": "1000"}, "WEB_CONCURRENCY is a whole number"),
    "a fraction of workers": ({"WEB_CONCURRENCY": "1.5"}, "WEB_CONCURRENCY is a whole number"),
    "a log level that is none": ({"LOG_LEVEL": "loud"}, "LOG_LEVEL is one of"),
}


@pytest.mark.parametrize(("env", "message"), WRONG.values(), ids=WRONG.keys())
def test_a_wrong_value_is_a_problem(env, message):
    (problem,) = problems(GOOD | env)
    assert problem.startswith(message)


def test_every_problem_is_reported_at_once():
    found = problems(
        {"SEGMENT_HOST": "x", "PORT": "x", "WEB_CONCURRENCY": "x", "LOG_LEVEL": "x", "ECHO_TO_CUSTOMERIO": "x"}
    )
    assert [problem.split()[0] for problem in found] == [
        "SEGMENT_WRITE_KEY",
        "CUSTOMERIO_SIGNING_KEY",
        "SEGMENT_HOST",
        "ECHO_TO_CUSTOMERIO",
        "PORT",
        "WEB_CONCURRENCY",
        "LOG_LEVEL",
    ]


def test_a_file_that_cannot_be_written_is_a_problem():
    with pytest.raises(ConfigError, match="DEAD_LETTER_FILE cannot be appended to: it is a folder"):
        Config.from_env(GOOD | {"DEAD_LETTER_FILE": "/x"}, lambda path: f"it is a folder: {path}")


WARNED = {
    "a short write key": ({"SEGMENT_WRITE_KEY": "abc123"}, "does not look like a write key"),
    "a write key in quotes": ({"SEGMENT_WRITE_KEY": f'"{KEY}"'}, "does not look like a write key"),
    "http": ({"SEGMENT_HOST": "http://segment.example"}, "not https"),
}


@pytest.mark.parametrize(("env", "warning"), WARNED.values(), ids=WARNED.keys())
def test_warns(env, warning):
    (found,) = read(**env).warnings
    assert warning in found


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
