"""OpenAI's Responses endpoint by its own client: the texts are plain decoding's."""

import json
import urllib.request

import openai
import pytest
from pydantic import BaseModel

from serve_helpers import KEY, NAME, blocked_service, plain_texts, running, tiny_service

NEW = 12


@pytest.fixture(scope="module")
def server():
    with running(tiny_service()) as at:
        yield at


def ask(server, **options):
    options = {"model": NAME, "input": "the cat", "temperature": 0, "max_output_tokens": NEW, **options}
    with server.client() as client:
        reply = client.responses.create(**options)
        return list(reply) if options.get("stream") else reply


def expected(server, messages, new=NEW, **settings):
    prompt = server.service.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    return plain_texts(server.service, list(prompt), new, **settings)[0], len(prompt)


def test_text_in_and_out(server):
    text, size = expected(server, [{"role": "user", "content": "the cat"}])
    reply = ask(server)
    assert (reply.output_text, reply.status) == (text, "incomplete")
    assert reply.incomplete_details.reason == "max_output_tokens"
    assert (reply.usage.input_tokens, reply.usage.output_tokens, reply.usage.total_tokens) == (size, NEW, size + NEW)
    assert reply.object == "response"
    sampled, _ = expected(server, [{"role": "user", "content": "the cat"}], seed=4, temperature=1.2)
    assert ask(server, temperature=1.2, extra_body={"seed": 4}).output_text == sampled


def test_an_answer_that_ends_is_completed(server):
    reply = ask(server, extra_body={"logit_bias": {"1": 100}})
    assert (reply.status, reply.output_text, reply.incomplete_details) == ("completed", "", None)


def test_instructions_and_a_conversation(server):
    first = ask(server)
    turns = [
        {"role": "system", "content": "be a cat"},
        {"role": "user", "content": "the cat"},
        {"role": "assistant", "content": first.output_text},
        {"role": "user", "content": "the hat"},
    ]
    text, size = expected(server, turns)
    last = {"role": "user", "content": [{"type": "input_text", "text": "the hat"}]}
    for outputs in (first.output, [item.model_dump() for item in first.output]):
        reply = ask(server, input=[turns[1], *outputs, last], instructions="be a cat")
        assert (reply.output_text, reply.usage.input_tokens) == (text, size)


def test_events(server):
    """In OpenAI's order, numbered; the client's own accumulation gives the whole response."""
    text, _ = expected(server, [{"role": "user", "content": "the cat"}])
    events = ask(server, stream=True)
    kinds = [event.type for event in events]
    deltas = kinds.count("response.output_text.delta")
    assert deltas > 1
    assert kinds == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        *["response.output_text.delta"] * deltas,
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.incomplete",
    ]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == text
    assert events[-1].response.output_text == text
    assert events[-1].response.id == events[0].response.id
    options = {"model": NAME, "input": "the cat", "temperature": 0, "max_output_tokens": NEW}
    with server.client() as client, client.responses.stream(**options) as stream:
        assert [event.type for event in stream][:4] == kinds[:4]


def test_a_stream_that_fails_says_so():
    service, turnstile = blocked_service(timeout=0.3)
    with running(service) as at, turnstile.dripping(0.05):
        body = json.dumps({"input": "the cat", "stream": True, "logit_bias": {"1": -100}}).encode()
        headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
        request = urllib.request.Request(f"{at.url}/v1/responses", body, headers)
        with urllib.request.urlopen(request, timeout=30) as reply:
            events = reply.read().decode()
        turnstile.open()
    assert events.rstrip().splitlines()[-2] == "event: error"
    assert '"code":"timeout"' in events.rstrip().splitlines()[-1]


def test_a_schema(server):
    pytest.importorskip("llguidance")

    class Hat(BaseModel):
        good: bool

    reply = server.client().responses.parse(
        model=NAME, input="the cat", text_format=Hat, temperature=0, max_output_tokens=300
    )
    assert isinstance(reply.output_parsed, Hat)


@pytest.mark.sparing(3)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id: responses are not stored here; send the whole"),
        ({"store": True}, "store: responses are not stored here"),
        ({"conversation": "conv_1"}, "conversation: responses are not stored here"),
        ({"background": True}, "background is not supported"),
        ({"tools": [{"type": "web_search"}]}, "tools is not supported"),
        ({"input": []}, "input: List should have at least 1 item"),
        ({"input": [{"type": "function_call_output", "call_id": "1", "output": "a"}]}, "input.0: items of type"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input.0.content.0.type: "),
        ({"input": [{"role": "cat", "content": "a"}]}, "input.0.role: "),
    ],
    ids=str,
)
def test_refusals(server, options, message):
    with pytest.raises(openai.BadRequestError, match=message):
        ask(server, **options)


def test_habits(server):
    nothing = {"store": False, "truncation": "disabled", "include": [], "metadata": {"a": "b"}, "top_logprobs": 0}
    assert ask(server, **nothing).output_text == ask(server).output_text


def test_stored_responses_are_not_there(server):
    with pytest.raises(openai.NotFoundError, match="not stored"):
        server.client().responses.retrieve("resp_1")
