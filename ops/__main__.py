"""The operator's commands: `python -m ops check | sample | replay | translate`."""

import os
from typing import BinaryIO

import click

from ops.check.command import check
from ops.envfile import variables
from ops.replay import replay, translate_file
from ops.sample import sample


@click.group()
@click.option(
    "--env-file",
    type=click.File("rb"),
    help="Settings, as in systemd's EnvironmentFile; the environment's own come first.",
)
def main(env_file: BinaryIO | None) -> None:
    """Check the settings, try the relay, and send dead letters again."""
    for name, value in read_settings(env_file).items() if env_file else ():
        os.environ.setdefault(name, value)  # and so HTTPS_PROXY and others count as they do for the service


def read_settings(file: BinaryIO) -> dict[str, str]:
    content = file.read()
    try:
        if b"\0" in content:
            raise ValueError
        return variables(content.decode())
    except ValueError:
        raise click.BadParameter(f"{file.name} is not a text in UTF-8.", param_hint="--env-file") from None


for command in (check, sample, replay, translate_file):
    main.add_command(command)


if __name__ == "__main__":
    main(prog_name="python -m ops")
