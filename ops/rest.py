"""The file for what a replay could not send, which is replaced once and whole, or not at all."""

import os
import stat
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import TextIO

import click


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
