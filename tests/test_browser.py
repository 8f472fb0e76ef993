"""The page in a real browser. Skipped where there is no Chromium."""

import json
import os
import re
import shutil
import signal
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import SIGNING_KEY, Relay, environment, make_event, sign, until

BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not (BROWSER and DRIVER), reason="no chromium and chromedriver here"),
]

JSON = {"Content-Type": "application/json"}
ROWS = "#webhooks > li"


class Page:
    """What a test does on the page, and sees there."""

    def __init__(self, driver):
        self.driver = driver

    def open(self, relay, rows=0):
        """Open the page, and wait until it shows that many webhooks."""
        self.driver.get(relay.url)
        try:
            until(lambda: self.count(ROWS) == rows)
        except AssertionError:
            listed, shown = relay.get("/webhooks").text, self.driver.page_source
            raise AssertionError(f"{self.errors()} {self.fetched()} {listed} {shown} {relay.log}") from None
        return self

    def run(self, script, *args):
        return self.driver.execute_script(script, *args)

    def find(self, css):
        return self.driver.find_element("css selector", css)

    def count(self, css):
        return self.run("return document.querySelectorAll(arguments[0]).length", css)

    def text(self, css):
        """Return the text of all such elements."""
        return self.run("return [...document.querySelectorAll(arguments[0])].map((e) => e.innerText)", css)

    def click(self, css):
        self.find(css).click()

    def open_row(self, number):
        """Open a webhook, counted from the newest, and wait for what is in it."""
        self.click(f"{ROWS}:nth-child({number}) summary")
        until(lambda: self.count(f"{ROWS}:nth-child({number}) pre"))

    def keys(self, *keys):
        self.driver.switch_to.active_element.send_keys(*keys)

    def focused(self):
        return self.run("return document.activeElement.id || document.activeElement.closest('li')?.innerText || ''")

    def clipboard(self):
        return self.driver.execute_async_script("navigator.clipboard.readText().then(arguments[0])")

    def fetched(self):
        """Return the paths that the page has fetched."""
        return self.run(
            "return performance.getEntriesByType('resource').map((e) => e.name.slice(location.origin.length))"
        )

    def emulate(self, **features):
        values = [{"name": name.replace("_", "-"), "value": value} for name, value in features.items()]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": values})

    def errors(self):
        return [entry["message"] for entry in self.driver.get_log("browser")]


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for switch in (
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        f"--user-data-dir={tmp_path_factory.mktemp('chromium')}",
    ):
        options.add_argument(switch)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=DRIVER))
    driver.execute_cdp_cmd(
        "Browser.grantPermissions", {"permissions": ["clipboardReadWrite", "clipboardSanitizedWrite"]}
    )
    yield driver
    driver.quit()


@pytest.fixture
def page(driver, start):  # the relays are stopped after the console was looked at
    """The browser; whatever a test does, nothing is on its console at the end."""
    driver.set_window_size(1280, 900)
    page = Page(driver)
    page.errors()
    yield page
    assert page.errors() == []
    driver.get("about:blank")


@pytest.fixture(scope="module")
def dry_relays():
    """Yield one relay after the other. Each starts while the test before it runs, and ends after its own."""

    def relays():
        coming = start()
        while True:
            with coming.result() as relay:
                coming = start()
                yield relay

    def start():
        started.append(pool.submit(Relay, environment(None, {"DRY_RUN": "force"})))
        return started[-1]

    started = []
    with ThreadPoolExecutor(1) as pool:
        yield relays()
        for relay in started:
            relay.result().kill()


@pytest.fixture
def dry(dry_relays):
    """A dry run that checks signatures."""
    return next(dry_relays)


def test_a_sample_is_chosen_edited_sent_and_seen(page, start):
    relay = start(DRY_RUN="1", SEGMENT_WRITE_KEY=None, CUSTOMERIO_SIGNING_KEY=None)
    page.open(relay)
    assert page.driver.title == "Route to Segment"
    assert page.text("#address") == [f"{relay.url}/webhook"]
    assert page.text("#dry_run") == ["0"]
    page.click("#compose")
    until(lambda: '"metric": "delivered"' in page.find("#body").get_property("value"))
    page.click('#sample option[value="sms_replied"]')
    until(lambda: '"metric": "replied"' in page.find("#body").get_property("value"))
    page.run(
        "const body = document.querySelector('#body');"
        'body.value = body.value.replace(`"customer_id": "relay-sample"`, `"customer_id": "77"`)'
    )
    page.click("#send")
    until(lambda: page.count(f"{ROWS} pre") == 2)
    assert "customerio:sms_replied" in page.focused()
    assert '"userId": "77"' in page.text(f"{ROWS} pre")[1]
    assert page.text("#said") == ["200 dry-run"]
    until(lambda: page.text("#dry_run") == ["1"])
    assert re.search(r'outcome="dry_run",reason=""} 1\.0', relay.get("/metrics").text)


def test_the_editor_opens_with_a_fresh_sample_after_one_was_sent_or_emptied(page, dry):
    from selenium.webdriver.common.keys import Keys

    page.open(dry).click("#compose")
    page.click('#sample option[value="sms_replied"]')
    until(lambda: '"metric": "replied"' in page.find("#body").get_property("value"))
    page.click("#send")
    until(lambda: page.count(f"{ROWS} pre") == 2)
    page.click("#compose")
    until(lambda: page.find("#body").get_property("value"))
    sent, fresh = page.text(f"{ROWS} pre")[0], json.loads(page.find("#body").get_property("value"))
    assert fresh["metric"] == "replied"
    assert fresh["event_id"] not in sent
    page.find("#body").send_keys(Keys.CONTROL + "a", Keys.DELETE)
    page.click("#cancel")
    page.click("#compose")
    until(lambda: '"metric": "delivered"' in page.find("#body").get_property("value"))


def test_samples_are_grouped_by_channel(page, dry):
    page.open(dry).click("#compose")
    labels = page.run("return [...document.querySelectorAll('#sample optgroup')].map((group) => group.label)")
    assert labels == ["Person", "Email", "Push", "SMS", "WhatsApp", "Slack", "Webhook", "In-app"]
    assert page.count("#sample optgroup option") == 73


def test_a_webhook_of_ones_own_is_pasted_and_kept_while_one_looks_at_samples(page, dry):
    page.open(dry).click("#compose")
    until(lambda: page.find("#body").get_property("value"))
    page.find("#body").clear()
    page.find("#body").send_keys("[1, 2")
    assert page.find("#sample").get_property("value") == ""
    assert page.text("#body-note") == ["This is not JSON. It is sent as it stands."]
    page.click('#sample option[value="push_sent"]')
    until(lambda: '"push"' in page.find("#body").get_property("value"))
    page.click('#sample option[value=""]')
    until(lambda: page.find("#body").get_property("value") == "[1, 2")
    page.click("#send")
    until(lambda: page.count(f"{ROWS} pre") == 1)
    assert page.text(".chip") == ["dead-lettered"]


def test_every_outcome_is_in_the_list(page, dry):
    dry.post(make_event(1))
    dry.post(make_event(2, metric=None))
    dry.post(make_event(3), headers={})
    dry.post(b"[]")
    page.open(dry, rows=4)
    assert page.text(".chip") == ["dead-lettered", "unauthorized", "dead-lettered", "dry run"]
    assert page.text("summary b") == ["(no name)", "email_opened", "(no name)", "customerio:email_opened"]
    assert page.text(".person") == ["(nobody)", "person-3", "person-2", "person-1"]
    assert page.text(".reason")[0] == "the body is not a JSON object"
    assert all(re.fullmatch(r"\d\d:\d\d:\d\d", words) for words in page.text("summary time"))


def test_a_dry_run_shows_webhooks_beside_their_calls(page, dry):
    dry.post(make_event(campaign="spring", data={"email_address": "ada@example.com"}))
    page.open(dry, rows=1).open_row(1)
    webhook, call = page.text("pre")
    assert json.loads(webhook)["data"] == {"email_address": "ada@example.com"}
    assert re.findall(r'^  "(\w+)"', call, re.MULTILINE)[:7] == [
        "event", "anonymousId", "timestamp", "properties", "context", "integrations", "messageId",
    ]  # fmt: skip
    assert page.text(".changes li") == [
        "The person has no id: to Segment they are anonymous, and anonymousId is the email address.",
        "Moved to context.customerio, because Segment gives the name a meaning of its own: campaign.",
    ]
    assert "Answered 200." in page.text(".answer")[0]
    left, right = (page.find(f".pair > :nth-child({side})").rect for side in (1, 2))
    assert left["y"] == right["y"]
    assert left["x"] < right["x"]


def test_either_is_copied_as_json_and_the_webhook_as_curl(page, dry):
    event = make_event()
    dry.post(event)
    page.open(dry, rows=1).open_row(1)
    curl, webhook, call = page.driver.find_elements("css selector", ".pair button")
    for button, copied in (
        (webhook, lambda text: json.loads(text) == event),
        (call, lambda text: json.loads(text)["userId"] == "person-1"),
        (curl, lambda text: text.startswith(f"curl {dry.url}/webhook ") and "X-CIO-Signature: " in text),
    ):
        page.driver.execute_async_script("navigator.clipboard.writeText('{}').then(arguments[0])")
        button.click()
        until(lambda: page.clipboard() != "{}")
        assert copied(page.clipboard())
    page.click("#copy")
    until(lambda: page.clipboard() == f"{dry.url}/webhook")
    assert page.text("#said") == ["Copied."]


def test_it_follows_along_by_itself(page, dry):
    page.open(dry)
    dry.post(make_event("from-outside"))
    until(lambda: page.text(".person") == ["person-from-outside"])
    until(lambda: page.text("#dry_run") == ["1"])
    assert page.find("#none").get_property("hidden")


def test_nothing_moves_while_somebody_reads(page, dry):
    for number in range(30):
        dry.post(make_event(number))
    page.open(dry, rows=30).open_row(20)
    select = """
        const text = document.querySelector("pre").lastChild;
        getSelection().setBaseAndExtent(text, 0, text, 2);
        scrollTo(0, 700);
        return document.querySelector("details[open]").getBoundingClientRect().top"""
    top = page.run(select)
    focused, selected = page.focused(), page.run("return getSelection().toString()")
    assert focused
    assert selected
    for number in range(3):
        dry.post(make_event(f"new-{number}"))
    until(lambda: page.text("#new") == ["3 new"])
    assert page.driver.title == "(3) Route to Segment"
    until(lambda: page.text("#dry_run") == ["33"])  # the rest of the page goes on
    assert page.count(ROWS) == 30
    assert page.run("return document.querySelector('details[open]').getBoundingClientRect().top") == top
    assert (page.focused(), page.run("return getSelection().toString()")) == (focused, selected)
    page.click("#new")
    assert page.count(ROWS) == 33
    assert page.count("details[open]") == 1
    assert page.count("pre") == 2
    assert page.text(".person")[:3] == ["person-new-2", "person-new-1", "person-new-0"]
    assert "person-new-2" in page.focused()
    assert page.driver.title == "Route to Segment"


def test_only_what_is_new_is_fetched(page, dry):
    dry.post(make_event(1))
    page.open(dry, rows=1).open_row(1)
    first = json.loads(dry.get("/webhooks").text)["webhooks"][0]["number"]
    dry.post(make_event(2))
    until(lambda: page.text("#new") == ["1 new"])
    until(lambda: f"/webhooks?after={first + 1}" in page.fetched())
    assert page.fetched().count("/webhooks?after=0") == 1
    assert page.fetched().count(f"/webhooks/{first}") == 1
    assert f"/webhooks/{first + 1}" not in page.fetched()


def test_the_list_ends_at_a_hundred_but_keeps_what_is_open(page, dry):
    for number in range(100):
        dry.post(make_event(number))
    page.open(dry, rows=100).open_row(100)
    dry.post(make_event("new"))
    until(lambda: page.text("#new") == ["1 new"])
    page.click("#new")
    until(lambda: page.count(ROWS) == 101)
    assert page.count("details[open]") == 1


def test_the_keyboard_does_everything(page, dry):
    from selenium.webdriver.common.keys import Keys

    for number in range(3):
        dry.post(make_event(number))
    page.open(dry, rows=3)
    for expected in ("copy", "compose", "person-2"):
        page.keys(Keys.TAB)
        assert expected in page.focused()
    page.keys(Keys.ARROW_DOWN)
    assert "person-1" in page.focused()
    page.keys(Keys.ENTER)
    until(lambda: page.count("pre") == 2)
    page.keys(Keys.ENTER)
    assert page.count("details[open]") == 0
    page.click("#compose")
    page.keys(Keys.ESCAPE)
    until(lambda: not page.find("#editor").get_property("open"))
    assert page.focused() == "compose"


NAMELESS = """
    return [...document.querySelectorAll("button, select, textarea, a, [role=img], [role=region], section, dialog")]
      .filter((element) => !element.hidden && !(element.innerText || element.ariaLabel || element.labels?.length ||
        element.hasAttribute("aria-label") || element.hasAttribute("aria-labelledby")))
      .map((element) => element.outerHTML)"""


def test_a_screen_reader_finds_a_name_for_everything(page, dry):
    dry.post(make_event())
    page.open(dry, rows=1).open_row(1)
    assert page.run(NAMELESS) == []
    assert page.run("return document.documentElement.lang") == "en"
    ids = page.run("return [...document.querySelectorAll('[id]')].map((element) => element.id)")
    assert len(ids) == len(set(ids))
    assert page.count("h1") == 1
    assert page.find("#said").get_attribute("role") == "status"


CONTRAST = """
    const luminance = (colour) => {
      const canvas = new OffscreenCanvas(1, 1).getContext("2d");
      for (const layer of colour) { canvas.fillStyle = layer; canvas.fillRect(0, 0, 1, 1); }
      const [r, g, b] = [...canvas.getImageData(0, 0, 1, 1).data].map((value) => {
        value /= 255;
        return value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4;
      });
      return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const behind = (element) => element ? [...behind(element.parentElement), getComputedStyle(element).backgroundColor] : [];
    return [...document.querySelectorAll("body *")].flatMap((element) => {
      if (!element.checkVisibility() || ![...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim())) return [];
      const [light, dark] = [luminance(behind(element)), luminance([...behind(element), getComputedStyle(element).color])].sort((a, b) => b - a);
      const ratio = (light + 0.05) / (dark + 0.05);
      return ratio < 4.5 ? [`${element.tagName}.${element.className} ${element.innerText}: ${ratio.toFixed(2)}`] : [];
    });"""  # noqa: E501


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_in_light_and_dark(page, dry, scheme):
    dry.post(make_event(1, campaign=1))
    for _ in range(5):  # a trouble
        dry.post(make_event(2, metric=None))
    dry.post(make_event(3), headers={})
    page.emulate(prefers_color_scheme=scheme)
    page.open(dry, rows=7).open_row(7)
    until(lambda: page.count("#troubles section"))
    paper = page.run("return getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", paper)[:3])) > 380) == (scheme == "light")
    assert page.run(CONTRAST) == []


@pytest.mark.parametrize("width", [360, 1200])
def test_nothing_sticks_out(page, dry, width):
    page.driver.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": True}
    )
    dry.post(make_event("x" * 300, metric="y" * 300, data={"customer_id": "z" * 300}))
    page.open(dry, rows=1).open_row(1)
    fits = "return document.documentElement.scrollWidth <= innerWidth"
    assert page.run(fits)
    page.click("#compose")
    assert page.run(fits)
    page.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


HOSTILE = "</pre></script><script>document.title='taken'</script><img src=x onerror=\"document.title='taken'\">"


def test_a_hostile_webhook_is_only_text(page, dry):
    dry.post(make_event(HOSTILE, metric=HOSTILE, data={"customer_id": HOSTILE, HOSTILE: HOSTILE}))
    dry.post(make_event(HOSTILE, object_type=HOSTILE), headers={})
    dry.post(HOSTILE.encode())
    page.open(dry, rows=3)
    for number in (1, 2, 3):
        page.open_row(number)
    assert page.count("img, script:not([src])") == 0
    assert HOSTILE in page.text("summary b")[2]
    assert page.text("pre")[0] == HOSTILE
    assert page.driver.title == "Route to Segment"


def test_a_webhook_is_cut_at_characters_that_javascript_counts_twice(page, dry):
    dry.post(make_event(data={"customer_id": "1", "content": "😀" * 40_000}))
    page.open(dry, rows=1).open_row(1)
    assert page.text(".cut")[0].startswith("Cut: these are the first 30,000 of 40,")


def test_what_the_relay_forgot_is_said(page, dry):
    for number in range(2):
        dry.post(make_event(number))
    page.open(dry, rows=2)
    page.run("document.querySelector('[data-number]').dataset.number = 1")
    page.click(f"{ROWS}:nth-child(1) summary")
    until(lambda: page.text("#said") == ["The relay no longer has it."])
    assert page.count("details[open]") == 0
    assert all("404" in message for message in page.errors())


def test_copying_works_where_the_browser_gives_no_clipboard(page, dry):
    page.open(dry)
    page.run("Object.defineProperty(navigator, 'clipboard', { value: undefined })")
    page.click("#copy")
    until(lambda: page.text("#said") == ["Copied."])
    assert page.focused() == "copy"
    page.open(dry)
    assert page.clipboard() == f"{dry.url}/webhook"


def test_a_deeply_nested_webhook_is_shown(page, dry):
    body = b'{"metric": "deep", "data": {"customer_id": "1", "x": ' + b"[" * 900 + b"]" * 900 + b"}}"
    assert dry.post(body).status_code == 202
    page.open(dry, rows=1).open_row(1)
    assert page.text("pre")[0] == body.decode()


def test_a_hundred_events_of_a_megabyte_open_at_once(page, dry):
    for number in range(100):
        dry.post(make_event(number, data={"customer_id": f"person-{number}", "content": "x" * 1_000_000}))
    page.open(dry, rows=100).open_row(1)
    until(lambda: page.count("pre") == 2)
    assert "Left out, because Segment takes 32 KB an event: content." in page.text(".changes li")
    assert page.text(".cut")[0].startswith("Cut: these are the first 30,000 of 1,000,")
    page.click(".cut button")
    until(lambda: page.text(".cut")[0].startswith("All 1,000,"))
    assert page.run("return document.querySelector('pre').textContent.length") > 1_000_000


def test_a_relay_that_restarts_is_said_and_followed_again(page, start):
    relay = start(DRY_RUN="force")
    relay.post(make_event("before"))
    page.open(relay, rows=1)
    relay.stop()
    until(lambda: page.find("#lost").is_displayed())
    relay.start()
    relay.post(make_event("after"))
    until(lambda: page.text(".person") == ["person-after", "person-before"])
    assert not page.find("#lost").is_displayed()
    assert all("ERR_CONNECTION_REFUSED" in message for message in page.errors())


def test_a_relay_that_hangs_is_said_and_followed_again(page, start):
    relay = start(DRY_RUN="force")
    page.open(relay)
    processes = [relay.process.pid, *relay.workers()]
    for pid in processes:
        os.kill(pid, signal.SIGSTOP)
    try:
        until(lambda: page.find("#lost").is_displayed())
    finally:
        for pid in processes:
            os.kill(pid, signal.SIGCONT)
    relay.post(make_event())
    until(lambda: page.count(ROWS) == 1)
    assert not page.find("#lost").is_displayed()


def test_a_live_relay_shows_no_webhooks_but_steps_and_troubles(page, start, segment):
    relay = start(segment)
    page.open(relay)
    assert page.count("#webhooks, #editor, #compose, #dry-run") == 0
    assert page.text("#steps li")
    assert page.text("#troubles section") == []
    body = json.dumps(make_event("secret")).encode()
    relay.post(body, sign(body, key=SIGNING_KEY + "?"))
    until(lambda: page.text("#troubles h2") == ["Webhooks are unauthorized: no configured key made this signature."])
    assert page.text("#said") == page.text("#troubles h2")
    relay.post(make_event("secret"))
    until(lambda: page.text("#troubles h2") == [])
    assert page.text("#delivered") == ["1"]
    assert page.text("#steps h2") == ["Live all 5 steps done"]
    assert "secret" not in page.driver.page_source
    until(lambda: page.text("#over li")[0].startswith("Unauthorized: no configured key made this signature (1, "))


def test_the_address_keeps_its_focus_and_selection_while_a_live_page_follows(page, start, segment):
    relay = start(segment)
    page.open(relay)
    page.run(
        "document.querySelector('#copy').focus(); getSelection().selectAllChildren(document.querySelector('#steps'))"
    )
    relay.post(make_event())
    until(lambda: page.text("#delivered") == ["1"])
    assert page.focused() == "copy"
    assert "Live" in page.run("return getSelection().toString()")
