"""Screenshots of the server's page for docs/serving.md: `python -m benchmarks.page_pictures [FOLDER]`.

Without a folder those of `docs/serving.md`; into a folder, every state in both schemes and sizes, to be looked at.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

from benchmarks.serving import served

NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next((found for name in NAMES if (found := shutil.which(name))), "")
# As root it runs without its sandbox only; it asks the network for nothing of its own.
CHROMIUM_OPTIONS = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-sync", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update"),
]
FIGURES = Path(__file__).parents[1] / "docs" / "figures"
LOOKS: dict[str, dict[str, Any]] = {
    "light-desktop": {"color_scheme": "light", "viewport": {"width": 1280, "height": 800}},
    "dark-phone": {"color_scheme": "dark", "viewport": {"width": 390, "height": 844}},
}
OTHERS: dict[str, dict[str, Any]] = {
    "dark-desktop": LOOKS["light-desktop"] | {"color_scheme": "dark"},
    "light-phone": LOOKS["dark-phone"] | {"color_scheme": "light"},
}
PUBLISHED = {("light-desktop", "tree"), ("dark-phone", "finished")}
QUESTION = "A book costs $12. How much do 4 books cost?"
STEP = 3  # whose tree is shown
PATIENCE = 120_000  # milliseconds


def states(page: Any, url: str) -> Iterator[str]:
    """Brings the page from one state to the next, and gives their names."""
    page.set_default_timeout(PATIENCE)
    page.goto(url)
    page.wait_for_selector("#model:not(:text('connecting'))")
    yield "empty"
    page.check("#compare")
    page.fill("#prompt", QUESTION)
    page.press("#prompt", "Enter")
    page.wait_for_selector(".answer .burst:nth-child(5)")
    yield "streaming"
    page.wait_for_selector("#send:visible")
    yield "finished"
    page.click("button.look")
    for _ in range(STEP - 1):
        page.keyboard.press("ArrowRight")
    yield "tree"


def save(page: Any, file: Path) -> None:
    """As a PNG with a palette, a third of the size and the same to the eye."""
    whole = Image.open(BytesIO(page.screenshot(animations="disabled")))
    whole.quantize(256).save(file, optimize=True)


def main(folder: Path | None) -> None:
    from playwright.sync_api import sync_playwright

    into = folder or FIGURES
    into.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright, served() as url:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=CHROMIUM_OPTIONS)
        for name, look in (LOOKS | (OTHERS if folder else {})).items():
            page = browser.new_page(**look)
            for state in states(page, url):
                if folder or (name, state) in PUBLISHED:
                    save(page, into / f"page-{name}-{state}.png")
            page.close()
        browser.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]) if sys.argv[1:] else None)
