"""The operator's commands: `python -m ops check | sample | replay | translate`."""

import json
import os
import re
import stat
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from datetime import UTC, datetime
from typing import BinaryIO, TextIO
from uuid import uuid4

import click
import requests

from config import MAPPING, Config, ConfigError
from ops import samples
from ops.check.command import TIMEOUT, check, wrong_settings
from ops.envfile import variables
from ops.found import Found, find
from relay import signature
from relay.delivery import Message, fitting, parts
from relay.key_check import check_call
from relay.message import to_message
from relay.outcomes import RateLimited, Rejected, RetryLater, TransientError
from relay.segment import SegmentClient
from server import preflight
from translate import Untranslatable, parse, translate

ATTEMPTS = 6  # for each upload of a replay, a second apart and then twice as long each time

Number = int  # of a message in a replay: its position in the file

FILE = click.argument("file", type=click.File(encoding="utf-8-sig", errors="surrogateescape"))


@click.group()
@click.option(
    "--env-file",
    type=click.File("rb"),
    help="Settings, as in systemd's EnvironmentFile; the environment's own come first.",
)
@click.pass_context
def main(context: click.Context, env_file: BinaryIO | None) -> None:
    """Check the settings, try the relay, and send dead letters again."""
    for name, value in read_settings(env_file).items() if env_file else ():
        os.environ.setdefault(name, value)  # and so HTTPS_PROXY and others count as they do for the service
    context.obj = dict(os.environ)


def read_settings(file: BinaryIO) -> dict[str, str]:
    content = file.read()
    try:
        if b"\0" in content:
            raise ValueError
        return variables(content.decode())
    except ValueError:
        raise click.BadParameter(f"{file.name} is not a text in UTF-8.", param_hint="--env-file") from None


def settings(env: dict[str, str], uses: Collection[str], *needs: str) -> Config:
    """Return the settings that a command uses, of which it needs these keys. The others may be wrong."""
    try:
        used = {name: value for name, value in env.items() if name in uses}
        return Config.from_env(used, needs=needs, bundle_problem=preflight.bundle_problem)
    except ConfigError as error:
        raise click.ClickException(wrong_settings(error)) from None


def message_maker(config: Config) -> Callable[[bytes], Message]:
    """Return the function that does with a webhook's body what the relay does."""
    mapping = config.mapping()
    return lambda body: to_message(translate(parse(body), received=datetime.now(UTC), **mapping))


main.add_command(check)


@main.command()
@click.option("--url", help="The relay's address; by default the one on this machine.")
@click.option("--event", "name", default="email_delivered", show_default=True, help="Any documented event.")
@click.option("--yes", is_flag=True, help="Don't ask before a live relay sends it to Segment.")
@click.pass_obj
def sample(env: dict[str, str], url: str | None, name: str, yes: bool) -> None:
    """Send a signed sample webhook to a running relay, and print the answer.

    A live relay sends it to Segment, so the command asks first.
    """
    if name not in samples.EVENTS:
        raise click.BadParameter(f"not one of {', '.join(samples.EVENTS)}", param_hint="--event")
    config = settings(env, ("CUSTOMERIO_SIGNING_KEY", "PORT"))
    relay = (url or f"http://localhost:{config.port}").rstrip("/").removesuffix("/webhook")
    body = json.dumps(samples.sample(name, str(uuid4()), int(time.time()))).encode()
    headers = {"Content-Type": "application/json"}
    if config.signing_keys:
        headers |= signature.sign(body, str(int(time.time())), config.signing_keys[0])
    try:
        if not yes and not is_dry_run(relay):
            ask_first(relay, name)
        answer = requests.post(f"{relay}/webhook", data=body, headers=headers, timeout=10)
    except requests.RequestException as error:
        raise click.ClickException(f"no answer from {relay}: {type(error).__name__}. Is the relay running?") from None
    click.echo(f"{answer.status_code} {answer.text.strip()}")
    if not answer.ok:
        sys.exit(1)


def is_dry_run(relay: str) -> bool:
    """Return whether a relay says that it is a dry run; one that doesn't say may be live."""
    metrics = requests.get(f"{relay}/metrics", timeout=10)
    return metrics.ok and re.search(r'^relay_info\{.*dry_run="true"', metrics.text, re.MULTILINE) is not None


def ask_first(relay: str, name: str) -> None:
    click.echo(
        f"{relay} is live: it will send {name} of a person with the id {samples.ID} to Segment, and on to your "
        "destinations.",
        err=True,
    )
    try:
        sure = click.confirm("Send it?", err=True)
    except click.Abort:
        if sys.stdin.isatty():
            raise
        raise click.UsageError(
            "Without a terminal nobody can confirm: nothing was sent. Add --yes to send it."
        ) from None
    if not sure:
        raise click.Abort


@main.command("translate")
@FILE
@click.pass_obj
def translate_file(env: dict[str, str], file: TextIO) -> None:
    """Print the track calls for the webhooks or dead letters in FILE (- is standard input). Sends nothing."""
    config = settings(env, MAPPING)
    make_message = message_maker(config)
    found, _ = find(file.read())
    failed = 0
    for item in found:
        try:
            click.echo(message_of(item, make_message).json)
        except (Untranslatable, Unreadable) as error:
            failed += 1
            click.echo(f"{item.place}: {error}", err=True)
    if failed or not found:
        sys.exit(nothing_found(found))


@main.command()
@FILE
@click.option(
    "--rate", default=500.0, show_default=True, type=click.FloatRange(0, min_open=True), help="Events a second."
)
@click.option("--failed", type=click.Path(dir_okay=False), help="Where to write what could not be sent, as it stood.")
@click.pass_obj
def replay(env: dict[str, str], file: TextIO, rate: float, failed: str | None) -> None:
    """Send what is in FILE (- is standard input) to Segment again.

    FILE has dead letters or webhooks: one a line, pretty-printed, or in a JSON array; a log with
    other lines between them is fine. The parts of a long dead letter are put together. Safe to
    repeat: Segment knows the events by the same messageIds. Segment's own limit is 1,000 events a
    second.
    """
    way = [name for name in env if name.lower().endswith("_proxy") or name.endswith("_CA_BUNDLE")]
    config = settings(env, (*MAPPING, "SEGMENT_HOST", "DRY_RUN", *way), "SEGMENT_WRITE_KEY")
    if config.dry_run:
        raise click.ClickException("DRY_RUN is on: nothing would be sent. `translate` shows what would be.")
    segment = SegmentClient(config.segment_write_key, config.segment_host, config.proxy, config.ca_bundle)
    make_message = message_maker(config)
    found, others = find(file.read())
    failures: dict[Number, str] = {}
    ready: list[tuple[Number, Message]] = []
    with place_for_rest(failed, file) if failed else nullcontext() as keep:  # before anything is sent
        for position, item in enumerate(found):
            try:
                ready.append((position, message_of(item, make_message)))
            except (Untranslatable, Unreadable) as error:
                failures[position] = str(error)
        left = dict(ready)
        stopped = ""
        # `update_min_steps=0` shows what it waits for, too.
        with click.progressbar(
            length=len(ready), label="Replaying", file=sys.stderr, item_show_func=str, update_min_steps=0
        ) as bar:
            bar.update(0, "")
            sender = Sender(segment, config, say=lambda words: bar.update(0, words))
            try:
                while ready:
                    started = time.monotonic()
                    count = fitting(message for _, message in ready)
                    batch, ready = ready[:count], ready[count:]
                    for number, reason in sender.send(batch):
                        del left[number]
                        if reason:
                            failures[number] = reason
                    bar.update(len(batch), "")
                    time.sleep(max(0.0, len(batch) / rate - (time.monotonic() - started)))
            except RetryLater as error:
                stopped = f"Stopped: {error}. Nothing else would be taken either, so it was not tried."
        for position, reason in sorted(failures.items()):
            click.echo(f"{found[position].place}: {reason}", err=True)
        if stopped:
            click.echo(stopped, err=True)
            failures |= dict.fromkeys(left, "")
        if keep:
            keep(found[position].text for position in sorted(failures))
    click.echo(f"{len(found) - len(failures)} sent, {len(failures)} not sent, {others} other lines.")
    if failures or not found:
        sys.exit(nothing_found(found))


def nothing_found(found: list[Found]) -> int:
    """Say so if there was nothing to do, and return the exit code of a failure."""
    if not found:
        click.echo("There is no webhook and no dead letter in it.", err=True)
    return 1


class Unreadable(Exception):
    """What is found in a file isn't a whole event."""


def message_of(item: Found, make_message: Callable[[bytes], Message]) -> Message:
    if item.problem:
        raise Unreadable(item.problem)
    return make_message(item.body)


@contextmanager
def place_for_rest(path: str, file: TextIO) -> Iterator[Callable[[Iterable[str]], None]]:
    """Make a new file beside `path` that only its owner can read: dead letters are personal data.

    Return the function that fills it, and renames it to `path`. Until then `path` stays as it is, so an
    interruption loses nothing. Raise if something is in it that is not in `file`, and if there is no place for it.
    """
    try:
        before = status(path)
        if before and not stat.S_ISREG(before.st_mode):
            raise click.ClickException(f"{path} is not a regular file: name another. Nothing was sent.")
        if before and before.st_size and not is_file(file, before):
            raise click.ClickException(
                f"{path} is not empty, and would be replaced: replay that one first, or name another. Nothing was sent."
            )
        number, new = tempfile.mkstemp(prefix="replay-", dir=os.path.dirname(path) or ".")
        os.close(number)
    except OSError as error:
        raise click.ClickException(f"{path} can't be written: {error.strerror}. Nothing was sent.") from None

    def keep(texts: Iterable[str]) -> None:
        try:
            with open(new, "w", encoding="utf-8", errors="surrogateescape") as rest:
                rest.writelines(text + "\n" for text in texts)
                rest.flush()
                os.fsync(rest.fileno())
            if changed(before, status(path)):
                raise click.ClickException(f"{path} has changed meanwhile, and stays as it is. Replay it again.")
            os.replace(new, path)
        except OSError as error:
            raise click.ClickException(f"{path} can't be written: {error.strerror}. It is as it was.") from None

    try:
        yield keep
    finally:
        with suppress(FileNotFoundError):  # it has replaced `path`
            os.unlink(new)


def status(path: str) -> os.stat_result | None:
    with suppress(FileNotFoundError):
        return os.stat(path)
    return None


def is_file(file: TextIO, there: os.stat_result) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), there)
    except OSError:  # it has no number
        return False


def changed(before: os.stat_result | None, after: os.stat_result | None) -> bool:
    if not before or not after:
        return before is not after
    return not os.path.samestat(before, after) or before.st_size != after.st_size


class Sender:
    """Uploads the batches of a replay, until nothing can succeed."""

    def __init__(self, segment: SegmentClient, config: Config, say: Callable[[str], None]):
        """`say(words)` is told what it waits for."""
        self._segment = segment
        self._check = check_call(config.event_prefix, config.event_names)
        self._say = say
        self._key_is_good = False  # Segment has taken an event

    def send(self, batch: list[tuple[Number, Message]]) -> Iterator[tuple[Number, str]]:
        """Upload a batch; yield each number with the reason why Segment did not take the message, "" if it did.

        Raise RetryLater if Segment would take nothing else either.
        """
        try:
            self._upload([message for _, message in batch])
        except Rejected as error:
            if len(batch) > 1:
                for part in parts(batch):
                    yield from self.send(part)
                return
            if not self._key_is_good and (error.status == 400 or not error.by_segment):
                self._check_key()
            yield batch[0][0], str(error)
        except RetryLater as error:
            if not passes(error):
                raise
            yield from ((number, str(error)) for number, _ in batch)
        else:
            self._key_is_good = True
            yield from ((number, "") for number, _ in batch)

    def _upload(self, messages: list[Message]) -> None:
        for attempt in range(ATTEMPTS):
            try:
                self._segment.upload(messages, TIMEOUT)
                return
            except RetryLater as error:
                if not passes(error) or attempt == ATTEMPTS - 1:
                    raise
                seconds = error.retry_after if isinstance(error, RateLimited) else 2**attempt
                self._say(f"{error}: again in {seconds} s")
                time.sleep(seconds)

    def _check_key(self) -> None:
        """Raise RetryLater if Segment rejects an event that has no fault, too: then it is the key."""
        try:
            self._upload([to_message(self._check)])
        except Rejected as error:
            raise RetryLater("every_event" if error.by_segment else "not_segment") from None
        self._key_is_good = True


def passes(error: RetryLater) -> bool:
    """Return whether another attempt may fare better: not at a refused key, a redirect, or what isn't Segment."""
    return isinstance(error, TransientError | RateLimited) or error.reason == "timeout"


if __name__ == "__main__":
    main(prog_name="python -m ops")
