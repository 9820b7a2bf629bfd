"""Screenshots of the server's page for docs/serving.md: `python -m benchmarks.page_pictures [FOLDER]`.

Without a folder those of `docs/serving.md`; into a folder, every state in both schemes and sizes, to be looked at.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

from benchmarks.server_process import served

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
SERVER = ("--target", "smollm2", "--dtype", "float32", "--batch-size", "1")  # where both answers are the same
QUESTION = "A book costs $12. How much do 4 books cost?"
CODE = """\
Here is a function that adds up the **even** numbers:

```python
def sum_even(numbers: list[int]) -> int:
    return sum(n for n in numbers if n % 2 == 0)
```

It keeps the numbers for which `n % 2 == 0`, and `sum` adds them up.
"""
STEP = 3  # whose tree is shown
PATIENCE = 300_000  # milliseconds


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
    yield "text"
    page.click("button.view")
    page.eval_on_selector("#talk", "talk => { talk.scrollTop = 0; }")
    yield "finished"
    page.click("button.look")
    for _ in range(STEP - 1):
        page.keyboard.press("ArrowRight")
    yield "tree"
    page.keyboard.press("Escape")
    page.click("button.view")
    page.route("**/v1/ctc/stream", lambda route: route.fulfill(content_type="text/event-stream", body=code_answer()))
    page.fill("#prompt", "Write a function that adds up the even numbers of a list.")
    page.press("#prompt", "Enter")
    page.wait_for_selector("li:last-child .formatted pre")
    page.wait_for_selector("#send:visible")
    page.eval_on_selector("#turns > li:last-child", "turn => turn.scrollIntoView()")
    yield "code"


def code_answer() -> str:
    """A stream in the server's place: the shipped model writes no code. Figures are made up; only to be looked at."""
    pieces = [{"token": 0, "text": text} for text in re.findall(r"\s*\S+\s*", CODE)]
    step = {"number": 0, "seconds": 1.0, "pieces": pieces, "accepted": 0, "bonus": True, "tree": []}
    usage = {"prompt_tokens": 20, "completion_tokens": len(pieces), "total_tokens": 20 + len(pieces)}
    end = {"finish_reason": "stop", "tail": "", "usage": usage, "verifications": len(pieces) // 3, "seconds": 1.0}
    return "".join(f"event: {name}\ndata: {json.dumps(data)}\n\n" for name, data in (("step", step), ("end", end)))


def save(page: Any, file: Path) -> None:
    """As a PNG with a palette, a third of the size and the same to the eye."""
    whole = Image.open(BytesIO(page.screenshot(animations="disabled")))
    whole.quantize(256).save(file, optimize=True)


def main(folder: Path | None) -> None:
    from playwright.sync_api import sync_playwright

    into = folder or FIGURES
    into.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright, served(*SERVER) as url:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=CHROMIUM_OPTIONS)
        for name, look in (LOOKS | (OTHERS if folder else {})).items():
            page = browser.new_page(**look)
            for state in states(page, url):
                if folder or (name, state) in PUBLISHED:
                    save(page, into / f"page-{name}-{state}.png")
            page.close()
        browser.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser("python -m benchmarks.page_pictures", description="Takes pictures of the page.")
    parser.add_argument(
        "folder", type=Path, nargs="?", help="folder for all pictures; without it those of docs/figures"
    )
    main(parser.parse_args().folder)
