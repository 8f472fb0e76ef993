r"""Reads a file of settings as systemd reads an EnvironmentFile. Pure.

The rules of systemd.exec(5), and of src/basic/env-file.c where that says more:

- A value is any number of quoted parts, then perhaps a plain one, which goes on to the end of its line.
- A backslash takes the next character as it is. In double quotes it does so only before one of "\`$.
- A backslash at the end of a line joins the next one to it, but not in single quotes. Up to systemd 253 it does so in
  a comment, too.
- A quoted part may have line breaks in it. Without an end it goes on to the end of the file.
"""

import re

ENTRY = re.compile(
    r"""
    [#;](?:\\.|[^\\\r\n])*+                     # a comment
  | (?P<name>[^\ \t\r\n\#;][^=\r\n]*+)
    (?: =[\ \t]*+
        (?P<quoted>(?: (?: '[^']*+(?:'|\Z) | "(?:\\.|[^\\"])*+(?:"|\\?\Z) ) [\ \t]*+ )*+)
        (?P<plain>(?:\\.|[^\\\r\n])*+\\?)
    )?+
    """,
    re.VERBOSE | re.DOTALL,
)
NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
QUOTED = re.compile(r"""'(?P<single>[^']*+)(?:'|\Z)|"(?P<double>(?:\\.|[^\\"])*+)(?:"|\\?\Z)""", re.DOTALL)
PLAIN = re.compile(r"((?:\\.|[^\\])*?)(?:[ \t]*|\\)\Z", re.DOTALL)  # but for the blanks, or the backslash, at its end


def variables(text: str) -> dict[str, str]:
    """Return the variables that `text` sets. Lines that set none, and comments (# or ;), are passed over."""
    found = {}
    for entry in ENTRY.finditer(text):
        name = (entry["name"] or "").rstrip(" \t")
        if entry["plain"] is not None and NAME.fullmatch(name):
            found[name] = "".join(map(_quoted, QUOTED.finditer(entry["quoted"]))) + _plain(entry["plain"])
    return found


def _quoted(part: re.Match[str]) -> str:
    if part["single"] is not None:
        return part["single"]
    return re.sub(r'\\(?:\n|(["\\$`]))', r"\1", part["double"])


def _plain(part: str) -> str:
    return re.sub(r"\\(?:[\r\n]|(.))", r"\1", PLAIN.sub(r"\1", part, count=1), flags=re.DOTALL)
