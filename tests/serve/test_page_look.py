"""What the page shows: the drafter's name, figures, comparisons; light and dark, tints of bursts; in Chromium."""

import pytest

from page_helpers import ABOUT, StandIn, answers, ask, events, needs_chromium, opened
from serve_helpers import NAME, running, tiny_service

pytestmark = [pytest.mark.slow, needs_chromium]


@pytest.fixture(scope="module")
def server():
    with running(tiny_service()) as at:
        yield at


@pytest.fixture
def page(browser, server):
    with opened(browser, server) as page:
        yield page


@pytest.mark.parametrize(
    ("method", "title"),
    [("ctc", "CTC drafter"), ("prompt_lookup", "Prompt lookup"), ("dflash", "DFlash"), ("new-one", "new-one")],
)
def test_the_drafters_own_name_is_shown(page, method, title):
    about = {"model": NAME, "method": method, "context": 100, "longest_prompt": 99, "longest_answer": 99}
    page.route(ABOUT, lambda route: route.fulfill(json=about))
    page.reload()
    page.wait_for_selector(f"#method:text-is('{title}')")
    StandIn(page, [events("yes")])
    ask(page)
    assert page.text_content(".answer h2") == title


def test_without_a_drafter_there_is_nothing_to_compare(page):
    about = {"model": NAME, "method": None, "context": 100, "longest_prompt": 99, "longest_answer": 99}
    page.route(ABOUT, lambda route: route.fulfill(json=about))
    page.check("#compare")
    page.reload()
    page.wait_for_selector("#method:text-is('no drafter')")
    assert page.is_hidden("#compare")
    StandIn(page, [events("yes")])
    ask(page)
    assert [each.text_content() for each in page.query_selector_all(".answer h2")] == ["Plain decoding"]
    assert "tokens per step" not in page.text_content(".figures")


@pytest.mark.parametrize(
    ("seconds", "text", "verdict", "colour"),
    [
        (2.3, "yes", "2.3× faster, same text", "good"),
        (1.02, "yes", "As fast, same text", "good"),
        (0.5, "yes", "2.0× slower, same text", "ink"),
        (1.02, "no!", "As fast, another text", "bad"),
        (0.5, "no!", "2.0× slower, another text", "bad"),
    ],
)
def test_the_comparison_says_how_many_times(page, seconds, text, verdict, colour):
    """In green only where nothing is worse."""
    StandIn(page, [events("yes"), events(text, seconds=seconds)])
    page.check("#compare")
    ask(page)
    assert page.text_content(".verdict") == verdict
    colour_of = "getComputedStyle(document.querySelector('.verdict')).color"
    found = page.evaluate(colour_of)
    page.evaluate(f"document.querySelector('.verdict').style.color = 'var(--{colour})'")
    assert page.evaluate(colour_of) == found


def test_figures_count_tokens_and_steps(page):
    StandIn(page, [events("a" * 33, seconds=2.0)])  # 11 tokens: the prompt's, and two for each of five steps
    ask(page)
    pairs = zip(page.query_selector_all(".figures dt"), page.query_selector_all(".figures dd"), strict=True)
    figures = {name.text_content(): value.text_content() for name, value in pairs}
    assert figures == {"tokens/s": "5.5", "tokens per step": "2.0", "tokens": "11"}
    StandIn(page, [events("a" * 33, seconds=0.5)])
    page.click("#fresh")
    ask(page)
    assert page.text_content(".figures dd") == "22"


def test_the_counter_has_what_the_model_reads(page):
    StandIn(page, [events("one"), events("two", prompt=30)])
    context = page.text_content("#counter").split(" of ")[1]
    assert page.text_content("#counter") == f"0 of {context}"
    ask(page)
    assert page.text_content("#counter") == f"11 of {context}"
    ask(page)
    assert page.text_content("#counter") == f"31 of {context}"
    page.click("#fresh")
    assert page.text_content("#counter") == f"0 of {context}"


def test_an_example_is_compared(page):
    StandIn(page, [events("yes")])
    page.click("#examples button")
    page.wait_for_selector(".verdict:visible")


GROUND = "getComputedStyle(document.body).backgroundColor"
LIGHT, DARK = "rgb(255, 255, 255)", "rgb(20, 23, 28)"


@pytest.mark.parametrize(("system", "one", "other"), [("light", LIGHT, DARK), ("dark", DARK, LIGHT)])
def test_light_and_dark(browser, server, system, one, other):
    with opened(browser, server, color_scheme=system) as page:
        assert page.evaluate(GROUND) == one
        page.click("#theme")
        assert page.evaluate(GROUND) == other
        page.reload()
        assert page.evaluate(GROUND) == other, "it is remembered"
        page.click("#theme")
        assert page.evaluate(GROUND) == one
        page.emulate_media(color_scheme="dark" if system == "light" else "light")
        assert page.evaluate(GROUND) == other, "it follows the system again"


def test_own_tokens_are_underlined_under_the_pointer_only(page):
    StandIn(page, [events("some words of an answer")])
    ask(page)
    page.click("button.view")
    line = "getComputedStyle(document.querySelector('.answer .burst:nth-child(2) .bonus')).textDecorationLine"
    assert page.evaluate(line) == "none"
    page.hover(".answer .burst:nth-child(2)")
    assert page.evaluate(line) == "underline"


def test_bursts_of_spaces_have_no_tint(page):
    StandIn(page, [events("abc" + " " * 6 + "defghi")])
    ask(page)
    classes = [each.get_attribute("class") for each in page.query_selector_all(".answer .burst")]
    assert classes == ["burst tint-0", "burst blank", "burst tint-2"]


def test_space_before_a_burst_has_no_tint(page):
    StandIn(page, [events("abc\n defghi")])
    ask(page)
    assert answers(page) == ["abc\n defghi"]
    assert page.text_content(".answer .burst:nth-child(2)") == "defg"


def test_answers_beside_each_other_are_shown_alike(page):
    StandIn(page, [events("**yes**")])
    page.check("#compare")
    ask(page)
    for shown, hidden in ((".formatted", ".text"), (".text", ".formatted")):
        assert [each.is_visible() for each in page.query_selector_all(f".answer {shown}")] == [True, True]
        assert [each.is_visible() for each in page.query_selector_all(f".answer {hidden}")] == [False, False]
        page.click("button.view")


def test_texts_of_a_comparison_begin_at_one_height(page):
    """Where the figures of one answer need a line of their own."""
    page.set_viewport_size({"width": 760, "height": 800})
    StandIn(page, [events("some words of an answer")])
    page.check("#compare")
    ask(page)
    boxes = [each.bounding_box() for each in page.query_selector_all(".answer .formatted")]
    assert len(boxes) == 2
    assert boxes[0]["x"] < boxes[1]["x"]
    assert boxes[0]["y"] == boxes[1]["y"]


def test_jump_to_the_end(page):
    StandIn(page, [events("word\n\n" * 100)])
    ask(page)
    assert page.is_hidden("#jump")
    page.evaluate("document.getElementById('talk').scrollTop = 0")
    page.click("#jump")
    rest = "(({ scrollHeight, scrollTop, clientHeight }) => scrollHeight - scrollTop - clientHeight)"
    assert page.evaluate(f"{rest}(document.getElementById('talk'))") < 2
    page.wait_for_selector("#jump", state="hidden")


def test_icon_and_help(page, server):
    icon = page.request.get(server.url + "/" + page.get_attribute("link[rel=icon]", "href"))
    assert (icon.status, icon.headers["content-type"]) == (200, "image/svg+xml")
    page.goto(server.url + "/" + page.get_attribute("#help", "href"))
    assert page.text_content("h1") == "What this page shows"
    for link in page.query_selector_all("a"):
        assert page.request.get(link.evaluate("each => each.href")).status == 200
