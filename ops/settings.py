"""The settings of a command, or what is wrong with them."""

import os
from collections.abc import Collection

import click

from config import Config, ConfigError
from server import preflight


def read(uses: Collection[str], *needs: str) -> Config:
    """Return the settings that a command uses, of which it needs these keys. The others may be wrong."""
    try:
        used = {name: value for name, value in os.environ.items() if name in uses}
        return Config.from_env(used, needs=needs, bundle_problem=preflight.bundle_problem)
    except ConfigError as error:
        raise click.ClickException(wrong(error)) from None


def wrong(error: ConfigError) -> str:
    """Return what a command says of settings with which the relay would not start."""
    return "The settings are wrong:" + error.listed
