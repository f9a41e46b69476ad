"""A headless Chromium, where the machine has one, that notes what a page asks for and complains of."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
NEEDS_CHROMIUM = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine: apt-get install chromium")


class Tab:
    """One page. requests: all URLs asked for; complaints: errors and warnings of its console, and exceptions."""

    def __init__(self, context: Any) -> None:
        self.page = context.new_page()
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("console", self._console)

    def _console(self, message: Any) -> None:
        if message.type in ("error", "warning"):
            self.complaints.append(message.text)

    def text(self, selector: str) -> str:
        return str(self.page.locator(selector).inner_text())

    def until(self, expression: str, timeout_s: float = 20.0) -> None:
        """Wait until a JavaScript expression is true."""
        self.page.wait_for_function(f"() => ({expression})", timeout=1000 * timeout_s)

    def origins(self) -> set[str]:
        return {"://".join(urlsplit(url)[:2]) for url in self.requests}


@contextlib.contextmanager
def chromium() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        try:
            yield browser
        finally:
            browser.close()


@contextlib.contextmanager
def tab_at(browser: Any, url: str, **options: Any) -> Iterator[Tab]:
    """A tab with a session of its own; options: of Playwright's `new_context`."""
    context = browser.new_context(**{"viewport": {"width": 1320, "height": 900}} | options)
    context.set_default_timeout(20_000)
    try:
        tab = Tab(context)
        tab.page.goto(url)
        yield tab
    finally:
        context.close()
