"""The page in a real browser: open it, send a sample, see it appear. Skipped where there is no Chromium."""

import re
import shutil

import pytest
from conftest import make_event, until

BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not (BROWSER and DRIVER), reason="no chromium and chromedriver here"),
]


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
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
    yield driver
    driver.quit()


def text(browser, css):
    """Return the text of an element, or None while the page is being replaced."""
    from selenium.common.exceptions import WebDriverException

    try:
        return browser.find_element("css selector", css).text
    except WebDriverException:
        return None


def test_a_sample_is_sent_and_appears(browser, start):
    relay = start(DRY_RUN="1", SEGMENT_WRITE_KEY=None, CUSTOMERIO_SIGNING_KEY=None)
    browser.get(relay.url)
    assert browser.title == "Route to Segment"
    assert text(browser, "#address") == f"{relay.url}/webhook"
    assert text(browser, "#delivered") == "0"
    browser.find_element("css selector", "form button").click()
    until(lambda: text(browser, "#delivered") == "1" and text(browser, "details"))
    assert "customerio:email_delivered" in text(browser, "details")
    assert '"messageId"' in text(browser, "details")
    counted = relay.get("/metrics").text
    assert re.search(r'outcome="delivered"} 1\.0', counted)


def test_the_page_follows_along_by_itself(browser, start):
    relay = start(DRY_RUN="1")
    browser.get(relay.url)
    relay.post(make_event("from-outside"))
    until(lambda: "event-from-outside" in browser.page_source)
    assert text(browser, "#delivered") == "1"


def test_the_policy_blocks_nothing_that_the_page_needs(browser, start):
    relay = start(DRY_RUN="1")
    browser.get(relay.url)
    browser.get_log("browser")
    browser.find_element("css selector", "#copy").click()
    until(lambda: text(browser, "#copied"))
    assert [entry for entry in browser.get_log("browser") if "Content Security Policy" in entry["message"]] == []
    assert browser.execute_script("return getComputedStyle(document.querySelector('section')).borderRadius") == "12px"


@pytest.mark.parametrize("width", [360, 1200])
def test_nothing_sticks_out(browser, start, width):
    relay = start(DRY_RUN="1")
    assert relay.request("POST", "/sample").status_code == 303
    browser.set_window_size(width, 900)
    browser.get(relay.url)
    assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth")
