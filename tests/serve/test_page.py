"""The page: its parser of streams under Node.js, and the whole of it in Chromium, where they are installed."""

import hashlib
import json
import re
import shutil
import subprocess
import tomllib
from itertools import pairwise
from pathlib import Path

import pytest

from benchmarks.page_pictures import LOOKS
from page_helpers import QUESTION, SHORT, STREAM, answers, ask, expected_answer, needs_chromium, opened
from serve_helpers import KEY, NAME, blocked_service, plain_texts, running, tiny_service

PAGE = Path(__file__).parents[2] / "src" / "ctc_drafter" / "serve" / "page"
OWN = [file for file in PAGE.iterdir() if file.is_file()]
NODE = shutil.which("node") or ""
needs_node = pytest.mark.skipif(not NODE, reason="needs Node.js; on Debian: apt install nodejs")


def luminance(colour: str) -> float:
    """Of #rrggbb, as WCAG 2 defines it."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_text_can_be_read_on_every_ground():
    style = (PAGE / "style.css").read_text(encoding="utf-8")
    both = re.findall(r"--([a-z0-9-]+): light-dark\((#[0-9a-f]{6}), (#[0-9a-f]{6})\);", style)
    light, dark = {name: one for name, one, _ in both}, {name: other for name, _, other in both}
    for colours in (light, dark):
        grounds = [name for name in colours if name in ("paper", "panel") or name.startswith("tint")]
        pairs = [("ink", ground) for ground in [*grounds, "bubble"]] + [("on-accent", "accent")]
        pairs += [(name, ground) for name in ("quiet", "good", "bad") for ground in ("paper", "panel")]
        assert len(pairs) >= 13
        low = {pair: contrast(*(colours[name] for name in pair)) for pair in pairs}
        assert {pair: value for pair, value in low.items() if value < 4.5} == {}
        assert min(contrast(colours["edge"], colours[ground]) for ground in ("paper", "panel")) >= 3


def test_page_loads_nothing_from_other_hosts():
    for file in OWN:
        text = file.read_text(encoding="utf-8").replace("// ", "").replace("http://www.w3.org/2000/svg", "")
        found = re.findall(r"(?:https?:)?//[a-z]\S*", text)
        assert file.name == "help.html" or found == [], file.name


def test_scripts_of_others_are_unmodified_and_have_their_licences():
    table = (PAGE / "vendor" / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\S+)` \| .*`(\S+LICENSE\S*)` \| `([0-9a-f]{64})` \|$", table, re.MULTILINE)
    files = {file.name for file in (PAGE / "vendor").iterdir()}
    assert files == {"README.md"} | {name for script, licence, _ in rows for name in (script, licence)}
    for script, _, wanted in rows:
        content = (PAGE / "vendor" / script).read_bytes()
        assert hashlib.sha256(content).hexdigest() == wanted
        assert len(content) < 100_000


def test_the_pages_files_are_short_and_in_the_package():
    root = PAGE.parents[3]
    patterns = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["ctc_drafter"]
    packed = {file for pattern in patterns for file in PAGE.parents[1].glob(pattern)}
    assert {file for file in PAGE.rglob("*") if file.is_file()} <= packed
    assert max(len(file.read_text(encoding="utf-8").splitlines()) for file in OWN) <= 400


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
    driver = Path(__file__).parents[1] / "support" / "page_driver.mjs"
    command = [NODE, str(driver), server.url, KEY, str(scripts)]
    run = subprocess.run(command, capture_output=True, check=False, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
    result = json.loads(run.stdout)
    messages = [{"role": "user", "content": QUESTION}]
    ids = server.service.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    (expected,) = plain_texts(server.service, list(ids), 32)
    assert result["texts"] == [expected, expected]
    assert result["bursts"] == result["bonus"] > 5
    assert re.fullmatch(r"(\d+\.\d× (faster|slower)|As fast), same text", result["verdict"][0])
    assert result["title"] == ["CTC drafter", "Plain decoding"]
    assert "tokens per step" in result["figures"][0]
    assert "tokens per step" not in result["figures"][1]
    assert result["model"] == NAME
    assert [title.split(" of ")[0] for title, _, _ in result["tree"]] == ["Step 1", "Step 2", "Step 3"]
    assert all("accepted" in summary and "already written" in body for _, summary, body in result["tree"])
    assert result["nodes"] > 1
    assert result["closed"]
    assert result["notice"] == [False, "The server does not answer.", "and the hat?"]
    assert result["again"] == [True, 1]


@pytest.fixture(scope="module")
def server():
    with running(tiny_service()) as at:
        yield at


@pytest.fixture
def page(browser, server):
    with opened(browser, server) as page:
        yield page


@pytest.fixture(params=LOOKS)
def any_page(request, browser, server):
    with opened(browser, server, request.param) as page:
        yield page


@pytest.mark.slow
@needs_chromium
def test_page_sends_streams_and_compares(any_page, server):
    page = any_page
    page.check("#compare")
    ask(page)
    assert answers(page) == [expected_answer(server)] * 2
    assert page.text_content(".verdict").endswith("same text")
    assert page.evaluate("parseFloat(getComputedStyle(document.querySelector('.verdict strong')).fontSize)") >= 24
    top = "document.querySelector('{}').getBoundingClientRect().top"
    assert page.evaluate(f"{top.format('.verdict')} < {top.format('.answers')}"), "above the answers"
    assert page.text_content(".verdict") == page.text_content("#status"), "a screen reader hears it"
    assert len(page.query_selector_all(".answer .burst")) > 10
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "nothing scrolls sideways"


@pytest.mark.slow
@needs_chromium
def test_a_tree_opens_by_keyboard(any_page):
    page = any_page
    ask(page)
    page.focus("button.look")
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "tree-title"
    page.focus("#previous")
    page.keyboard.press("Enter")  # step 0, where there is none before
    titles = []
    for _ in range(3):
        titles.append(page.text_content("#tree-title"))
        page.keyboard.press("ArrowRight")
        assert "already written" in page.text_content("#tree-body")
        last = page.text_content(".burst.open .bonus")
        assert visible(last) == page.text_content(".own code") or last == ""
    assert [title.split(" of ")[0] for title in titles] == ["Step 0", "Step 1", "Step 2"]
    page.keyboard.press("Escape")
    assert page.is_hidden("#tree")
    assert page.evaluate("document.activeElement.className") == "small look"


def visible(text: str) -> str:
    return text.replace("\n", "⏎").replace("\t", "⇥").replace(" ", "␣")


@pytest.mark.slow
@needs_chromium
def test_the_keyboard_reaches_everything_and_shows_where_it_is(page):
    ask(page)
    page.focus("#show-chats")
    reached = ["show-chats"]
    for _ in range(30):
        page.keyboard.press("Tab")
        name, style, width = page.evaluate(
            """(() => { const at = document.activeElement, { outlineStyle, outlineWidth } = getComputedStyle(at);
            return [at.id || at.className || at.tagName, outlineStyle, parseFloat(outlineWidth)]; })()"""
        )
        if name == "BODY":
            break
        reached.append(name)
        assert style == "solid", name
        assert width >= 2, name
    tools = ["small copy", "small again", "small view", "small look"]
    fields = ["system", "tokens", "temperature", "top-p", "top-k", "seed", "key"]
    form = ["prompt", "send", "compare", "SUMMARY", *fields]
    assert reached == ["show-chats", "fresh", "theme", "help", "talk", "small edit", "small more", *tools, *form]


@needs_chromium
def test_what_a_screen_reader_is_told(page):
    ask(page)
    told = page.locator("body").aria_snapshot()
    page.click("button.look")
    told += page.locator("body").aria_snapshot()
    for part in (
        *('region "Conversation"', 'list "Questions and answers"', 'article "CTC drafter"', "status: ", "Answer: "),
        *('form "Your question"', 'textbox "Your message"', 'switch "Compare with plain decoding"'),
        *('button "Chats"', 'button "Dark colours"', 'link "Help"', 'button "Copy the answer of CTC drafter"'),
        *('spinbutton "Temperature"', 'textbox "API key"', 'complementary "Token tree"'),
        *('heading "Step 1 of', 'button "Next step"', "drafted and checked in one step"),
    ):
        assert part in told, part
    levels = [int(level) for level in re.findall(r"heading .*\[level=(\d)\]", told)]
    assert levels.count(1) == 2, "one in each of the two"
    assert all(after <= before + 1 for before, after in pairwise(levels))


@pytest.mark.slow
@needs_chromium
def test_a_stopped_answer_is_kept_and_a_new_chat_is_empty(browser):
    service, turnstile = blocked_service()
    page = browser.new_page()
    with running(service, api_key=None) as server:
        page.goto(server.url)
        turnstile.open(8)
        page.fill("#prompt", QUESTION)
        page.focus("#send")
        page.keyboard.press("Enter")
        assert page.evaluate("document.activeElement.id") == "stop"
        page.wait_for_selector(".answer .burst:nth-child(8)", state="attached")
        page.keyboard.press("Enter")
        page.wait_for_selector(".answer:has-text('Stopped.')")
        turnstile.open()
        assert page.evaluate("document.activeElement.id") == "prompt"
        assert page.text_content(".answer .text")
        assert page.is_hidden("#notice")
        page.click("#fresh")
        assert page.is_visible("#welcome")
        assert page.query_selector(".answer") is None
    page.close()


@pytest.mark.slow
@needs_chromium
def test_a_question_that_is_not_answered_is_given_back(page, server):
    page.route(STREAM, lambda route: route.abort())
    ask(page)
    assert page.is_visible("#notice")
    assert page.input_value("#prompt") == QUESTION, "what was written is not lost"
    assert page.query_selector(".answer") is None
    assert page.is_visible("#welcome")
    page.unroute(STREAM)
    ask(page)
    assert page.is_hidden("#notice")
    assert page.text_content(".answer .text") == expected_answer(server)


@pytest.mark.slow
@needs_chromium
def test_page_survives_a_server_restart(browser):
    page = browser.new_page()
    with running(tiny_service(), api_key=None) as first:
        page.goto(first.url)
        page.eval_on_selector("#tokens", f"field => {{ field.value = {SHORT}; }}")  # the tiny context is soon full
        ask(page)
    ask(page, "and the hat?")
    assert page.is_visible("#notice")
    assert page.text_content("#model") == page.text_content("#notice")
    with running(tiny_service(), api_key=None, port=first.port):
        page.wait_for_selector(f"#model:text({NAME!r})")
        ask(page, page.input_value("#prompt"))
        assert page.is_hidden("#notice")
        assert all(each.text_content() for each in page.query_selector_all(".answer .text"))
        assert len(page.query_selector_all("#turns > li")) == 2
    page.close()


@pytest.mark.slow
@needs_chromium
def test_settings_that_are_wrong_are_shown(page):
    """A browser complains about a field, and stops, where the field can be seen."""
    page.fill("#temperature", "0.75")
    page.evaluate("document.getElementById('settings').open = false")
    ask(page)
    assert len(page.query_selector_all("#turns > li")) == 1
    page.evaluate("document.getElementById('temperature').value = '7'")
    page.fill("#prompt", "again")
    page.press("#prompt", "Enter")
    assert page.is_visible("#temperature")
    assert page.evaluate("document.activeElement.id") == "temperature"
    assert len(page.query_selector_all("#turns > li")) == 1


@pytest.mark.slow
@needs_chromium
@pytest.mark.parametrize("look", LOOKS)
def test_the_tree_of_an_answer_that_is_being_written(browser, look):
    service, turnstile = blocked_service()
    page = browser.new_page(**LOOKS[look])
    with running(service, api_key=None) as server:
        page.goto(server.url)
        turnstile.open(3)
        page.fill("#prompt", QUESTION)
        page.press("#prompt", "Enter")
        page.wait_for_selector(".answer .burst:nth-child(4)", state="attached")
        page.dispatch_event(".answer .burst:nth-child(4)", "click")  # it may be white space
        page.wait_for_selector("#tree-title:text('Step 3 of 3')")
        assert page.get_attribute("#next", "aria-disabled") == "true"
        turnstile.open(2)
        page.wait_for_selector("#tree-title:text('Step 3 of 5')")
        assert page.get_attribute("#next", "aria-disabled") == "false"
        assert page.is_visible("#stop")
        page.keyboard.press("Escape")
        assert page.evaluate("document.activeElement.id") == "prompt"
        page.click("#stop")
        turnstile.open()
        page.wait_for_selector(".answer:has-text('Stopped.')")
    page.close()
