"""Which proxy leads to Segment: what the environment says, as requests reads it. Pure."""

import ipaddress
import re
from base64 import b64encode
from collections.abc import Mapping
from contextlib import suppress
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

HOSTNAME = re.compile(r"[\w.-]+|[0-9a-f:.]+", re.ASCII)


class Proxy(NamedTuple):
    host: str
    port: int
    authorization: str  # the value of a Proxy-Authorization header, or ""


def variable_for(url: str, env: Mapping[str, str]) -> str | None:
    """Return the name of the variable whose proxy leads to `url`, or None if the way is direct."""
    parts = urlsplit(url)
    if _is_direct(parts.hostname or "", parts.port, env.get("no_proxy") or env.get("NO_PROXY") or ""):
        return None
    for kind in (parts.scheme, "all"):
        lower = f"{kind}_proxy"  # it wins, and switches the others off if it is blank
        names = [lower] if lower in env else [name for name in env if name.lower() == lower]
        for name in names:
            if env[name].strip():
                return name
    return None


def _is_direct(host: str, port: int | None, no_proxy: str) -> bool:
    names = no_proxy.lower().replace(" ", "").split(",")
    if names == ["*"]:
        return True
    with suppress(ValueError):
        address = ipaddress.IPv4Address(host)
        port = None
        if any(address in network for network in filter(None, map(_network, names))):
            return True
    hosts = (f".{host}", f".{host}:{port}") if port else (f".{host}",)
    return any(one.endswith("." + name.lstrip(".")) for one in hosts for name in names if name.lstrip("."))


def _network(name: str) -> ipaddress.IPv4Network | None:
    with suppress(ValueError):
        return ipaddress.IPv4Network(name, strict=False) if "/" in name else None
    return None


def parse(value: str) -> Proxy:
    """Return the proxy at this address; raise ValueError if it isn't one that is reached by plain HTTP."""
    value = value.strip()
    parts = urlsplit(value if "://" in value else f"http://{value}")
    host = parts.hostname or ""
    if parts.scheme != "http" or not HOSTNAME.fullmatch(host) or parts.port == 0:
        raise ValueError("not an http:// address")
    authorization = ""
    if parts.username or parts.password:
        login = f"{unquote(parts.username or '')}:{unquote(parts.password or '')}"
        authorization = "Basic " + b64encode(login.encode("latin-1")).decode()
    return Proxy(host, parts.port or 80, authorization)
