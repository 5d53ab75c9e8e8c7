"""The page at / in a real browser: a document is dropped, read, asked about, saved, loaded.

QWEN1M_SCREENSHOTS=DIR keeps what it looked like.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from lib.browser import Browser, find_browser
from lib.server import wait_for
from qwen1m_ext.haystack import make_sample

pytestmark = pytest.mark.skipif(find_browser() is None, reason="no Chromium on this machine")

TEXT = "document.body.innerText"


@pytest.fixture
def browser(tmp_path):
    with Browser(tmp_path / "profile") as browser:
        yield browser
        assert browser.console == []


def shoot(browser, name):
    folder = os.environ.get("QWEN1M_SCREENSHOTS")
    if folder:
        browser.screenshot(Path(folder) / f"page_{name}.png")


def number_before(words, text):
    return int(re.search(rf"([\d,]+) {words}", text)[1].replace(",", ""))


def test_read_ask_save_and_load(server, browser, tmp_path):
    sample = make_sample(16_000, seed=5)
    document = sample.prompt.rpartition("\nQuestion: ")[0]
    (tmp_path / "alice.txt").write_text(document)

    browser.call("Page.navigate", url=server.url + "/")
    browser.wait("document.getElementById('facts')?.textContent.includes('65,536')")
    assert "Dual Chunk Attention" in browser.evaluate(TEXT)
    with server.held(8192):
        browser.choose_file("#file", tmp_path / "alice.txt")
        progress = browser.wait(
            "/^(?!100)[1-9]\\d? %.*left/.test(document.getElementById('progress-text').textContent)"
            " && document.getElementById('progress-text').textContent"
        )
        assert "of " in progress and re.search(r" (s|min \d+ s) left", progress)
        assert 0 < browser.evaluate("document.getElementById('bar').value") < 1
        shoot(browser, "reading")
    browser.wait("document.getElementById('progress-text').textContent.startsWith('Read: ')")

    browser.evaluate("document.getElementById('question').focus()")
    browser.type(sample.question)
    browser.click("#send")
    figures = browser.wait(
        "document.querySelector('.turn small') && document.querySelector('.turn small').textContent"
    )
    assert sample.answer in browser.evaluate("document.getElementById('chat').innerText")
    tokens = len(document.encode())
    assert number_before("cached", figures) > 0.99 * tokens  # the question met it in the cache
    assert "temperature frozen at 1." in figures
    assert browser.evaluate("document.querySelectorAll('.error').length") == 0
    shoot(browser, "answer")

    name = browser.evaluate("state.session")
    assert name.startswith("alice.txt-")
    server.idle()  # the session is not in use any more
    browser.click("#open button")  # Save
    browser.wait("document.querySelectorAll('#saved .session').length === 1")
    browser.click("#open button", 1)  # Close
    browser.wait("document.getElementById('open').textContent === 'none'")
    browser.click("#saved button")  # Load
    browser.wait(f"document.getElementById('chat').textContent.includes('{name}')")
    browser.evaluate("document.getElementById('question').focus()")
    browser.type("And what else?")
    browser.click("#send")
    figures = browser.wait(
        "document.querySelector('.turn small') && document.querySelector('.turn small').textContent"
    )
    assert number_before("cached", figures) > 0.99 * tokens
    shoot(browser, "loaded")
    browser.click("#saved button", 1)  # Delete
    browser.wait("document.getElementById('saved').textContent === 'none'")
    server.idle()
    browser.click("#open button", 1)
    browser.wait("document.getElementById('open').textContent === 'none'")


def test_stop_and_resume(server, browser, tmp_path):
    (tmp_path / "long.txt").write_text(make_sample(30_000, seed=6).prompt)
    browser.call("Page.navigate", url=server.url + "/")
    browser.wait("document.getElementById('facts')?.textContent.includes('65,536')")
    stopped = "document.getElementById('progress-text').textContent === 'Stopped'"
    with server.held(10_240):
        browser.choose_file("#file", tmp_path / "long.txt")
        browser.wait("document.getElementById('bar').value > 0")
        wait_for(lambda: server.get("/v1/requests")["data"][0]["done"] > 4096)
        browser.click("#stop")
        browser.wait(stopped)
        server.idle()
        shoot(browser, "stopped")
        server.hold(20_480)
        browser.choose_file("#file", tmp_path / "long.txt")  # the same again: goes on from there
        browser.wait("/of them cached/.test(document.getElementById('progress-text').textContent)")
        browser.click("#stop")
        browser.wait(stopped)
        server.idle()
    browser.evaluate("call('DELETE', '/v1/sessions/' + state.session)")
