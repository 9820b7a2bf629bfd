"""Chromium, once for the tests of a module: while it is open, its event loop runs, and asyncio.run refuses another."""

import pytest

from benchmarks.page_pictures import CHROMIUM, CHROMIUM_OPTIONS


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=CHROMIUM_OPTIONS)
        yield browser
        browser.close()
