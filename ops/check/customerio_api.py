"""Customer.io's App API: the reporting webhooks, and what each of them sends.

docs.customer.io/integrations/api/app/tag/reporting-webhooks/listwebhooks
"""

from collections.abc import Mapping
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from ops.check.ask import Api, NoAnswer
from ops.samples import EVENTS

TOKEN = "CUSTOMERIO_APP_API_KEY"  # noqa: S105 - its name
URL = "CUSTOMERIO_APP_API_URL"

US_API = "https://api.customer.io"
EU_API = "https://api-eu.customer.io"

REFUSALS = {
    401: f"Customer.io refuses {TOKEN} (401): it is wrong, revoked, or of the other region (--customerio-eu)",
    403: f"{TOKEN} lacks the permission to read reporting webhooks (403)",
    429: "Customer.io takes 10 questions a second, and had more (429): try again",
}

# The names in a webhook's settings differ from those in its events; these events can't be chosen.
SETTINGS_NAMES = {"customer_cio_subscription_preferences_changed": "customer_subscription_preferences_changed"}
NOT_CHOSEN = ("slack_undeliverable",)
SUBSCRIBABLE = {
    SETTINGS_NAMES.get(name, name): channel for name, (channel, _) in EVENTS.items() if name not in NOT_CHOSEN
}  # with the channel of each

PORTS = {"http": 80, "https": 443}


class Subscription(NamedTuple):
    """A reporting webhook, as Customer.io's settings have it."""

    name: str
    endpoint: str
    enabled: bool
    first_only: bool  # of the opens and clicks of a message
    with_content: bool
    events: list[str] | None  # None if the API doesn't say


def from_env(env: Mapping[str, str], in_eu: bool, seconds: float) -> Api | None:
    """Return the App API of that region, or None without a key. An answer has `seconds`."""
    token = env.get(TOKEN, "").strip()
    url = env.get(URL, "").strip().rstrip("/") or (EU_API if in_eu else US_API)
    return Api("Customer.io's App API", url, token, URL, TOKEN, REFUSALS, seconds) if token else None


def list_subscriptions(api: Api) -> list[Subscription]:
    """Return all reporting webhooks; raise NoAnswer."""
    answer = api.get("/v1/reporting_webhooks")
    if "reporting_webhooks" not in answer:
        raise NoAnswer("Customer.io's answer has no list of reporting_webhooks: its API has changed")
    found = answer["reporting_webhooks"]
    if not isinstance(found, list) or not all(map(_is_subscription, found)):
        raise api.odd_answer()
    return [
        Subscription(
            name=str(item.get("name") or item.get("id") or ""),
            endpoint=str(item.get("endpoint") or ""),
            enabled=not item.get("disabled"),
            first_only=item.get("full_resolution") is False,
            with_content=bool(item.get("with_content")),
            events=sorted(item["events"]) if "events" in item else None,
        )
        for item in found
    ]


def _is_subscription(item: Any) -> bool:
    return (
        isinstance(item, dict)
        and all(isinstance(item.get(flag), bool | None) for flag in ("disabled", "full_resolution", "with_content"))
        and isinstance(item.get("events", []), list)
        and all(isinstance(name, str) for name in item.get("events", []))
    )


def is_relay(subscription: Subscription, url: str | None) -> bool:
    """Return whether a webhook goes to the relay whose public address is `url`, or to any relay.

    A proxy may have the relay below that address.
    """
    goes_to = address(subscription.endpoint)
    if url is None or goes_to == target(url):
        return goes_to.endswith("/webhook")
    return goes_to.endswith("/webhook") and goes_to.startswith(address(url).rstrip("/") + "/")


def target(url: str) -> str:
    """Return the address of the webhooks of the relay at `url`."""
    return address(url).rstrip("/").removesuffix("/webhook") + "/webhook"


def address(endpoint: str) -> str:
    """Return an endpoint without what may be secret, before its host and behind its path; "" if it is invalid."""
    try:
        url = urlsplit(endpoint)
        host, port = url.hostname, url.port
    except ValueError:
        return ""
    if not host or url.scheme not in PORTS:
        return ""
    shown = f"[{host}]" if ":" in host else host
    return f"{url.scheme}://{shown}{'' if port in (None, PORTS[url.scheme]) else f':{port}'}{url.path}"


def origin(endpoint: str) -> str:
    """Return the scheme and host of an endpoint, since many services have a secret in the path; "" if it has none."""
    return "/".join(address(endpoint).split("/")[:3])


def events_off(subscription: Subscription) -> list[str] | None:
    """Return the documented events that could be on and are not, or None if that is unknown."""
    return None if subscription.events is None else [name for name in SUBSCRIBABLE if name not in subscription.events]
