"""translate.py: what changes in the event, and what then changes in the call, and in the message made of it."""

import json
from datetime import UTC, datetime
from pathlib import Path

import pytest

from relay.message import MAX_EVENT_BYTES, scrub, to_message
from translate import NAMES, NO_ECHO, NotAnObject, Undeliverable, namespace, parse, translate

EVENTS = Path(__file__).parent / "events"
CATALOGUE = json.loads((EVENTS / "catalogue.json").read_text())
RECEIVED = datetime(2026, 11, 23, 12, 0, tzinfo=UTC)

LEGACY = json.loads((EVENTS / "legacy.json").read_text())
OPENED = json.loads((EVENTS / "email_opened.json").read_text())
SLACK = json.loads((EVENTS / "slack_clicked.json").read_text())


def call(event, **settings):
    return translate(event, received=RECEIVED, **settings)


def message(event, **settings):
    return json.loads(to_message(call(event, **settings)).json)


def about(**data):
    return OPENED | {"data": data}


def test_the_documented_example():
    assert call(LEGACY) == {
        "user_id": "568",
        "anonymous_id": None,
        "event": "customerio:email_delivered",
        "properties": LEGACY["data"],
        "context": {
            "event_id": "9420f522-b127-4a74-8b90-bace0edc27ab",
            "integration": {"name": "Customer.io"},
            "traits": {"email": "customer@example.com"},
        },
        "timestamp": datetime(2015, 1, 26, 16, 33, 52, tzinfo=UTC),
        "integrations": NO_ECHO,
        "message_id": "customerio--9420f522-b127-4a74-8b90-bace0edc27ab",
    }


def test_the_documented_example_as_segment_gets_it():
    sent = message(LEGACY)
    assert sent["userId"] == "568"
    assert sent["type"] == "track"
    assert sent["properties"] == LEGACY["data"]
    assert sent["timestamp"] == "2015-01-26T16:33:52.000+00:00"


# Today's form and its place in the call. ---------------------------------------------------------


def test_a_slack_channel_is_nobodys_email_address():
    assert call(SLACK) == {
        "user_id": None,
        "anonymous_id": "d9c106000002",
        "event": "customerio:slack_clicked",
        "properties": SLACK["data"],
        "context": {
            "event_id": "01E4C4HDQ7P1X9GWKJ3S0F2ABC",
            "object_type": "slack",
            "metric": "clicked",
            "trigger_event_id": "01E4C4G1S04QCV1NASF4NWMQNR",
            "integration": {"name": "Customer.io"},
        },
        "timestamp": datetime(2020, 3, 26, 19, 17, 15, tzinfo=UTC),
        "integrations": NO_ECHO,
        "message_id": "customerio--01E4C4HDQ7P1X9GWKJ3S0F2ABC",
    }


# Every documented event: its name with EVENT_NAMES=customerio, and with segment.
DOCUMENTED = {
    "email_drafted": "Email Drafted",
    "email_attempted": "Email Attempted",
    "email_sent": "Email Sent",
    "email_delivered": "Email Delivered",
    "email_opened": "Email Opened",
    "email_clicked": "Email Link Clicked",
    "email_converted": "Email Converted",
    "email_unsubscribed": "Email Unsubscribed",
    "email_bounced": "Email Bounced",
    "email_dropped": "Email Suppressed",
    "email_spammed": "Email Marked as Spam",
    "email_failed": "Email Failed",
    "email_undeliverable": "Email Undeliverable",
    "push_drafted": "Push Drafted",
    "push_attempted": "Push Attempted",
    "push_sent": "Push Sent",
    "push_delivered": "Push Delivered",
    "push_opened": "Push Opened",
    "push_clicked": "Push Link Clicked",
    "push_converted": "Push Converted",
    "push_bounced": "Push Bounced",
    "push_dropped": "Push Suppressed",
    "push_failed": "Push Failed",
    "push_undeliverable": "Push Undeliverable",
    "sms_drafted": "SMS Drafted",
    "sms_attempted": "SMS Attempted",
    "sms_sent": "SMS Sent",
    "sms_delivered": "SMS Delivered",
    "sms_clicked": "SMS Link Clicked",
    "sms_converted": "SMS Converted",
    "sms_bounced": "SMS Bounced",
    "sms_failed": "SMS Failed",
    "sms_undeliverable": "SMS Undeliverable",
    "sms_replied": "SMS Replied",
    "whatsapp_drafted": "WhatsApp Drafted",
    "whatsapp_attempted": "WhatsApp Attempted",
    "whatsapp_sent": "WhatsApp Sent",
    "whatsapp_delivered": "WhatsApp Delivered",
    "whatsapp_opened": "WhatsApp Opened",
    "whatsapp_clicked": "WhatsApp Link Clicked",
    "whatsapp_converted": "WhatsApp Converted",
    "whatsapp_bounced": "WhatsApp Bounced",
    "whatsapp_dropped": "WhatsApp Suppressed",
    "whatsapp_failed": "WhatsApp Failed",
    "whatsapp_undeliverable": "WhatsApp Undeliverable",
    "whatsapp_replied": "WhatsApp Replied",
    "slack_drafted": "Slack Drafted",
    "slack_attempted": "Slack Attempted",
    "slack_sent": "Slack Sent",
    "slack_clicked": "Slack Link Clicked",
    "slack_failed": "Slack Failed",
    "slack_undeliverable": "Slack Undeliverable",
    "webhook_drafted": "Webhook Drafted",
    "webhook_attempted": "Webhook Attempted",
    "webhook_sent": "Webhook Sent",
    "webhook_clicked": "Webhook Link Clicked",
    "webhook_failed": "Webhook Failed",
    "webhook_undeliverable": "Webhook Undeliverable",
    "in_app_drafted": "In-App Drafted",
    "in_app_attempted": "In-App Attempted",
    "in_app_sent": "In-App Sent",
    "in_app_opened": "In-App Opened",
    "in_app_clicked": "In-App Clicked",
    "in_app_converted": "In-App Converted",
    "in_app_failed": "In-App Failed",
    "in_app_undeliverable": "In-App Undeliverable",
    "customer_subscribed": "Subscribed",
    "customer_unsubscribed": "Unsubscribed",
    "customer_cio_subscription_preferences_changed": "Subscription Preferences Changed",
    "email_deferred": "Email Deferred",
    "sms_dropped": "SMS Suppressed",
    "slack_converted": "Slack Converted",
    "webhook_converted": "Webhook Converted",
}
# All that Customer.io's own source "Journeys Message Metrics" sends.
JOURNEYS = {
    "Email": "Drafted, Attempted, Sent, Delivered, Opened, Link Clicked, Converted, Unsubscribed, Bounced, Suppressed, "
    "Marked as Spam, Failed",
    "Push": "Drafted, Attempted, Sent, Delivered, Opened, Link Clicked, Converted, Bounced, Suppressed, Failed",
    "SMS": "Drafted, Attempted, Sent, Delivered, Link Clicked, Converted, Bounced, Failed",
    "In-App": "Drafted, Attempted, Sent, Opened, Clicked, Converted, Failed",
    "Webhook": "Drafted, Attempted, Sent, Link Clicked, Converted, Failed",
    "Slack": "Drafted, Attempted, Sent, Link Clicked, Failed",
    "": "Subscribed, Unsubscribed, Subscription Preferences Changed",
}


def test_the_table_of_names_has_every_documented_event_and_every_name_of_customerios_source():
    assert DOCUMENTED.keys() == CATALOGUE.keys()
    theirs = {f"{channel} {name}".strip() for channel, names in JOURNEYS.items() for name in names.split(", ")}
    assert (len(theirs), theirs - set(DOCUMENTED.values())) == (51, set())
    assert len(set(DOCUMENTED.values())) == len(DOCUMENTED) == 73


def todays_form(name):
    object_type, metric = CATALOGUE[name]
    return OPENED | {"object_type": object_type, "metric": metric}


def legacy_form(name):
    return LEGACY | {"event_type": name}


@pytest.mark.parametrize("form", [todays_form, legacy_form])
@pytest.mark.parametrize(("name", "segment"), DOCUMENTED.items(), ids=DOCUMENTED.keys())
def test_every_documented_event_has_its_name_and_all_else_is_the_same(form, name, segment):
    calls = [call(form(name), names=names, namespace="k") for names in NAMES]
    assert [call.pop("event") for call in calls] == [f"customerio:{name}", f"customerio:{segment}"]
    assert calls[0] == calls[1]
    assert call(form(name), names="segment", prefix="")["event"] == segment


PERSON = {"customer_id": "1", "email_address": "ada@example.org"}
SEGMENT_NAMES = {  # the form of an event -> its name with EVENT_NAMES=segment, by the rule
    "an email's unsubscription": (
        {"object_type": "email", "metric": "unsubscribed", "data": PERSON | {"delivery_id": "d"}},
        "Email Unsubscribed",
    ),
    "a number as delivery_id": (
        {"object_type": "Email", "metric": "unsubscribed", "data": PERSON | {"delivery_id": 7}},
        "Email Unsubscribed",
    ),
    "a person's, by email": ({"object_type": "email", "metric": "unsubscribed", "data": PERSON}, "Unsubscribed"),
    "a null delivery_id": (
        {"object_type": "email", "metric": "unsubscribed", "data": PERSON | {"delivery_id": None}},
        "Unsubscribed",
    ),
    "a blank delivery_id": (
        {"object_type": "email", "metric": "unsubscribed", "data": PERSON | {"delivery_id": " "}},
        "Unsubscribed",
    ),
    "by push": (
        {"object_type": "push", "metric": "unsubscribed", "data": PERSON | {"delivery_id": "d"}},
        "Unsubscribed",
    ),
    "subscribed by email": (
        {"object_type": "email", "metric": "subscribed", "data": PERSON | {"delivery_id": "d"}},
        "Subscribed",
    ),
    "by an unknown channel": ({"object_type": "line", "metric": "subscribed"}, "Subscribed"),
    "without a channel": ({"metric": "subscribed"}, "Subscribed"),
    "preferences, by SMS": (
        {"object_type": "sms", "metric": "cio_subscription_preferences_changed"},
        "Subscription Preferences Changed",
    ),
    "preferences, with the misspelt key": (
        {"object_type_type": "customer", "metric": "cio_subscription_preferences_changed"},
        "Subscription Preferences Changed",
    ),
    "preferences, as settings call them": (
        {"object_type": "customer", "metric": "subscription_preferences_changed"},
        "Subscription Preferences Changed",
    ),
    "an unknown metric": ({"object_type": "sms", "metric": "snoozed"}, "SMS Snoozed"),
    "of two words": ({"object_type": "in_app", "metric": "half_read"}, "In-App Half Read"),
    "an unknown channel": ({"object_type": "live_notification", "metric": "opened"}, "Live Notification Opened"),
    "its clicks": ({"object_type": "line", "metric": "clicked"}, "Line Link Clicked"),
    "its drops": ({"object_type": "inbox", "metric": "dropped"}, "Inbox Suppressed"),
    "in-app drops": ({"object_type": "in_app", "metric": "dropped"}, "In-App Suppressed"),
    "something new of a person": ({"object_type": "customer", "metric": "merged"}, "Customer Merged"),
    "a null channel": ({"object_type": None, "metric": "opened"}, "Opened"),
    "an empty channel": ({"object_type": "", "metric": "clicked"}, "Link Clicked"),
    "capitals and blanks": ({"object_type": " In App", "metric": "CLICKED "}, "In-App Clicked"),
    "blanks in an unknown one": (
        {"object_type": "live  notification", "metric": "_opened"},
        "Live Notification Opened",
    ),
    "letters of another script": ({"object_type": "line", "metric": "開封"}, "Line 開封"),
    "an accent": ({"object_type": "email", "metric": "öffnung_éteinte"}, "Email Öffnung Éteinte"),
    "digits and signs": ({"object_type": "email", "metric": "2nd_open-ing's"}, "Email 2nd Open-ing's"),
    "nothing but a dash": ({"object_type": "_", "metric": "_"}, "___"),
    "a dash as metric": ({"object_type": "email", "metric": "_"}, "Email"),
    "legacy: in-app": ({"event_type": "in_app_clicked"}, "In-App Clicked"),
    "legacy: capitals": ({"event_type": "Email_Clicked"}, "Email Link Clicked"),
    "legacy: an email's unsubscription": ({"event_type": "email_unsubscribed", "data": PERSON}, "Email Unsubscribed"),
    "legacy: a person's": ({"event_type": "customer_unsubscribed"}, "Unsubscribed"),
    "legacy: a person's, by push": ({"event_type": "push_subscribed"}, "Subscribed"),
    "legacy: preferences": (
        {"event_type": "customer_cio_subscription_preferences_changed"},
        "Subscription Preferences Changed",
    ),
    "legacy: preferences by an unknown channel": (
        {"event_type": "live_notification_cio_subscription_preferences_changed"},
        "Subscription Preferences Changed",
    ),
    "legacy: preferences alone": (
        {"event_type": "cio_subscription_preferences_changed"},
        "Subscription Preferences Changed",
    ),
    "legacy: an unknown channel": ({"event_type": "live_notification_clicked"}, "Live Notification Link Clicked"),
    "legacy: an unknown metric": ({"event_type": "email_half_read"}, "Email Half Read"),
    "legacy: one word": ({"event_type": "subscribed"}, "Subscribed"),
    "legacy: an unknown word": ({"event_type": "snoozed"}, "Snoozed"),
    "legacy: a channel alone": ({"event_type": "email"}, "Email"),
    "legacy: with a dash": ({"event_type": "email_"}, "Email"),
}


@pytest.mark.parametrize(("form", "name"), SEGMENT_NAMES.values(), ids=SEGMENT_NAMES.keys())
def test_segment_name(form, name):
    event = {"event_id": "1", "timestamp": 1, "data": {"customer_id": "1"}} | form
    theirs, ours = call(event, names="segment", prefix=""), call(event, prefix="")
    assert theirs.pop("event") == name
    assert ours.pop("event") != ""
    assert theirs == ours


def test_what_is_left_out_changes_no_name():
    event = OPENED | {"metric": "unsubscribed"}
    assert call(event, names="segment", prefix="", omit={"delivery_id"})["event"] == "Email Unsubscribed"


CUSTOMERIO_NAMES = {  # what changes in the event -> its name with EVENT_NAMES=customerio
    "object_type and metric": ({}, "email_opened"),
    "event_type": ({"object_type": None, "metric": None, "event_type": "email_opened"}, "email_opened"),
    "event_type comes first": ({"event_type": "customer_subscribed"}, "customer_subscribed"),
    "a blank event_type is ignored": ({"event_type": " "}, "email_opened"),
    "an event_type that isn't a string is ignored": ({"event_type": 7}, "email_opened"),
    "a metric added after this was written": ({"metric": "snoozed"}, "email_snoozed"),
    "a channel added after this was written": ({"object_type": "line"}, "line_opened"),
    "no object_type": ({"object_type": None}, "opened"),
    "an empty object_type": ({"object_type": ""}, "opened"),
    "another script": ({"metric": "開封"}, "email_開封"),
}


@pytest.mark.parametrize(("change", "name"), CUSTOMERIO_NAMES.values(), ids=CUSTOMERIO_NAMES.keys())
def test_name(change, name):
    assert call(OPENED | change, prefix="cio ")["event"] == "cio " + name


def test_the_preferences_event_with_the_misspelt_key_of_the_documentation():
    event = {key: value for key, value in OPENED.items() if key != "object_type"}
    event |= {"metric": "cio_subscription_preferences_changed", "object_type_type": "customer"}
    assert call(event)["event"] == "customerio:cio_subscription_preferences_changed"
    assert call(event)["context"]["object_type_type"] == "customer"


NAMELESS = {
    "nothing at all": {"metric": None, "object_type": None},
    "a channel alone": {"metric": None},
    "an empty metric": {"metric": ""},
    "a blank metric": {"metric": " "},
    "a number": {"metric": 5},
    "a list": {"metric": ["opened"]},
    "a channel that is a number": {"object_type": 5},
    "a channel that is an object": {"object_type": {}},
}


@pytest.mark.parametrize("change", NAMELESS.values(), ids=NAMELESS.keys())
def test_without_a_name_it_is_undeliverable(change):
    with pytest.raises(Undeliverable, match="it has no name"):
        call(OPENED | change)


# Who. --------------------------------------------------------------------------------------------

EMAIL = "ada@example.org"
WHO = {  # data -> userId, anonymousId, email
    "customer_id": ({"customer_id": "568"}, "568", None, None),
    "leading zeros": ({"customer_id": "0200102"}, "0200102", None, None),
    "an integer": ({"customer_id": 568}, "568", None, None),
    "zero": ({"customer_id": 0}, "0", None, None),
    "spaces are kept": ({"customer_id": " 5 "}, " 5 ", None, None),
    "customer_id before identifiers": ({"customer_id": "1", "identifiers": {"id": "2"}}, "1", None, None),
    "identifiers.id": ({"identifiers": {"id": "568"}}, "568", None, None),
    "a deleted person's blank id": ({"customer_id": "", "identifiers": {"id": "568"}}, "568", None, None),
    "a blank id of spaces": ({"customer_id": "  ", "identifiers": {"id": "568"}}, "568", None, None),
    "null": ({"customer_id": None, "identifiers": {"id": 568}}, "568", None, None),
    "a boolean isn't an id": ({"customer_id": True, "identifiers": {"id": "568"}}, "568", None, None),
    "a fraction isn't an id": ({"customer_id": 5.5, "identifiers": {"id": "568"}}, "568", None, None),
    "an object isn't an id": ({"customer_id": {"id": 1}, "identifiers": {"id": "568"}}, "568", None, None),
    "id and email": ({"customer_id": "1", "identifiers": {"email": EMAIL}}, "1", None, EMAIL),
    "identifiers.email": ({"identifiers": {"id": None, "email": EMAIL, "cio_id": "d9"}}, None, EMAIL, EMAIL),
    "email_address": ({"email_address": EMAIL, "identifiers": {"cio_id": "d9"}}, None, EMAIL, EMAIL),
    "identifiers.email first": ({"email_address": "b@b.b", "identifiers": {"email": EMAIL}}, None, EMAIL, EMAIL),
    "recipient of an email": ({"recipient": EMAIL, "identifiers": {"cio_id": "d9"}}, None, EMAIL, EMAIL),
    "name and address": ({"email_address": f"Ada L. <{EMAIL}>"}, None, EMAIL, EMAIL),
    "with capitals": ({"email_address": "Ada <Ada@Example.org>"}, None, "Ada@Example.org", "Ada@Example.org"),
    "the first of a list": ({"recipient": f"Ada L. <{EMAIL}>, b@b.b"}, None, EMAIL, EMAIL),
    "of bare addresses": ({"recipient": f"{EMAIL},b@b.b"}, None, EMAIL, EMAIL),
    "with semicolons": ({"recipient": f" {EMAIL} ; B <b@b.b>"}, None, EMAIL, EMAIL),
    "a bare one, then a name": ({"recipient": f"{EMAIL}, B <b@b.b>"}, None, EMAIL, EMAIL),
    "a comma in a name": ({"recipient": f'"Lovelace, Ada" <{EMAIL}>, b@b.b'}, None, EMAIL, EMAIL),
    "an address as a name": ({"recipient": f'"b@b.b, B" <{EMAIL}>, c@c.c'}, None, EMAIL, EMAIL),
    "a comma in a name without quotes": ({"recipient": f"Lovelace, Ada <{EMAIL}>"}, None, EMAIL, EMAIL),
    "half a quote": ({"recipient": f'Ada "L <{EMAIL}>'}, None, EMAIL, EMAIL),
    "a comment after it": ({"recipient": f"{EMAIL} (Ada, c@c.c), b@b.b"}, None, EMAIL, EMAIL),
    "a comment before it": ({"recipient": f"(Ada; c@c.c) {EMAIL}"}, None, EMAIL, EMAIL),
    "a comment beside a name": ({"recipient": f"Ada <{EMAIL}> (work), b@b.b"}, None, EMAIL, EMAIL),
    "brackets in a name": ({"recipient": f'"Ada <b@b.b>" <{EMAIL}>'}, None, EMAIL, EMAIL),
    "blanks in brackets": ({"recipient": f"Ada < {EMAIL} >, b@b.b"}, None, EMAIL, EMAIL),
    "a quoted name without brackets": ({"recipient": f'"Ada" {EMAIL}, b@b.b'}, None, EMAIL, EMAIL),
    "a group": ({"recipient": f"Friends: {EMAIL}, B <b@b.b>;"}, None, EMAIL, EMAIL),
    "a group of one": ({"recipient": f"Friends:{EMAIL};"}, None, EMAIL, EMAIL),
    "an empty group before it": ({"recipient": f"undisclosed-recipients:;, {EMAIL}"}, None, EMAIL, EMAIL),
    "an address as the name of none": ({"recipient": f'"b@b.b" <nobody>, {EMAIL}'}, None, EMAIL, EMAIL),
    "a quote before the @": ({"recipient": '"Ada L"@c.d'}, None, '"Ada L"@c.d', None),
    "of a list, with an id": ({"customer_id": "1", "recipient": f"{EMAIL}, b@b.b"}, "1", None, EMAIL),
    "a list that begins with none": ({"recipient": '"a,b"@c.d, b@b.b'}, None, '"a,b"@c.d, b@b.b', None),
    "a list of none": ({"recipient": "Ada, Bob"}, None, "Ada, Bob", None),
    "an address within a text": ({"recipient": f"to {EMAIL} and others"}, None, f"to {EMAIL} and others", None),
    "a name, and no address": ({"email_address": "Ada <ada>"}, None, "ada", None),
    "cio_id": ({"identifiers": {"id": "", "email": None, "cio_id": "d9c1"}}, None, "d9c1", None),
    "an invalid email address": ({"identifiers": {"email": "not an address"}}, None, "not an address", None),
    "identifiers that aren't an object": ({"identifiers": ["x"], "customer_id": "1"}, "1", None, None),
}


@pytest.mark.parametrize(("data", "user_id", "anonymous_id", "email"), WHO.values(), ids=WHO.keys())
def test_who(data, user_id, anonymous_id, email):
    result = call(about(**data))
    assert (result["user_id"], result["anonymous_id"]) == (user_id, anonymous_id)
    assert result["context"].get("traits") == ({"email": email} if email else None)


NO_ADDRESS = {
    "a Slack channel": ("slack", "#signups"),
    "a phone number": ("sms", "+15551234567"),
    "a URL": ("webhook", "https://user@example.org/hook"),
    "an in-app message's id": ("in_app", "568"),
    "even an address, where it is not an email's": ("in_app", EMAIL),
    "a URL in an email": ("email", "https://user@example.org/hook"),
}


@pytest.mark.parametrize(("channel", "recipient"), NO_ADDRESS.values(), ids=NO_ADDRESS.keys())
def test_recipient_that_is_not_an_email_address(channel, recipient):
    event = about(customer_id="1", recipient=recipient) | {"object_type": channel}
    assert "traits" not in call(event)["context"]


@pytest.mark.parametrize(
    "data",
    [
        {},
        {"customer_id": ""},
        {"identifiers": {}},
        {"identifiers": {"id": None, "cio_id": ""}},
        {"email_address": None},
    ],
    ids=str,
)
def test_about_nobody_it_is_undeliverable(data):
    with pytest.raises(Undeliverable, match="it names nobody"):
        call(about(**data))


@pytest.mark.parametrize("data", [None, [], "568", 568, True], ids=repr)
def test_without_an_object_of_data_it_names_nobody(data):
    with pytest.raises(Undeliverable, match="it names nobody"):
        call(OPENED | {"data": data})


# Which events are about an email, so that their recipient is an address.
ABOUT_EMAIL = {
    "by object_type": ({"object_type": "email", "metric": "opened"}, True),
    "in capitals": ({"object_type": "Email", "metric": "opened"}, True),
    "in the legacy form, by the name": ({"event_type": "email_opened"}, True),
    "a channel that begins so": ({"object_type": "email_digest", "metric": "opened"}, False),
    "a metric that begins so": ({"metric": "email_opened"}, False),
    "a legacy name that begins otherwise": ({"event_type": "customer_subscribed", "object_type": "email"}, False),
}


@pytest.mark.parametrize(("form", "is_about"), ABOUT_EMAIL.values(), ids=ABOUT_EMAIL.keys())
def test_about_an_email_the_recipient_is_the_person(form, is_about):
    event = {"event_id": "1", "timestamp": 1, "data": {"recipient": EMAIL, "identifiers": {"cio_id": "d9"}}}
    assert call(event | form)["anonymous_id"] == (EMAIL if is_about else "d9")


@pytest.mark.parametrize(
    "text", ['"' * 2**20, "a@" * 2**20, "<" * 2**20, 'a",' * 2**20, '\\"' * 2**20, "@<," * 2**20, "(@" * 2**20]
)
def test_an_address_of_megabytes_is_read_in_one_go(text):
    """Were the time quadratic, this would take hours."""
    assert call(about(recipient=text))["anonymous_id"]


def test_a_phone_number_is_nobody():
    with pytest.raises(Undeliverable):
        call(about(recipient="+15551234567") | {"object_type": "sms"})


# When. -------------------------------------------------------------------------------------------

WHEN = {
    "seconds": (1422290032, "2015-01-26T16:33:52.000+00:00"),
    "milliseconds": (1422290032123, "2015-01-26T16:33:52.123+00:00"),
    "a fraction": (1422290032.5, "2015-01-26T16:33:52.500+00:00"),
    "a fraction that binary has not": (1422290032.123, "2015-01-26T16:33:52.123+00:00"),
    "a string": ("1422290032", "2015-01-26T16:33:52.000+00:00"),
    "a string of milliseconds": ("1422290032123", "2015-01-26T16:33:52.123+00:00"),
    "a string with a fraction": ("1422290032.25", "2015-01-26T16:33:52.250+00:00"),
    "a string with an exponent": ("1.422290032e9", "2015-01-26T16:33:52.000+00:00"),
    "zero": (0, "1970-01-01T00:00:00.000+00:00"),
}
ODD_WHEN = {
    "text": "abc",
    "ISO 8601": "2015-01-26T16:33:52Z",
    "an empty string": "",
    "digits of another script": "١٤٢٢٢٩٠٠٣٢",
    "null": None,
    "a boolean": True,
    "a list": [1422290032],
    "before 1970": -5,
    "after the year 9999": 10**18,
    "beyond floats": 10**400,
    "infinite": float("inf"),
    "not a number": float("nan"),
    "infinite in a string": "1e999",
}


@pytest.mark.parametrize(("timestamp", "iso"), WHEN.values(), ids=WHEN.keys())
def test_when(timestamp, iso):
    result = message(OPENED | {"timestamp": timestamp})
    assert result["timestamp"] == iso
    assert "timestamp" not in result["context"]


@pytest.mark.parametrize("timestamp", ODD_WHEN.values(), ids=ODD_WHEN.keys())
def test_an_odd_timestamp_is_the_time_of_receipt_and_is_kept(timestamp):
    result = call(OPENED | {"timestamp": timestamp})
    assert result["timestamp"] == RECEIVED
    assert repr(result["context"]["timestamp"]) == repr(timestamp)


def test_no_timestamp_is_the_time_of_receipt():
    result = call({key: value for key, value in OPENED.items() if key != "timestamp"})
    assert result["timestamp"] == RECEIVED
    assert "timestamp" not in result["context"]


# The messageId. ----------------------------------------------------------------------------------


def message_id(event_id, key="one", **changes):
    event = OPENED | {"event_id": event_id} | changes
    return call(event, namespace=namespace(key))["message_id"]


@pytest.mark.parametrize(
    "event_id", ["01E4C4CT6YDC7Y5M7FE1GWWPQJ", "x" * 500, "é" * 90, "\ud800", 7, None, "", " ", ["list"], {}], ids=repr
)
def test_message_id_is_the_same_for_the_same_event_and_fits(event_id):
    assert message_id(event_id) == message_id(event_id)
    assert 1 <= len(message_id(event_id)) <= 100
    assert message_id(event_id) != message_id(event_id, key="two")


def test_message_ids_of_different_events_differ():
    ids = ["a", "b", "a" * 65, "a" * 66, "a:b", "id:a", "é", "e", 1, "2", None]
    assert len({message_id(event_id) for event_id in ids}) == len(ids)


def test_message_id_without_event_id_is_of_the_whole_event():
    assert message_id(None) == message_id(None)
    assert message_id(None) != message_id(None, metric="clicked")


def test_message_id_without_event_id_survives_another_spelling_of_the_same_json():
    event = {key: value for key, value in OPENED.items() if key != "event_id"}
    turned = dict(reversed(event.items()))
    assert call(event)["message_id"] == call(parse(json.dumps(turned, indent=3).encode()))["message_id"]


def test_a_message_id_does_not_disclose_the_key():
    assert "secret" not in message_id("1", key="secret")
    assert len(namespace("secret")) == 8


# Context, properties, integrations. --------------------------------------------------------------


def test_unknown_keys_of_the_envelope_are_kept_in_context():
    result = call(OPENED | {"trigger_event_id": "01E", "new": {"a": [1]}})
    assert result["context"]["trigger_event_id"] == "01E"
    assert result["context"]["new"] == {"a": [1]}


KEPT = {  # the form of an event -> what of it is in context
    "today's": ({"object_type": "in_app", "metric": "clicked"}, {"object_type": "in_app", "metric": "clicked"}),
    "as they came": ({"object_type": " In_App", "metric": "CLICKED"}, {"object_type": " In_App", "metric": "CLICKED"}),
    "no channel": ({"metric": "clicked"}, {"metric": "clicked"}),
    "an empty channel": ({"object_type": "", "metric": "clicked"}, {"object_type": "", "metric": "clicked"}),
    "the legacy one": ({"event_type": "in_app_clicked"}, {}),
    "both": ({"event_type": "a_b", "object_type": {}, "metric": 5}, {"object_type": {}, "metric": 5}),
    "a name that isn't a string": ({"event_type": 7, "metric": "clicked"}, {"event_type": 7, "metric": "clicked"}),
}


@pytest.mark.parametrize(("form", "kept"), KEPT.values(), ids=KEPT.keys())
def test_channel_and_metric_are_kept_in_context(form, kept):
    """A name can't be split safely: in_app_clicked."""
    context = call({"event_id": "1", "timestamp": 1, "data": {"customer_id": "1"}} | form)["context"]
    assert context == {"event_id": "1", "integration": {"name": "Customer.io"}} | kept


def test_keys_that_mean_something_to_segment_are_kept_apart():
    result = call(OPENED | {"traits": {"plan": "x"}, "ip": "192.0.2.1", "library": 1})
    assert result["context"]["traits"] == {"email": "ada@example.org"}
    assert result["context"]["customerio"] == {"traits": {"plan": "x"}, "ip": "192.0.2.1", "library": 1}


RESERVED = {  # as Segment's "Spec: Common Fields" names them, and two that its libraries give a meaning
    "active": True,
    "app": {"name": "x"},
    "campaign": {"name": "spring"},
    "channel": "server",
    "consent": {"categoryPreferences": {"ads": False}},
    "device": {"id": "x"},
    "direct": True,
    "externalIds": [{"id": "x", "type": "ga_client_id"}],
    "groupId": "g",
    "instanceId": "i",
    "integration": "x",
    "integrations": {"All": False},
    "ip": "192.0.2.1",
    "library": {"name": "x"},
    "locale": "de-DE",
    "location": {"country": "DE"},
    "network": {"wifi": True},
    "omitted_properties": ["x"],
    "os": {"name": "x"},
    "page": {"url": "https://example.org"},
    "referrer": {"id": "x"},
    "screen": {"width": 1},
    "timezone": "Europe/Berlin",
    "traits": {"plan": "x"},
    "userAgent": "x",
    "userAgentData": {"mobile": False},
    "customerio": {"x": 1},
}


@pytest.mark.parametrize(("name", "value"), RESERVED.items(), ids=RESERVED.keys())
def test_a_name_that_segment_gives_a_meaning_moves_under_customerio(name, value):
    result = call(OPENED | {name: value})
    usual = call(OPENED)
    assert result["context"].pop("customerio") == {name: value}
    assert result == usual


def test_echo():
    assert call(OPENED, echo=True)["integrations"] == {}


def test_omitted_properties_never_leave_in_any_form():
    event = about(customer_id="1", email_address="ada@example.org", recipient="ada@example.org", subject="s", x=1)
    result = message(event, omit=frozenset({"email_address", "recipient", "subject"}))
    assert result["properties"] == {"customer_id": "1", "x": 1}
    assert "ada@example.org" not in json.dumps(result)


DEVICES = [{"device_id": "x", "device_platform": "ios"}, {"device_id": "y"}, "z", [{"device_id": 1, "a": 2}]]
OMITTED = {  # the names -> data before and after
    "a name": ("subject", {"subject": "s", "a": 1}, {"a": 1}),
    "in an object": ("identifiers.email", {"identifiers": {"id": "1", "email": EMAIL}}, {"identifiers": {"id": "1"}}),
    "the last in an object": ("a.b", {"a": {"b": 1}}, {"a": {}}),
    "in each object of a list": (
        "recipients.device_id",
        {"recipients": DEVICES},
        {"recipients": [{"device_platform": "ios"}, {}, "z", [{"a": 2}]]},
    ),
    "three deep": ("a.b.c", {"a": {"b": [{"c": 1, "d": 2}]}, "b": {"c": 3}}, {"a": {"b": [{"d": 2}]}, "b": {"c": 3}}),
    "a dot in the name counts first": ("a.b", {"a.b": 1, "a": {"b": 2}}, {"a": {"b": 2}}),
    "also in an object": ("a.b.c", {"a": {"b.c": 1, "b": {"c": 2}}}, {"a": {"b": {"c": 2}}}),
    "also of the outer name": ("a.b.c", {"a.b": {"c": 1}, "a": {"b": {"c": 2}}}, {"a.b": {}, "a": {"b": {"c": 2}}}),
    "a dot in a name that has no such property": (
        "a.b.c",
        {"a.b": 1, "a": {"b": {"c": 2}}},
        {"a.b": 1, "a": {"b": {}}},
    ),
    "an object and what is in it": ("a,a.b", {"a": {"b": 1}, "c": 2}, {"c": 2}),
    "what isn't there": ("a.b,x.y,z", {"a": {"c": 1}, "x": "y"}, {"a": {"c": 1}, "x": "y"}),
    "no object": ("a.b", {"a": None, "b": 1}, {"a": None, "b": 1}),
    "not deeper than it says": ("b", {"a": {"b": 1}}, {"a": {"b": 1}}),
    "a string isn't a list": ("a.0", {"a": "xyz"}, {"a": "xyz"}),
}


@pytest.mark.parametrize(("names", "before", "after"), OMITTED.values(), ids=OMITTED.keys())
def test_omit(names, before, after):
    event = about(customer_id="1", **before)
    was = json.dumps(event)
    result = call(event, omit=frozenset(names.split(",")))
    assert result["properties"] == {"customer_id": "1"} | after
    assert json.dumps(event) == was
    assert result | {"properties": 0} == call(event) | {"properties": 0} | {"context": result["context"]}


# The recipe of the README.
NO_ADDRESS_AT_ALL = frozenset({"identifiers.email", "email_address", "recipient"})
WITHOUT_ADDRESS = {  # data -> who it is then
    "an id": ({"customer_id": "7", "identifiers": {"id": "7", "email": EMAIL, "cio_id": "d9"}}, ("7", None)),
    "no id": ({"identifiers": {"id": None, "email": EMAIL, "cio_id": "d9"}}, (None, "d9")),
    "an address twice": ({"email_address": EMAIL, "identifiers": {"email": EMAIL, "cio_id": "d9"}}, (None, "d9")),
}


@pytest.mark.parametrize(("data", "who"), WITHOUT_ADDRESS.values(), ids=WITHOUT_ADDRESS.keys())
def test_without_the_address_a_person_is_known_by_id_or_cio_id(data, who):
    result = message(about(recipient=EMAIL, **data), omit=NO_ADDRESS_AT_ALL)
    assert (result["userId"], result["anonymousId"]) == who
    assert EMAIL not in json.dumps(result)


def test_without_the_address_and_without_another_id_it_names_nobody():
    with pytest.raises(Undeliverable, match="it names nobody"):
        call(about(recipient=EMAIL, identifiers={"email": EMAIL}), omit=NO_ADDRESS_AT_ALL)


@pytest.mark.parametrize("levels", [100, 990, 5_000])
def test_omit_in_what_is_nested_deeply(levels):
    value = 1
    for _ in range(levels):
        value = [value]
    event = about(customer_id="1", a=value)
    if levels > 100:
        with pytest.raises(Undeliverable, match="nested too deeply"):
            message(event, omit=frozenset({"a.b"}))
    else:
        assert message(event, omit=frozenset({"a.b"}))["properties"]["a"] == value


def test_translate_leaves_the_event_as_it_was():
    before = json.dumps(OPENED)
    message(OPENED, omit=frozenset({"subject", "identifiers.email"}))
    assert json.dumps(OPENED) == before


# Strict JSON, and nesting. -----------------------------------------------------------------------


def test_what_json_cannot_hold_becomes_null_or_a_replacement():
    event = parse(
        b'{"metric": "m", "event_id": "1", "x\\udc00": NaN, "data": {"customer_id": "1", "big": 1e999,'
        b' "neg": -Infinity, "half": "a\\ud83d", "whole": "\\ud83d\\ude00", "list": [NaN, {"\\ud800": 1}]}}'
    )
    sent = message(event)
    assert sent["properties"] == {
        "customer_id": "1",
        "big": None,
        "neg": None,
        "half": "a�",
        "whole": "😀",
        "list": [None, {"�": 1}],
    }
    assert sent["context"]["x�"] is None
    json.dumps(sent, allow_nan=False, ensure_ascii=False).encode("utf-8")


def test_scrub_keeps_what_is_sound():
    sound = {"a": [1, 2.5, True, None, "é😀", "\ufeffx"], "b": {}}
    assert scrub(sound) == sound


def nested(levels):
    value = 1
    for _ in range(levels):
        value = {"a": value}
    return value


def test_nesting_that_the_client_can_serialise_is_delivered():
    assert message(about(customer_id="1", deep=nested(100)))["properties"]["deep"] == nested(100)


@pytest.mark.parametrize("levels", [990, 5_000, 200_000])
@pytest.mark.parametrize("event_id", ["", '"event_id": "1", '], ids=["without event_id", "with event_id"])
def test_nesting_that_the_client_cannot_serialise_is_undeliverable(levels, event_id):
    body = f'{{"metric": "m", {event_id}"data": {{"customer_id": "1", "x": {"[" * levels}{"]" * levels}}}}}'
    with pytest.raises(Undeliverable, match="nested too deeply"):
        message(parse(body.encode()))


NOT_OBJECTS = {
    "nothing": b"",
    "a blank": b" ",
    "text": b"hello",
    "half an object": b'{"metric": ',
    "an array": b"[{}]",
    "an array nested beyond reading": b"[" * 200_000,
    "a string": b'"x"',
    "null": b"null",
    "a form": b"metric=opened",
    "two objects": b"{} {}",
    "bytes": bytes(range(256)),
}


@pytest.mark.parametrize("body", NOT_OBJECTS.values(), ids=NOT_OBJECTS.keys())
def test_not_an_object(body):
    with pytest.raises(NotAnObject):
        parse(body)


OBJECTS = {
    "spaces around": b' \n{"a": 1}\n',
    "a byte order mark": b'\xef\xbb\xbf{"a": 1}',
    "bytes that are not UTF-8": b'{"a": "caf\xe9"}',
    "an integer of ten thousand digits": b'{"a": ' + b"1" * 10_000 + b"}",
}


@pytest.mark.parametrize("body", OBJECTS.values(), ids=OBJECTS.keys())
def test_an_object(body):
    assert list(parse(body)) == ["a"]


def test_integers_stay_integers_beside_a_giant_one():
    event = parse(b'{"metric": "m", "timestamp": 1, "x": ' + b"1" * 10_000 + b', "data": {"customer_id": 568}}')
    assert message(event)["userId"] == "568"
    assert message(event)["context"]["x"] is None


# Size. -------------------------------------------------------------------------------------------


def size(sent):
    return len(json.dumps(sent))


def padded(length):
    return message(about(customer_id="1", pad="x" * length))


def test_an_event_of_exactly_the_limit_is_sent_whole():
    room = MAX_EVENT_BYTES - size(padded(0))
    assert size(padded(room)) == MAX_EVENT_BYTES
    assert padded(room)["properties"]["pad"]
    assert "pad" not in padded(room + 1)["properties"]
    assert padded(room + 1)["context"]["omitted_properties"] == ["pad"]


IDENTIFYING = {
    "customer_id": "1",
    "identifiers": {"id": "1"},
    "delivery_id": "d",
    "campaign_id": 3,
    "recipient": "a@b.c",
}
LARGE = {
    "the body of an email": ({"content": "x" * 100_000, "subject": "s"}, {"subject": "s"}, ["content"]),
    "attributes of a person": ({"variables": {"a": ["x" * 40_000]}, "subject": "s"}, {"subject": "s"}, ["variables"]),
    "bulk goes before what is larger": ({"content": "x" * 20_000, "a": "y" * 25_000}, {"a": "y" * 25_000}, ["content"]),
    "the largest goes first": (
        {"a": "x" * 5_000, "b": "x" * 30_000, "c": "x" * 4_000},
        {"a": "x" * 5_000, "c": "x" * 4_000},
        ["b"],
    ),
    "as many as it takes": (
        dict.fromkeys("abcde", "x" * 10000),
        dict.fromkeys("cde", "x" * 10000),
        ["a", "b"],
    ),
    "between the client's limit and ours": ({"a": "x" * 31_600}, {}, ["a"]),
    "emoji count escaped": ({"a": "😀" * 2_800}, {}, ["a"]),
}


@pytest.mark.parametrize(("data", "kept", "omitted"), LARGE.values(), ids=LARGE.keys())
def test_a_large_event_is_sent_without_its_bulk(data, kept, omitted):
    sent = message(about(**IDENTIFYING | data))
    assert size(sent) <= MAX_EVENT_BYTES
    assert sent["properties"] == IDENTIFYING | kept
    assert sent["context"]["omitted_properties"] == omitted
    assert sent["context"]["event_id"] == OPENED["event_id"]


def test_a_large_envelope_is_cut_too():
    sent = message(about(customer_id="1") | {"novel": "x" * 50_000})
    assert size(sent) <= MAX_EVENT_BYTES
    assert sent["context"]["omitted_properties"] == ["context.novel"]


def test_what_identifies_goes_only_where_it_cannot_be_what_it_says():
    sent = message(about(customer_id="1", recipient="x" * 50_000, subject="s"))
    assert sent["properties"] == {"customer_id": "1"}
    assert sent["context"]["omitted_properties"] == ["subject", "recipient"]


def test_the_list_of_what_was_left_out_has_a_bound():
    sent = message(about(customer_id="1") | {"data": {"customer_id": "1"} | {f"{n}" * 30: "😀" for n in range(20_000)}})
    assert size(sent) <= MAX_EVENT_BYTES
    names = sent["context"]["omitted_properties"]
    assert len(names) == 41
    assert all(len(name) <= 60 for name in names)
    left_out = 20_001 - len(sent["properties"])
    assert names[-1] == f"and {left_out - 40} more"


CANNOT_FIT = {
    "an id of 40 KB": about(customer_id="x" * 40_000),
    "an address of 40 KB": about(identifiers={"email": "x" * 40_000}),
    "a name of 40 KB": about(customer_id="1") | {"metric": "x" * 40_000},
}


@pytest.mark.parametrize("event", CANNOT_FIT.values(), ids=CANNOT_FIT.keys())
def test_what_cannot_be_made_to_fit_is_undeliverable(event):
    with pytest.raises(Undeliverable, match="fit"):
        message(event)


DESTINATIONS = ["Customer.io", "Actions Customerio", "Customer.io Actions", "Customer.io (Actions)"]


@pytest.mark.parametrize("name", DESTINATIONS)
def test_no_event_goes_back_to_customerio_whatever_segment_calls_it(name):
    assert call(OPENED)["integrations"][name] is False
