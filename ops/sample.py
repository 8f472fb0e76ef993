"""The command `sample`: a signed webhook to a running relay."""

import json
import re
import sys
import time
from uuid import uuid4

import click
import requests

from ops import samples, settings
from relay import signature


@click.command()
@click.option("--url", help="The relay's address; by default the one on this machine.")
@click.option("--event", "name", default="email_delivered", show_default=True, help="Any documented event.")
@click.option("--yes", is_flag=True, help="Don't ask before a live relay sends it to Segment.")
def sample(url: str | None, name: str, yes: bool) -> None:
    """Send a signed sample webhook to a running relay, and print the answer.

    A live relay sends it to Segment, so the command asks first.
    """
    if name not in samples.EVENTS:
        raise click.BadParameter(f"not one of {', '.join(samples.EVENTS)}", param_hint="--event")
    config = settings.read(("CUSTOMERIO_SIGNING_KEY", "PORT"))
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
