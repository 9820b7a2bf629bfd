"""The page's endpoints: what is served, and answers that go on where they were cut."""

import json
import urllib.error
import urllib.request

import pytest

import tiny_models
from ctc_drafter.drafters.prompt_lookup import PromptLookup
from ctc_drafter.serve.server import make_engine
from ctc_drafter.serve.service import Limits, Service
from ctc_drafter.target.model import Target
from serve_helpers import NAME, running, tiny_service

QUESTION = [{"role": "user", "content": "the cat sat?"}]
LONG = 16
ACCENTS = [{"role": "user", "content": "été"}]


def get(url: str, body: dict | None = None) -> str:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as reply:
        return reply.read().decode()


def about(service: Service) -> dict:
    with running(service, api_key=None) as server:
        return json.loads(get(f"{server.url}/v1/ctc/about"))


def answer(server, **fields: object) -> tuple[list[int], str, dict]:
    """Tokens, their text without what was held back at the end, and the end event."""
    text = get(f"{server.url}/v1/ctc/stream", {"messages": QUESTION, "temperature": 0} | fields)
    events = [json.loads(line.removeprefix("data: ")) for line in text.splitlines() if line.startswith("data: ")]
    pieces = [piece for step in events[:-1] for piece in step["pieces"]]
    return [piece["token"] for piece in pieces], "".join(piece["text"] for piece in pieces), events[-1]


@pytest.mark.parametrize(("drafter", "method"), [(None, "ctc"), (PromptLookup(), "prompt_lookup")])
def test_the_method_is_the_drafters_own(drafter, method):
    service = tiny_service(drafter=drafter)
    context = service.target.context
    limits = {"longest_prompt": context - 1, "longest_answer": min(2048, context - 1)}
    assert about(service) == {"model": NAME, "method": method, "context": context} | limits


def test_without_a_drafter_there_is_no_method_and_limits_count():
    target = Target.wrap(tiny_models.tiny_llama())
    limits = Limits(max_new_tokens=7, max_prompt=9)
    service = Service(make_engine(target, None, 2, 2), target, tiny_models.tiny_tokenizer(), NAME, limits)
    told = about(service)
    assert told["method"] is None
    assert (told["longest_prompt"], told["longest_answer"]) == (9, 7)


@pytest.fixture(scope="module")
def server():
    with running(tiny_service(), api_key=None) as at:
        yield at


@pytest.mark.sparing
@pytest.mark.parametrize("messages", [QUESTION, ACCENTS])
@pytest.mark.parametrize("plain", [False, True])
def test_a_cut_answer_goes_on_as_if_it_had_not_been_cut(server, messages, plain):
    """The tiny model writes bytes, so that most cuts are within a character."""
    whole, text, end = answer(server, messages=messages, max_tokens=LONG, plain=plain)
    assert len(whole) == LONG
    assert end["finish_reason"] == "length"
    for size in range(1, LONG, 3):
        first, begin, _ = answer(server, messages=messages, max_tokens=size, plain=plain)
        rest, ending, _ = answer(server, messages=messages, max_tokens=LONG - size, plain=plain, answer=first)
        assert first + rest == whole
        assert begin + ending == text


@pytest.mark.parametrize(("tokens", "why"), [([10**6], "token"), ([0] * 5000, "shorten it"), ([-1], "token")])
def test_an_answer_so_far_that_cannot_be_is_refused(server, tokens, why):
    with pytest.raises(urllib.error.HTTPError) as refused:
        answer(server, answer=tokens)
    assert refused.value.code == 400
    assert why in json.load(refused.value)["error"]["message"]
