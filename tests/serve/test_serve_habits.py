"""What clients send by habit: answers given back, nulls, and values of other servers that ask for nothing."""

import json
import urllib.error
import urllib.request

import pytest

from serve_helpers import KEY, NAME, plain_texts, running, tiny_service

ASK = [{"role": "user", "content": "the cat"}]
NEXT = {"role": "user", "content": "the hat"}


@pytest.fixture(scope="module")
def server():
    with running(tiny_service()) as at:
        yield at


def post(server, path, body, headers=None):
    """Status and JSON of the answer; a body of bytes goes as it is."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"} | (headers or {})
    request = urllib.request.Request(f"{server.url}/v1/{path}", data, {k: v for k, v in headers.items() if v})
    try:
        with urllib.request.urlopen(request, timeout=30) as reply:
            return reply.status, json.loads(reply.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def chat(server, **fields):
    body = {"messages": ASK, "max_tokens": 6, "temperature": 0, **fields}
    return post(server, "chat/completions", {name: value for name, value in body.items() if value != "left out"})


def message_of(server, options):
    return (
        server.client()
        .chat.completions.create(model=NAME, messages=ASK, max_tokens=6, temperature=0, **options)
        .choices[0]
        .message
    )


@pytest.mark.sparing
@pytest.mark.parametrize("options", [{}, {"logprobs": True}])
def test_an_answer_is_accepted_back(server, options):
    message = message_of(server, options)
    plain = [*ASK, {"role": "assistant", "content": message.content}, NEXT]
    status, expected = chat(server, messages=plain)
    assert status == 200
    raw = chat(server, **options)[1]["choices"][0]["message"]
    given = [message, message.model_dump(), message.model_dump(exclude_unset=True), raw]
    for back in given:
        client = server.client()
        reply = client.chat.completions.create(model=NAME, messages=[*ASK, back, NEXT], max_tokens=6, temperature=0)
        assert reply.choices[0].message.content == expected["choices"][0]["message"]["content"]
        assert reply.usage.prompt_tokens == expected["usage"]["prompt_tokens"]


@pytest.mark.sparing(2)
@pytest.mark.parametrize(
    "more",
    [
        {"tool_calls": None},
        {"tool_calls": []},
        {"function_call": None},
        {"audio": None},
        {"annotations": []},
        {"refusal": None},
        {"reasoning_content": None},
        {"id": "msg_1"},
        {"name": None},
        {"provider_specific_fields": {"refusal": None}},
    ],
)
def test_fields_of_answers_that_say_nothing(server, more):
    turns = [*ASK, {"role": "assistant", "content": "sat", **more}, NEXT]
    status, reply = chat(server, messages=turns)
    assert (status, reply.get("error")) == (200, None)
    assert reply["usage"] == chat(server, messages=[*ASK, {"role": "assistant", "content": "sat"}, NEXT])[1]["usage"]


NOTHING = [
    {"seed": -1},
    {"top_k": -1},
    {"top_k": 0.0},
    {"min_p": 0},
    {"presence_penalty": 0.0, "frequency_penalty": 0, "repetition_penalty": 1.0},
    {"ignore_eos": False, "min_tokens": 0, "stop_token_ids": []},
    {"chat_template_kwargs": {}},
    {"n": 1.0, "top_p": 1, "max_tokens": 6.0},
    {"n": None, "stream": None, "stop": None, "stream_options": None, "logprobs": None, "top_logprobs": None},
    {"stop": [], "stream_options": {}, "top_logprobs": 0},
    {"stream_options": {"include_usage": None, "include_obfuscation": None}},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "the cat", "cache": None}], "name": None}]},
    {"tools": [], "tool_choice": "none", "response_format": {"type": "text"}, "logit_bias": {}},
    {"max_tokens": -1, "max_completion_tokens": 6},
]


@pytest.mark.sparing(4)
@pytest.mark.parametrize("fields", NOTHING, ids=str)
def test_values_that_ask_for_nothing(server, fields):
    prompt = list(server.service.tokenizer.apply_chat_template(ASK, add_generation_prompt=True, return_dict=False))
    status, reply = chat(server, **fields)
    assert status == 200, reply
    assert [choice["message"]["content"] for choice in reply["choices"]] == plain_texts(server.service, prompt, 6)


def test_a_seed_of_minus_one_is_none(server):
    answers = {chat(server, temperature=1, seed=-1, max_tokens=12)[1]["choices"][0]["message"]["content"] for _ in "12"}
    assert len(answers) == 2


BAD = [
    ({"stop": [""]}, "stop.0: String should have at least 1 character"),
    ({"stop": 7}, "stop: give a text, or a list of texts"),
    ({"messages": [{"role": "assistant", "content": None}]}, "messages.0: content is missing; give a text"),
    ({"messages": [{"role": "user"}]}, "messages.0: content is missing; give a text"),
    ({"messages": [{"role": "user", "content": {}}]}, "messages.0.content: give a text, or a list of parts"),
    (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a", "wings": 2}]}]},
        "unknown field messages.0.content.0.wings; leave it out",
    ),
    ({"maxTokens": 3}, "unknown field maxTokens; did you mean max_tokens?"),
    (
        {"messages": [{"role": "user", "content": "a", "tool_call": []}]},
        "unknown field messages.0.tool_call; did you mean tool_calls?",
    ),
    ({"temprature": 1, "wings": 2}, "unknown field temprature; did you mean temperature?"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "u"}}]}]},
        "messages.0.content.0: the model reads text alone; leave out the part of type image_url",
    ),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages.0.content.0: text is missing"),
    ({"messages": [{"role": "user", "content": ["a"]}]}, "messages.0.content.0: "),
    ({"messages": [{"role": "user", "content": "a", "audio": {"id": "x"}}]}, "messages.0: audio is not supported"),
    ({"n": 1.5}, "n: Input should be a valid integer"),
    ({"modalities": ["audio"]}, "modalities is not supported; leave it out"),
]


@pytest.mark.parametrize(("fields", "message"), BAD, ids=str)
def test_errors_name_what_is_wrong(server, fields, message):
    status, reply = chat(server, **fields)
    assert status == 400
    assert reply["error"]["message"].startswith(message)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (["a", 7], "prompt.1: Input should be a valid string"),
        ([7, "a"], "prompt.1: Input should be a valid integer"),
        ([[7], "a"], "prompt.1: Input should be a valid list"),
        ({}, "prompt: give a text or token ids, or a list of either"),
        ([], "prompt: List should have at least 1 item"),
        ("", "prompt: String should have at least 1 character"),
    ],
)
def test_errors_of_prompts(server, prompt, message):
    status, reply = post(server, "completions", {"prompt": prompt})
    assert status == 400
    assert reply["error"]["message"].startswith(message)


@pytest.mark.parametrize("kind", [None, "application/x-www-form-urlencoded", "text/plain"])
def test_a_body_that_is_not_declared_as_json(server, kind):
    body = json.dumps({"messages": ASK}).encode()
    status, reply = post(server, "chat/completions", body, {"Content-Type": kind or "text/x-none"})
    assert status == 400
    assert "Content-Type: application/json" in reply["error"]["message"]


@pytest.mark.parametrize("body", [b"[]", b"3", b"null", b""])
def test_a_body_that_is_no_object(server, body):
    status, reply = post(server, "chat/completions", body)
    assert status == 400
    assert reply["error"]["message"] == "the body is no JSON object; give one, with the fields of the request"
