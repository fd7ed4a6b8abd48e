"""A browser for the tests of the page, and a page that records everything which must not happen."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from openril.report.html import render_page

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
)  # fmt: skip

RECORD_VIOLATIONS = """
window.violations = [];
addEventListener("securitypolicyviolation", (e) => window.violations.push(`${e.effectiveDirective} ${e.blockedURI}`));
"""


def missing(what: str) -> None:
    """Fail where the browser must be there, and skip elsewhere."""
    if os.environ.get("CI", "").lower() in ("1", "true"):
        pytest.fail(f"CI must run the tests of the page, but {what}")
    pytest.skip(what)


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    path = shutil.which("chromium")
    if path is None:
        missing("Chromium is not installed. Install it with `apt-get install chromium`.")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        missing("playwright is not installed. Install it with `pip install playwright` (no browser download needed).")
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, args=list(FLAGS))
        yield chromium
        chromium.close()


class Watched:
    """A page, and what it did that it must not do: dialogs, errors, requests, violations of its policy."""

    def __init__(self, context: Any, address: str) -> None:
        self.context, self.address = context, address
        self.page = context.new_page()
        self.page.set_default_timeout(10_000)
        self.seen: list[str] = []
        self.page.on("dialog", lambda dialog: (self.seen.append(f"dialog {dialog.message}"), dialog.dismiss()))
        self.page.on("pageerror", lambda error: self.seen.append(f"error {error}"))
        self.page.on("console", lambda m: self.seen.append(m.text) if m.type in ("error", "warning") else None)
        self.page.on("request", lambda request: self._check(request.url))
        self.page.add_init_script(RECORD_VIOLATIONS)
        self.page.goto(address)

    def _check(self, url: str) -> None:
        if not url.startswith((self.address.split("#")[0], "data:", "blob:", "http://view.test/")):
            self.seen.append(f"request {url[:200]}")

    def show(self, fragment: str) -> None:
        """Open the view of this part of the address after "#", as a link does, and wait until it is drawn."""
        self.page.evaluate("(hash) => { location.hash = hash; }", fragment)
        self.settle()

    def settle(self) -> None:
        # Two frames: the event of the address, and the groups that arrive after it.
        self.page.evaluate("() => new Promise((done) => setTimeout(() => requestAnimationFrame(done), 20))")
        self.page.wait_for_function("!document.querySelector('[aria-busy]')")

    def problems(self) -> list[str]:
        """Everything that happened, and whether injected code has run."""
        found = self.page.evaluate("[...window.violations, ...(window.hacked ? ['injected code has run'] : [])]")
        return [*self.seen, *found]

    def overflow(self) -> int:
        """Pixels by which the page is wider than the window."""
        return self.page.evaluate("document.documentElement.scrollWidth - innerWidth")

    def cards(self) -> list[str]:
        """The ids of the groups that are shown, in order."""
        return self.page.eval_on_selector_all(".card[data-group]", "cards => cards.map((c) => c.dataset.group)")


@pytest.fixture
def open_report(browser: Any, tmp_path: Path) -> Iterator[Callable[..., Watched]]:
    """Open the page of a document from disk, in a window of this width."""
    contexts = []

    def opened(document: dict[str, Any], fragment: str = "", width: int = 1280, **options: Any) -> Watched:
        path = tmp_path / f"report_{len(contexts)}.html"
        path.write_text(render_page(document), encoding="utf-8")
        context = browser.new_context(viewport={"width": width, "height": 900}, reduced_motion="reduce", **options)
        contexts.append(context)
        watched = Watched(context, path.as_uri() + fragment)
        watched.settle()
        return watched

    yield opened
    for context in contexts:
        context.close()
