"""Pages in a browser, for tests: what is drawn, said and asked for."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from loopwright.framework.report.page.document import write_report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
AXE = Path(__file__).parent / "framework" / "report" / "axe.min.js"

needs_browser = pytest.mark.skipif(
    CHROMIUM is None or find_spec("playwright") is None,
    reason="there is no chromium (apt-get install chromium), or playwright is not installed",
)
LAPTOP = {"viewport": {"width": 1366, "height": 850}}
PHONE = {
    "viewport": {"width": 390, "height": 844},
    "is_mobile": True,
    "has_touch": True,
}


@contextmanager
def open_browser() -> Iterator[Any]:
    """A browser without a window."""
    from playwright import sync_api

    with sync_api.sync_playwright() as playwright:
        # As root, Chromium has no sandbox; its pages are ours.
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox"]
        )
        yield browser
        browser.close()


class Opened:
    """A page that is open, with what it has said and asked for."""

    def __init__(self, browser, address: str, **options) -> None:
        self.context = browser.new_context(**options)
        self.page = self.context.new_page()
        self.said: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(address)
        self.page.wait_for_selector("html[data-ready]")

    def draw_all(self) -> list[str]:
        """Look at every plot, and return the titles of those that show nothing."""
        for chart in self.page.query_selector_all(".chart"):
            chart.scroll_into_view_if_needed()
        self.page.wait_for_timeout(100)
        return self.page.evaluate(
            """() => [...document.querySelectorAll(".chart")].filter((chart) => {
                if (chart.querySelector(".single, .measures")) return false;
                const canvas = chart.querySelector("canvas");
                if (!canvas) return true;
                const drawn = chart.chart.lines().filter((line) => line.series.y.some((y) => y !== null));
                const pixels = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
                const has = (hex) => {
                    const [r, g, b] = [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));
                    for (let i = 0; i < pixels.length; i += 4) {
                        const away = [r, g, b].reduce((sum, value, at) => sum + Math.abs(pixels[i + at] - value), 0);
                        if (away < 40 && pixels[i + 3] > 150) return true;
                    }
                    return false;
                };
                // The last line lies on top of the others.
                return drawn.length > 0 && !has(colourOf(drawn[drawn.length - 1].hue));
            }).map((chart) => chart.getAttribute("aria-label"))"""
        )

    def faults(self) -> list[str]:
        """Return what axe-core finds of serious faults."""
        self.page.evaluate(AXE.read_text())
        found = self.page.evaluate("axe.run(document)")
        return [
            f"{fault['id']}: {node['html'][:150]} {node['failureSummary'][:200]}"
            for fault in found["violations"]
            if fault["impact"] in ("serious", "critical")
            for node in fault["nodes"][:3]
        ]


def assert_page_is_whole(run: Path, shows: str) -> None:
    """The page of a run draws each of its curves, has no serious fault and says nothing in the console.

    Args:
        run: the run's folder.
        shows: what is among its text.
    """
    page = Path(write_report([str(run)], run / "page.html"))
    with open_browser() as browser:
        opened = Opened(browser, page.as_uri(), **LAPTOP)
        blank = opened.draw_all()
        drawn = opened.page.locator(".chart").count()
        faults = opened.faults() if AXE.is_file() else []
        told = opened.page.inner_text("main")
        opened.context.close()
    assert (blank, faults, opened.said) == ([], [], [])
    assert drawn
    assert shows in told
