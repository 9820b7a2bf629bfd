"""The page: its parser of streams under Node.js, and the whole of it in Chromium, where they are installed."""

import json
import re
import shutil
import subprocess
from itertools import pairwise
from pathlib import Path

import pytest

from serve_helpers import KEY, NAME, plain_texts, running, tiny_service

PAGE = Path(__file__).parents[1] / "src" / "ctc_drafter" / "serve" / "page"
CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), ""
)
NODE = shutil.which("node") or ""
needs_chromium = pytest.mark.skipif(not CHROMIUM, reason="needs Chromium; on Debian: apt install chromium")
needs_node = pytest.mark.skipif(not NODE, reason="needs Node.js; on Debian: apt install nodejs")
QUESTION = "the cat sat?"


def luminance(colour: str) -> float:
    """Of #rrggbb, as WCAG 2 defines it."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_text_can_be_read_on_every_ground():
    light, dark = (
        dict(re.findall(r"--([a-z0-9-]+): (#[0-9a-f]{6});", block))
        for block in re.findall(r":root \{(.*?)\}", (PAGE / "style.css").read_text(encoding="utf-8"), re.DOTALL)
    )
    for colours in (light, dark):
        grounds = [name for name in colours if name in ("paper", "panel") or name.startswith("tint")]
        pairs = [("ink", ground) for ground in grounds] + [("on-accent", "accent")]
        pairs += [(name, ground) for name in ("quiet", "good", "bad") for ground in ("paper", "panel")]
        assert len(pairs) >= 13
        low = {pair: contrast(*(colours[name] for name in pair)) for pair in pairs}
        assert {pair: value for pair, value in low.items() if value < 4.5} == {}


def test_nothing_comes_from_elsewhere():
    for file in PAGE.iterdir():
        assert re.findall(r"(?:https?:)?//[a-z]", file.read_text(encoding="utf-8").replace("// ", "")) == [], file.name


def test_what_scripts_ask_for_is_there():
    """Every id that a script names is in the page, and every label names a field."""
    html = (PAGE / "index.html").read_text(encoding="utf-8")
    ids = set(re.findall(r' id="([^"]+)"', html))
    named = {name for file in PAGE.glob("*.js") for name in re.findall(r'byId\("([^"]+)"\)', file.read_text("utf-8"))}
    assert named
    assert named <= ids
    assert set(re.findall(r'(?:for|aria-labelledby)="([^"]+)"', html)) <= ids


@needs_node
def test_events_are_whole_however_they_are_cut(tmp_path):
    blocks = [("step", {"text": "a\nb: c"}), ("step", {"text": "é"}), ("end", {"beta": 2.5})]
    text = "".join(f"event: {name}\ndata: {json.dumps(data)}\n\n" for name, data in blocks)
    script = f"""
        import {{ eventParser }} from "./stream.mjs";
        const text = {json.dumps(text)};
        for (let size = 1; size <= text.length; size++) {{
            const found = [];
            const parse = eventParser((name, data) => found.push([name, data]));
            for (let at = 0; at < text.length; at += size) parse(text.slice(at, at + size));
            console.log(JSON.stringify(found));
        }}"""
    (tmp_path / "stream.mjs").write_bytes((PAGE / "stream.js").read_bytes())
    (tmp_path / "run.mjs").write_text(script, encoding="utf-8")
    run = subprocess.run([NODE, "run.mjs"], cwd=tmp_path, capture_output=True, check=True, text=True, timeout=60)
    found = [json.loads(line) for line in run.stdout.splitlines()]
    assert len(found) == len(text)
    assert all(each == [list(block) for block in blocks] for each in found)


@needs_node
def test_the_scripts_work_together(server, tmp_path):
    scripts = tmp_path / "page"
    shutil.copytree(PAGE, scripts)
    (scripts / "package.json").write_text('{"type": "module"}')
    driver = Path(__file__).with_name("page_driver.mjs")
    command = [NODE, str(driver), server.url, KEY, str(scripts)]
    run = subprocess.run(command, capture_output=True, check=False, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
    result = json.loads(run.stdout)
    messages = [{"role": "user", "content": QUESTION}]
    ids = server.service.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    (expected,) = plain_texts(server.service, list(ids), 32)
    assert result["texts"] == [expected, expected]
    assert result["bursts"] == result["bonus"] > 5
    assert "the same text" in result["verdict"][0]
    assert "β" in result["figures"][0]
    assert "β" not in result["figures"][1]
    assert result["model"] == NAME
    assert [title.split(" of ")[0] for title, _, _ in result["tree"]] == ["Step 1", "Step 2", "Step 3"]
    assert all("accepted" in summary and "root" in body for _, summary, body in result["tree"])
    assert result["nodes"] > 1
    assert result["closed"]
    assert result["notice"] == [False, "The server does not answer.", "and the hat?"]
    assert result["again"] == [True, 1]


@pytest.fixture
def server():
    with running(tiny_service()) as at:
        yield at


@pytest.fixture(params=[("light", 1280, 800), ("dark", 390, 844)], ids=["desktop", "phone"])
def page(request, server, tmp_path):
    from playwright.sync_api import sync_playwright

    scheme, width, height = request.param
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(color_scheme=scheme, viewport={"width": width, "height": height})
        faults: list[str] = []
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.goto(server.url)
        page.fill("#key", KEY)
        yield page
        page.screenshot(path=tmp_path / "page.png")
        browser.close()
    assert faults == []


def ask(page, text=QUESTION):
    page.fill("#prompt", text)
    page.press("#prompt", "Enter")
    page.wait_for_selector("#send:visible")


@needs_chromium
def test_it_sends_streams_and_compares(page, server):
    page.check("#compare")
    ask(page)
    messages = [{"role": "user", "content": QUESTION}]
    ids = server.service.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    (expected,) = plain_texts(server.service, list(ids), 128)
    assert [each.text_content() for each in page.query_selector_all(".answer .text")] == [expected] * 2
    assert "the same text" in page.text_content(".verdict")
    assert len(page.query_selector_all(".burst")) > 10
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "nothing scrolls sideways"


@needs_chromium
def test_a_tree_opens_by_keyboard(page):
    ask(page)
    page.focus("button.look")
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "tree-title"
    titles = []
    for _ in range(3):
        titles.append(page.text_content("#tree-title"))
        assert "root" in page.text_content("#tree-body")
        page.keyboard.press("ArrowRight")
    assert all(one != other for one, other in pairwise(titles))
    page.keyboard.press("Escape")
    assert page.is_hidden("#tree")
    assert page.evaluate("document.activeElement.className") == "look"


@needs_chromium
def test_it_survives_a_server_that_goes_away(page, server):
    page.route("**/v1/ctc/stream", lambda route: route.abort())
    ask(page)
    assert page.is_visible("#notice")
    assert page.input_value("#prompt") == QUESTION, "what was written is not lost"
    page.unroute("**/v1/ctc/stream")
    ask(page)
    assert page.is_hidden("#notice")
    assert page.text_content(".answers:last-of-type .text")
