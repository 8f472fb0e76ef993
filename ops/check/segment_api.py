"""Segment's Public API: which source has a write key, and what Segment received and dropped after its 200.

github.com/segmentio/public-api-sdk-python: docs/SourcesApi.md and docs/DeliveryOverviewApi.md.
"""

from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from config import EU_HOST
from ops.check.ask import Api, NoAnswer

TOKEN = "SEGMENT_PUBLIC_API_TOKEN"  # noqa: S105 - its name
URL = "SEGMENT_PUBLIC_API_URL"

US_API = "https://api.segmentapis.com"
EU_API = "https://eu1.api.segmentapis.com"

V1 = "application/vnd.segment.v1+json"
BETA = "application/vnd.segment.v1beta+json"
A_PAGE = "200"
PAGES = 100

RECEIVED = "successfully-received"
DROPPED = "failed-on-ingest"

REFUSALS = {
    401: f"Segment refuses {TOKEN} (401): it is wrong, revoked, or of a workspace in another region",
    403: (
        f"{TOKEN} lacks a permission (403): sources need Source Admin, and Delivery Overview a Team or Business plan"
    ),
    422: "Segment doesn't understand the question (422): its API has changed",
    429: "Segment is limiting the rate of questions (429): try again",
}

ANOTHER = "Of page and screen calls, which the relay doesn't send: another program uses the write key."
NOT_OURS = "The relay sends no such call: another program uses the write key, or the relay has a bug. Please report it."

# Segment's Delivery Overview, "Failed on Ingest", and what each reason means here.
MEANINGS = {
    "project_not_found": "Segment doesn't know the write key: set SEGMENT_WRITE_KEY again.",
    "unknown_source": "Segment doesn't know the write key: set SEGMENT_WRITE_KEY again.",
    "source_disabled": "The source is switched off: enable it in Segment.",
    "locked_workspace": "Segment has locked the workspace: ask its support.",
    "too_many_requests": "More events than the workspace may send: ask Segment to raise the limit.",
    "multi_user_error": "Some events of an upload had a fault, the others were kept. The relay should have found them.",
    "name_not_string": ANOTHER,
    "category_not_string": ANOTHER,
} | dict.fromkeys(
    (
        "empty_batch empty_batch_result no_user_anon_id id_required id_not_string event_not_defined event_not_string "
        "properties_not_object traits_not_object invalid_type missing_type bad_request"
    ).split(),
    NOT_OURS,
)


class Source(NamedTuple):
    id: str
    name: str
    enabled: bool


class Row(NamedTuple):
    """How many events of one name or reason there were, and the minutes of those that have one."""

    name: str
    total: int
    minutes: tuple[tuple[datetime, int], ...]

    @property
    def last(self) -> datetime | None:
        """The minute of the last one."""
        return max((minute for minute, count in self.minutes if count), default=None)


def from_env(env: Mapping[str, str], segment_host: str, seconds: float) -> Api | None:
    """Return the API of the region that `segment_host` is in, or None without a token. An answer has `seconds`."""
    token = env.get(TOKEN, "").strip()
    in_eu = (urlsplit(segment_host).hostname or "").rstrip(".") in {urlsplit(url).hostname for url in (EU_HOST, EU_API)}
    url = env.get(URL, "").strip().rstrip("/") or (EU_API if in_eu else US_API)
    return Api("Segment's Public API", url, token, URL, TOKEN, REFUSALS, seconds) if token else None


def find_source(api: Api, write_key: str) -> Source | None:
    """Return the source that has `write_key`, or None if no source has it.

    Raise NoAnswer if that can't be known, for example because the token may not read all keys.
    """
    sources = keyless = 0
    for data in _pages(api, "/sources", {}, V1):
        for source in _objects(data, "sources"):
            sources += 1
            keys = source.get("writeKeys")
            keys = keys if isinstance(keys, list) else []
            keyless += not keys
            if write_key in keys:
                name = source.get("name") or source.get("slug") or source.get("id")
                return Source(str(source.get("id")), str(name), source.get("enabled") is not False)
    if keyless:
        raise NoAnswer(
            f"{TOKEN} may not read the write keys of {keyless} of {sources} sources: it lacks the Source Admin "
            "permission. No other source has SEGMENT_WRITE_KEY"
        )
    return None


def overview(
    api: Api, kind: str, source: str, since: datetime, until: datetime, group_by: str | None = None
) -> list[Row]:
    """Return what was RECEIVED or DROPPED between two times at most four hours apart, the most frequent first."""
    params = {
        "sourceId": source,
        "startTime": _iso(since),
        "endTime": _iso(until),
        "granularity": "MINUTE",
    }
    if group_by:
        params["groupBy.0"] = group_by
    found: dict[str, Row] = {}
    for data in _pages(api, f"/delivery-overview/{kind}", params, BETA):
        for row in _objects(data, "dataset"):
            name = str(row.get(group_by or "") or "")
            series = _series(api, row.get("series", []))
            total = row.get("total", sum(count for _, count in series) if series else None)
            _, before, minutes = found.get(name, Row(name, 0, ()))
            found[name] = Row(
                name,
                before + _count(api, total),
                minutes + tuple((minute, count) for minute, count in series if minute),
            )
    return sorted((row for row in found.values() if row.total), key=lambda row: (-row.total, row.name))


def meaning(reason: str) -> str:
    """Say what a discard reason of Segment's means for this relay."""
    if reason.startswith("consent_"):
        return NOT_OURS
    return MEANINGS.get(reason.lower(), "See this source's Delivery Overview in Segment.")


def _pages(api: Api, path: str, params: dict[str, str], accept: str) -> Iterator[Any]:
    """Yield the `data` of each page."""
    seen: set[str] = set()
    cursor = ""
    while cursor not in seen:
        if len(seen) == PAGES:
            raise NoAnswer(f"{api.url} has more than {PAGES} pages of {path.rpartition('/')[2]}")
        seen.add(cursor)
        page = {"pagination.count": A_PAGE} | ({"pagination.cursor": cursor} if cursor else {})
        answer = api.get(path, params | page, accept)
        data = answer.get("data")
        yield data
        cursor = _next(api, data) or _next(api, answer)  # documented inside `data`, seen beside it


def _next(api: Api, holder: Any) -> str:
    """Return the cursor of the next page, or "" if there is none."""
    pagination = (holder.get("pagination") if isinstance(holder, dict) else None) or {}
    if not isinstance(pagination, dict) or not isinstance(pagination.get("next"), str | None):
        raise api.odd_answer()
    return pagination.get("next") or ""


def _objects(data: Any, name: str) -> list[dict[str, Any]]:
    """Return the objects under `name` in `data`, or `data` itself if it is that list."""
    found = data.get(name) if isinstance(data, dict) else data
    if not isinstance(found, list) or not all(isinstance(item, dict) for item in found):
        raise NoAnswer(f"Segment's answer has no list of {name}: its API has changed")
    return found


def _series(api: Api, series: Any) -> list[tuple[datetime | None, int]]:
    """Return the minutes of a row, each with its count."""
    if not isinstance(series, list) or not all(isinstance(point, dict) for point in series):
        raise api.odd_answer()
    return [(_time(point.get("time")), _count(api, point.get("count"))) for point in series]


def _count(api: Api, value: Any) -> int:
    """Return a number of events, which JSON may also write as 3.0."""
    if type(value) not in (int, float) or not 0 <= value < 1e15 or value % 1:
        raise api.odd_answer()
    return int(value)


def _time(text: Any) -> datetime | None:
    """Return an ISO 8601 time, of UTC if it names no zone, or None if it isn't one."""
    try:
        time = datetime.fromisoformat(text)
        return (time if time.tzinfo else time.replace(tzinfo=UTC)).astimezone(UTC)
    except (TypeError, ValueError, OverflowError):
        return None


def _iso(time: datetime) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ")
