"""Asks an HTTP API one question, or says in a sentence why there is no answer."""

import json
import re
from collections.abc import Callable, Mapping
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from threading import Thread
from typing import Any, TypeVar

import requests
from urllib3.exceptions import HTTPError, NameResolutionError, NewConnectionError

from config import in_clear_text, is_origin

# An OSError other than a RequestException is an unreadable REQUESTS_CA_BUNDLE; the others are odd addresses.
FAILURES = (OSError, HTTPError, UnicodeError)

T = TypeVar("T")


class NoAnswer(Exception):
    """The API could not be asked. `str()` says why, without a token in it."""


class NotNow(NoAnswer):
    """The API could not be asked now, but may be later."""


@dataclass(frozen=True)
class Api:
    """An API, and the settings that it is known by."""

    name: str
    url: str
    token: str = field(repr=False)
    url_setting: str
    token_setting: str
    refusals: Mapping[int, str]  # what a status means
    seconds: float  # for an answer

    @property
    def shown(self) -> str | None:
        """The address, unless there may be a password in it."""
        return self.url if is_origin(self.url) else None

    @property
    def in_clear_text(self) -> bool:
        return in_clear_text(self.url)

    def get(
        self, path: str, params: Mapping[str, str] | None = None, accept: str = "application/json"
    ) -> dict[str, Any]:
        """Return the JSON object at `path`; raise NoAnswer if there is none."""
        if not re.fullmatch(r"[!#-&(-~]+", self.token):
            raise NoAnswer(f"{self.token_setting} has a blank, a quote or a character that no token has: copy it again")
        if not is_origin(self.url):
            raise NoAnswer(f"{self.url_setting} is a URL without a path, like https://api.example.com")
        try:
            # Given as `auth`, so that a .netrc can't replace the token. A redirect would take it elsewhere.
            response = within(
                self.seconds,
                lambda: requests.get(
                    self.url + path,
                    params,
                    headers={"Accept": accept},
                    auth=self._authorize,
                    timeout=self.seconds,
                    allow_redirects=False,
                ),
            )
        except FAILURES as error:
            raise NotNow(f"{self.url} can't be reached: {why(error, self.seconds)}") from None
        if response.status_code != 200:
            passes = response.status_code == 429 or response.status_code >= 500
            raise (NotNow if passes else NoAnswer)(self._refusal(response))
        try:
            answer = json.loads(response.content)  # the bytes, since a text must have no byte order mark
            # Names are shown, and one may contain the token.
            answer = json.loads(json.dumps(answer).replace(json.dumps(self.token)[1:-1], "***"))
        except (ValueError, RecursionError):
            answer = None
        if not isinstance(answer, dict):
            raise self.odd_answer()
        return answer

    def odd_answer(self) -> NoAnswer:
        """Return the error for an answer that this API doesn't give."""
        return NoAnswer(f"what answers at {self.url} is not {self.name}: check {self.url_setting} and proxies")

    def _authorize(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        request.headers["Authorization"] = f"Bearer {self.token}"
        return request

    def _refusal(self, response: requests.Response) -> str:
        status, wait = response.status_code, response.headers.get("Retry-After", "")
        if response.is_redirect:
            return f"{self.url} redirects elsewhere ({status}): check {self.url_setting} and proxies"
        if status == 404:
            return f"{self.url} doesn't know the question (404): check {self.url_setting}"
        other = "try again later"
        if 400 <= status < 500:
            other = f"it doesn't accept the question. Update the relay, or check {self.url_setting}"
        words = self.refusals.get(status, f"{self.url} answered {status}: {other}")
        return f"{words} in {wait} s" if status == 429 and re.fullmatch("[0-9]{1,6}", wait) else words


def answered(question: Callable[[], T]) -> tuple[T | None, list[str]]:
    """Return what `question` returns, or None and a sentence on why there is no answer."""
    try:
        return question(), []
    except NoAnswer as error:
        return None, [f"{error}."]


def within(seconds: float, request: Callable[[], T]) -> T:
    """Return what `request` returns; raise requests.Timeout after `seconds`, however far it is.

    A socket's timeout restarts with each byte, and name resolution has none.
    """
    outcome: Future[T] = Future()

    def run() -> None:
        try:
            outcome.set_result(request())
        except BaseException as error:  # noqa: BLE001 - raised below
            outcome.set_exception(error)

    Thread(target=run, daemon=True).start()
    if not wait([outcome], seconds).done:
        raise requests.Timeout
    return outcome.result()


def look(url: str, seconds: float) -> str:
    """Say why nothing answers at `url` within `seconds`; "" if something does."""

    def request() -> None:
        requests.get(url, auth=lambda request: request, timeout=seconds, allow_redirects=False, stream=True).close()

    try:
        within(seconds, request)
    except FAILURES as error:
        return why(error, seconds)
    return ""


def why(error: Exception, seconds: float) -> str:
    """Say why a request of `requests` failed, which had these seconds."""
    reason = getattr(error.args[0] if error.args else None, "reason", None)
    match error:
        case requests.exceptions.ProxyError():
            return "the proxy (HTTPS_PROXY) doesn't answer, or refuses"
        case requests.exceptions.SSLError():
            return f"TLS is refused ({_tls_problem(reason)}): check REQUESTS_CA_BUNDLE and proxies"
        case requests.Timeout():
            return f"there is no answer within {seconds:g} s"
        case requests.ConnectionError() if isinstance(reason, NameResolutionError):
            return "its name has no address: check the spelling, and DNS"
        case requests.ConnectionError() if isinstance(reason, NewConnectionError):
            refused = isinstance(reason.__cause__, ConnectionRefusedError)
            return "the port is refused, nothing listens there" if refused else "there is no way to its network"
        case requests.ConnectionError() | requests.exceptions.ChunkedEncodingError():
            return "the connection broke off"
        case requests.RequestException() | HTTPError() | UnicodeError():
            return "the address is malformed, or what answers is not HTTP"
    return "the certificates that REQUESTS_CA_BUNDLE or CURL_CA_BUNDLE names can't be read"


def _tls_problem(reason: object) -> str:
    problem = next(iter(getattr(reason, "args", ())), None)
    return (
        str(getattr(problem, "verify_message", "") or getattr(problem, "reason", "") or "no reason given")
        .replace("_", " ")
        .lower()
    )
