"""Reads a file of settings as systemd reads an EnvironmentFile. Pure."""

import re

# systemd.exec(5), EnvironmentFile=: quotes may surround a value, and a backslash takes the next character as it is.
ASSIGNMENT = re.compile(r"\s*([A-Za-z_][A-Za-z0-9_]*)\s*=\s*(.*?)\s*", re.DOTALL)


def variables(text: str) -> dict[str, str]:
    """Return the variables that `text` sets. Lines that set none, and comments (# or ;), are passed over."""
    found = {}
    for line in re.sub(r"\\\n", "", text).split("\n"):
        assignment = ASSIGNMENT.fullmatch(line)
        if assignment and not line.lstrip().startswith(("#", ";")):
            found[assignment[1]] = _value(assignment[2])
    return found


def _value(text: str) -> str:
    if len(text) > 1 and text[0] == text[-1] == "'":
        return text[1:-1]
    if len(text) > 1 and text[0] == text[-1] == '"':
        return re.sub(r'\\(["\\$`])', r"\1", text[1:-1])
    return re.sub(r"\\(.)", r"\1", text)
