"""Tools: shown to the template, calls in the history and in answers, streamed and whole."""

import json
import random

import openai
import pytest

from ctc_drafter.serve.messages import Message, Tool
from ctc_drafter.serve.middleware import APIError
from ctc_drafter.serve.tools import ToolParser, format_of
from scripted_service import ScriptedService, scripted_service
from serve_helpers import NAME, running, tiny_service
from tiny_models import TEMPLATE, tiny_tokenizer

HERMES = (
    "{{ bos_token }}{% if tools %}<|user|>{{ tools | tojson }}<|end|>{% endif %}"
    "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'tool' %}{{ m.tool_call_id }}:{% endif %}{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% if enable_thinking %}<think>{% endif %}{% endif %}"
)
QWEN_CODER = "{{ tools }}{{ messages[0].tool_calls }}'tool' <tool_call> <function=a> <parameter=b>"
MISTRAL = "{{ tools }}{{ messages[0].tool_calls }}'tool' [TOOL_CALLS]"
LLAMA = "{{ tools }}{{ messages[0].tool_calls }}'tool' \"parameters\": dictionary of argument name and its value"
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a town",
        "parameters": {
            "type": "object",
            "properties": {"town": {"type": "string", "default": None}, "days": {"type": "integer"}},
        },
    },
}
ASK = [{"role": "user", "content": "rain?"}]
CALL = '<tool_call>\n{"name": "weather", "arguments": {"town": "Köln", "days": 2}}\n</tool_call>'
ARGUMENTS = {"town": "Köln", "days": 2}


@pytest.fixture(scope="module")
def server():
    with running(scripted_service(HERMES)) as at:
        yield at


def chat(server, text, **options):
    ScriptedService.text = text
    options = {"model": NAME, "messages": ASK, "tools": [WEATHER], **options}
    return server.client().chat.completions.create(**options)


def calls_of(message):
    return [(call.function.name, json.loads(call.function.arguments)) for call in message.tool_calls or []]


def put_together(chunks):
    """Content, calls and reason of a stream."""
    content, calls, reason = "", {}, None
    for chunk in chunks:
        choice = chunk.choices[0]
        content += choice.delta.content or ""
        reason = choice.finish_reason or reason
        for call in choice.delta.tool_calls or []:
            assert call.id
            assert call.type == "function"
            calls[call.index] = (call.function.name, json.loads(call.function.arguments))
    return content, [calls[index] for index in sorted(calls)], reason


def test_an_answer_with_a_call(server):
    message = chat(server, "Let me see.\n" + CALL).choices[0]
    assert message.finish_reason == "tool_calls"
    assert (message.message.content, calls_of(message.message)) == ("Let me see.", [("weather", ARGUMENTS)])
    assert put_together(chat(server, "Let me see.\n" + CALL, stream=True)) == (
        "Let me see.",
        [("weather", ARGUMENTS)],
        "tool_calls",
    )


@pytest.mark.slow
def test_two_calls_and_nothing_else(server):
    message = chat(server, CALL + "\n" + CALL).choices[0].message
    assert message.content is None
    assert calls_of(message) == [("weather", ARGUMENTS)] * 2
    assert len({call.id for call in message.tool_calls}) == 2
    assert put_together(chat(server, CALL + CALL, stream=True))[1] == [("weather", ARGUMENTS)] * 2


@pytest.mark.sparing
@pytest.mark.parametrize("text", ["no rain < 3", "<tool_call>{no json}</tool_call> then", CALL[:-3]])
def test_what_is_no_call_is_text(server, text):
    reply = chat(server, text).choices[0]
    assert (reply.message.content, reply.message.tool_calls, reply.finish_reason) == (text, None, "stop")
    assert put_together(chat(server, text, stream=True)) == (text, [], "stop")


def test_a_call_that_the_limit_cuts_is_text(server):
    reply = chat(server, CALL, max_tokens=20).choices[0]
    assert (reply.finish_reason, reply.message.tool_calls) == ("length", None)
    assert CALL.startswith(reply.message.content)


def test_the_conversation_goes_on(server):
    """The answer given back, with the tool's: the template sees an object, not the JSON's text."""
    message = chat(server, CALL).choices[0].message
    call = message.tool_calls[0]
    back = [*ASK, message, {"role": "tool", "tool_call_id": call.id, "content": "wet"}]
    reply = chat(server, "It rains.", messages=back)
    assert reply.choices[0].message.content == "It rains."
    function = {"name": "weather", "arguments": ARGUMENTS}
    text = server.service.tokenizer.apply_chat_template(
        [
            *ASK,
            {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]},
            {"role": "tool", "tool_call_id": call.id, "content": "wet"},
        ],
        tools=[WEATHER],
        add_generation_prompt=True,
        return_dict=False,
    )
    assert reply.usage.prompt_tokens == len(text)
    for form in (message.model_dump(), message.model_dump(exclude_unset=True)):
        again = chat(server, "It rains.", messages=[*ASK, form, back[-1]])
        assert again.usage == reply.usage


def test_tools_that_may_not_be_called(server):
    """They are left out of the prompt, and nothing is read as a call."""
    bare = chat(server, CALL, tools=None)
    none = chat(server, CALL, tool_choice="none")
    assert none.usage == bare.usage
    assert none.choices[0].message.content == bare.choices[0].message.content == CALL


def test_variables_of_the_template(server):
    bare = chat(server, "a").usage.prompt_tokens
    for extra in ({"chat_template_kwargs": {"enable_thinking": True}},):
        thinking = chat(server, "a", extra_body=extra).usage.prompt_tokens
        assert thinking - bare == len(server.service.tokenizer("<think>").input_ids)
    for extra in ({"chat_template_kwargs": {"enable_thinking": False, "unknown": 3}}, {"reasoning_effort": "low"}):
        assert chat(server, "a", extra_body=extra).usage.prompt_tokens == bare


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tool_choice": "often"}, "tool_choice may be auto, none, required, or"),
        ({"tool_choice": {"type": "allowed_tools"}}, "tool_choice may be auto, none, required, or"),
        ({"tool_choice": "required", "tools": None}, "asks for a call of tools, and there are none"),
        ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, "there is no tool f among them"),
        ({"tool_choice": "required", "extra_body": {"ignore_eos": True}}, "would write beyond the call"),
        ({"parallel_tool_calls": False}, "parallel_tool_calls: false is served with tool_choice required only"),
        ({"tools": [{"type": "web_search"}]}, "tools.0.type: "),
        ({"tools": [{"type": "function", "function": {}}]}, "tools.0.function.name: Field required"),
        (
            {"messages": [*ASK, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "["}}]}]},
            "messages.1.tool_calls.0.function: arguments are no JSON object",
        ),
        (
            {"messages": [{"role": "user", "content": "a", "tool_calls": [{"function": {"name": "f"}}]}]},
            "messages.0: tool_calls is for assistant messages",
        ),
        ({"extra_body": {"chat_template_kwargs": {"tokenize": False}}}, "chat_template_kwargs cannot set tokenize"),
    ],
    ids=str,
)
def test_refusals(server, options, message):
    with pytest.raises(openai.BadRequestError, match=message):
        chat(server, "a", **options)


def test_what_no_template_can_show_is_refused(server):
    deep: dict = {}
    for _ in range(700):
        deep = {"a": deep}
    with pytest.raises(openai.BadRequestError, match="refuses these messages"):
        chat(server, "a", tools=[{"type": "function", "function": {"name": "f", "parameters": deep}}])
    with pytest.raises(APIError, match="not valid Unicode"):  # which the client would not send
        server.service.encode_chat([Message(role="user", content="a")], (), {"a": "\ud800"})


def test_a_template_without_tools_says_so():
    with running(tiny_service()) as at:
        call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
        cases = [
            ({"tools": [WEATHER]}, "takes no tools"),
            ({"messages": [*ASK, {"role": "assistant", "content": None, "tool_calls": [call]}]}, "shows no tool calls"),
            ({"messages": [*ASK, {"role": "tool", "tool_call_id": "1", "content": "a"}]}, "shows no messages of tools"),
        ]
        for options, message in cases:
            with pytest.raises(openai.BadRequestError, match=message):
                at.client().chat.completions.create(**{"model": NAME, "messages": ASK, **options})
    assert "tools" not in TEMPLATE


FORMS = [
    (HERMES, "a " + CALL, "a", [("weather", ARGUMENTS)]),
    (
        QWEN_CODER,
        (
            "<tool_call>\n<function=weather>\n<parameter=town>\nKöln\n</parameter>\n<parameter=days>\n2\n</parameter>\n"
            "</function>\n</tool_call>"
        ),
        "",
        [("weather", ARGUMENTS)],
    ),
    (
        MISTRAL,
        '[TOOL_CALLS] [{"name": "weather", "arguments": {"town": "Köln", "days": 2}}, {"name": "b", "arguments": {}}]',
        "",
        [("weather", ARGUMENTS), ("b", {})],
    ),
    (
        LLAMA,
        '<|python_tag|>{"name": "weather", "parameters": {"town": "Köln", "days": "2"}}',
        "",
        [("weather", ARGUMENTS)],
    ),
    (LLAMA, '{"name": "weather", "parameters": {"town": "Köln", "days": 2}}', "", [("weather", ARGUMENTS)]),
    (LLAMA, 'so {"name": "weather"}', 'so {"name": "weather"}', []),
    (LLAMA, '{"town": 3}', '{"town": 3}', []),
]


@pytest.mark.parametrize(("template", "text", "content", "calls"), FORMS)
def test_formats_in_pieces_of_any_size(template, text, content, calls):
    tools = [Tool.model_validate(WEATHER)]
    for seed in range(8):
        rng, rest, told, found = random.Random(seed), text, "", []
        parser = ToolParser(format_of(tiny_tokenizer(template), template, tools, []))
        while rest:
            size = rng.randint(1, 1 if seed == 0 else len(text))
            news, rest = parser.push(rest[:size]), rest[size:]
            told, found = told + news.content, [*found, *news.calls]
        news = parser.close()
        told, found = told + news.content, [*found, *news.calls]
        assert (told, [(call.name, json.loads(call.arguments)) for call in found]) == (content, calls)


@pytest.mark.slow
def test_marks_that_are_special_tokens_are_read():
    """Special tokens are left out of texts, but not those that a format names."""
    template = HERMES.replace("<tool_call>", "<|mask|>").replace("</tool_call>", "")
    declared = {
        "start_anchor": "<|assistant|>",
        "fields": {
            "thinking": {"open": "<think>", "close": "</think>"},
            "tool_calls": {
                "open": "<|mask|>",
                "repeats": True,
                "content": "json",
                "transform": {"type": "function", "function": "{content}"},
            },
            "content": {},
        },
    }
    with running(scripted_service(template, response_template=declared)) as at:
        call = '<|mask|>{"name": "weather", "arguments": {}}'
        message = chat(at, "<think>why</think>so<|user|>" + call).choices[0].message
        assert (message.content, message.reasoning_content) == ("so", "why")
        assert calls_of(message) == [("weather", {})]
        begun = chat(at, "why</think>so", extra_body={"chat_template_kwargs": {"enable_thinking": True}})
        assert begun.choices[0].message.reasoning_content == "why"
        assert chat(at, "so" + call, messages=[*ASK, message, {"role": "tool", "content": "a"}]).usage


def test_tools_without_a_known_format_are_refused():
    with (
        running(scripted_service("{{ messages[0].content }}{{ tools }}")) as at,
        pytest.raises(openai.BadRequestError, match="declares no known format of tool calls"),
    ):
        chat(at, "a")
