"""Sends the event of a check to Segment, as the relay sends a webhook's."""

from typing import Any

import requests

from config import Config
from ops.check import ask
from ops.check.part import Part
from ops.timing import Timing
from relay.message import to_message
from relay.outcomes import Rejected, RetryLater
from relay.segment import SegmentClient


def send_event(config: Config, call: dict[str, Any], timing: Timing) -> Part:
    """Send the event, unless in a dry run."""
    event = {"name": call["event"], "sent": not config.dry_run, "taken": False, "milliseconds": None}
    if config.dry_run:
        return Part(event)
    segment = SegmentClient(config.segment_write_key, config.segment_host, config.proxy, config.ca_bundle)
    messages = [to_message(call)]
    started = timing.now()
    try:
        # upload() itself ends whatever takes too long, but only the relay, where gevent runs, can end a look-up.
        ask.within(timing.upload, lambda: segment.upload(messages, timing.upload))
    except requests.Timeout:
        problem = f"Segment did not answer in time ({timing.upload} s)"
    except (RetryLater, Rejected) as error:
        problem = f"{error}{more(error, config, timing)}"
    else:
        return Part(event | {"taken": True, "milliseconds": round((timing.now() - started) * 1000)})
    return Part(event, wrong=[f"{config.segment_host} did not take the event: {problem}."])


def more(error: RetryLater | Rejected, config: Config, timing: Timing) -> str:
    """Return what an upload's error doesn't say."""
    if isinstance(error, Rejected) and not error.by_segment:
        return ". The event has no fault, so what answered is not Segment: check SEGMENT_HOST and proxies"
    if isinstance(error, Rejected):
        return (
            ". The event has no fault, so the write key has: it is far too short. Copy SEGMENT_WRITE_KEY again from "
            "Segment: your source > Settings > API Keys"
        )
    if error.reason == "timeout":
        return f" ({timing.upload} s)"
    if error.reason == "connection":
        return f": {ask.look(config.segment_host, timing.answer) or 'but something answers there, so try again'}"
    return ""
