"""The page in Chromium: opened with its key, asked, and answers of a stand-in for the server."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest

from benchmarks.page_pictures import CHROMIUM, LOOKS
from serve_helpers import KEY, NAME, Running, plain_texts

needs_chromium = pytest.mark.skipif(not CHROMIUM, reason="needs Chromium; on Debian: apt install chromium")
PATIENCE = 120_000  # milliseconds, on a machine that does much else
SHORT = 64  # tokens of an answer
QUESTION = "the cat sat?"
STREAM = "**/v1/ctc/stream"
ABOUT = "**/v1/ctc/about"


@contextmanager
def opened(browser: Any, server: Running, look: str = "light-desktop", **options: Any) -> Iterator[Any]:
    """A page that is connected. Errors of its scripts fail the test."""
    page = browser.new_page(**LOOKS[look] | options)
    faults: list[str] = []
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.set_default_timeout(PATIENCE)
    page.goto(server.url)
    unlock(page)
    page.fill("#tokens", str(SHORT))
    yield page
    page.close()
    assert faults == []


def unlock(page: Any) -> None:
    page.wait_for_selector("#settings[open]")  # the server wants its key
    page.fill("#key", KEY)
    page.press("#key", "Enter")
    page.wait_for_selector(f"#model:text({NAME!r})")


def ask(page: Any, text: str = QUESTION) -> None:
    page.fill("#prompt", text)
    page.press("#prompt", "Enter")
    page.wait_for_selector("#send:visible")


def answers(page: Any) -> list[str]:
    """Texts of all answers, as the model wrote them."""
    return [each.text_content() for each in page.query_selector_all(".answer .text")]


def expected_answer(server: Running, limit: int = SHORT, question: str = QUESTION) -> str:
    messages = [{"role": "user", "content": question}]
    ids = server.service.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    return plain_texts(server.service, list(ids), limit)[0]


def events(text: str, finish: str = "stop", prompt: int = 10, seconds: float = 1.0) -> str:
    """A stream whose steps have two tokens of three characters each, behind the prefill's one."""
    tokens = [{"token": ord(text[at]), "text": text[at : at + 3]} for at in range(0, len(text), 3)]
    groups = [tokens[:1], *(tokens[at : at + 2] for at in range(1, len(tokens), 2))]
    root = {"token": 1, "text": "x", "parent": 0, "depth": 0, "probability": 1.0, "accepted": True}
    steps = [
        {"number": number, "seconds": seconds, "pieces": pieces, "accepted": 1, "bonus": True}
        | {"tree": [root] if number else []}
        for number, pieces in enumerate(groups)
    ]
    usage = {"prompt_tokens": prompt, "completion_tokens": len(tokens), "total_tokens": prompt + len(tokens)}
    end = {"finish_reason": finish, "tail": "", "usage": usage, "verifications": len(groups) - 1, "seconds": seconds}
    named = [("step", step) for step in steps] + [("end", end | {"beta": 2.0, "prefill_seconds": 0.1})]
    return "".join(f"event: {name}\ndata: {json.dumps(data)}\n\n" for name, data in named)


FULL = {
    "error": {"message": "the prompt has 1100 tokens and may have 1023; shorten it", "type": "invalid_request_error"}
}
FULL["error"]["code"] = "context_length_exceeded"


class StandIn:
    """Answers the page's requests in the server's place, one after the other, and notes their bodies. An answer is the
    text of a stream, or the body of an error 400; the last one is repeated."""

    def __init__(self, page: Any, replies: Sequence[str | dict[str, Any]]):
        self.replies, self.bodies = list(replies), []
        page.route(STREAM, self.reply)

    def reply(self, route: Any) -> None:
        self.bodies.append(json.loads(route.request.post_data))
        reply = self.replies.pop(0) if len(self.replies) > 1 else self.replies[0]
        if isinstance(reply, dict):
            route.fulfill(status=400, json=reply)
        else:
            route.fulfill(status=200, content_type="text/event-stream", body=reply)
