"""`tool_choice` that asks for a call: the answer is one, whatever the model would have said."""

import json

import openai
import pytest
from test_serve_tools import HERMES, LLAMA, MISTRAL, QWEN_CODER, calls_of, put_together

from ctc_drafter.serve.messages import Tool
from ctc_drafter.serve.server import make_engine
from ctc_drafter.serve.service import Service
from ctc_drafter.serve.structured import Vocabulary
from ctc_drafter.serve.tool_choice import call_grammar
from ctc_drafter.target.model import Target
from ctc_drafter.types import UserError
from serve_helpers import NAME, running
from tiny_models import tiny_drafter, tiny_llama, tiny_tokenizer


def tool(name: str, **properties) -> dict:
    parameters = {"type": "object", "properties": properties, "required": list(properties)}
    parameters |= {"additionalProperties": False}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


WEATHER = tool("weather", town={"enum": ["Bonn", "Ulm"]}, days={"type": "integer", "minimum": 1, "maximum": 9})
TIME = tool("time", zone={"enum": ["a", "b"]})
TOOLS = [WEATHER, TIME]


def accepted(template: str, text: str, several: bool = True, special: tuple[str, ...] = ()) -> bool:
    """Whether an answer may be this text and end there."""
    tokenizer = tiny_tokenizer(template)
    vocabulary = Vocabulary.of(tokenizer, len(tokenizer), [1])
    grammar = call_grammar(template, [Tool.model_validate(each) for each in TOOLS], several, special)
    ids = [*tokenizer(text, add_special_tokens=False).input_ids, 1]
    return vocabulary.lark(grammar, "tools").matcher.deep_copy().validate_tokens(ids) == len(ids)


ONE = '{"name": "weather", "arguments": {"town": "Ulm", "days": 2}}'
OTHER = '{"name": "time", "arguments": {"zone": "b"}}'
HERMES_CALL = f"<tool_call>\n{ONE}\n</tool_call>"


@pytest.mark.parametrize(
    ("template", "text", "several", "right"),
    [
        (HERMES, HERMES_CALL, False, True),
        (HERMES, HERMES_CALL, True, True),
        (HERMES, f"{HERMES_CALL}\n<tool_call>\n{OTHER}\n</tool_call>", True, True),
        (HERMES, f"{HERMES_CALL}\n<tool_call>\n{OTHER}\n</tool_call>", False, False),
        (HERMES, f"so {HERMES_CALL}", True, False),
        (HERMES, "", True, False),
        (HERMES, HERMES_CALL.replace("weather", "wether"), True, False),
        (HERMES, HERMES_CALL.replace('"days": 2', '"days": 12'), True, False),
        (HERMES, HERMES_CALL.replace('"zone"', '"town"'), True, True),
        (HERMES, HERMES_CALL.replace(', "days": 2', ""), True, False),
        (MISTRAL, f"[TOOL_CALLS][{ONE}, {OTHER}]", True, True),
        (MISTRAL, f"[TOOL_CALLS][{ONE}]", False, True),
        (MISTRAL, f"[TOOL_CALLS][{ONE}, {OTHER}]", False, False),
        (MISTRAL, "[TOOL_CALLS][]", True, False),
        (LLAMA, ONE.replace("arguments", "parameters"), True, True),
        (LLAMA, ONE, True, False),
    ],
)
def test_the_grammar_takes_calls_and_nothing_else(template, text, several, right):
    assert accepted(template, text, several) == right


def test_marks_that_are_special_tokens_stand_for_themselves():
    """In llguidance's Lark `<name>` is a special token, and a text in quotes is none."""
    grammar = call_grammar(HERMES, [Tool.model_validate(TIME)], False, ("<tool_call>", "[TOOL_CALLS]"))
    assert "call: <tool_call>" in grammar
    assert "<[TOOL_CALLS]> json" in call_grammar(MISTRAL, [Tool.model_validate(TIME)], False, ("[TOOL_CALLS]",))


def test_formats_that_no_grammar_is_known_for_say_so():
    with pytest.raises(UserError, match="no format of tool calls that can be required"):
        call_grammar(QWEN_CODER, [Tool.model_validate(TIME)], False, ())


def service(drafts: bool) -> Service:
    model = tiny_llama(context=2048)
    target = Target.wrap(model)
    drafter = tiny_drafter(model) if drafts else None
    return Service(
        make_engine(target, drafter, 3, 16, nodes=8, min_probability=0.0), target, tiny_tokenizer(HERMES), NAME
    )


@pytest.fixture(scope="module")
def drafting():
    with running(service(True)) as at:
        yield at


@pytest.fixture(scope="module")
def plain():
    with running(service(False)) as at:
        yield at


def ask(server, **options):
    options = {"model": NAME, "messages": [{"role": "user", "content": "rain?"}], "tools": TOOLS} | options
    return server.client().chat.completions.create(**{"max_tokens": 200, "tool_choice": "required", **options})


FORCED = {"type": "function", "function": {"name": "time"}}


@pytest.mark.sparing
@pytest.mark.parametrize("options", [{"temperature": 0}, {"temperature": 1, "seed": 3}, {"temperature": 1, "seed": 4}])
def test_the_answer_is_a_call_and_plain_decodings(drafting, plain, options):
    options = options | {"parallel_tool_calls": False}
    found = ask(drafting, **options).choices[0]
    assert found.finish_reason == "tool_calls"
    assert found.message.content is None
    ((name, arguments),) = calls_of(found.message)
    assert arguments.keys() == {"weather": {"town", "days"}, "time": {"zone"}}[name]
    assert calls_of(ask(plain, **options).choices[0].message) == [(name, arguments)]
    assert put_together(ask(drafting, stream=True, **options)) == ("", [(name, arguments)], "tool_calls")


@pytest.mark.sparing
@pytest.mark.parametrize("seed", range(3))
def test_the_tool_that_is_named_is_called(drafting, seed):
    found = ask(drafting, tool_choice=FORCED, temperature=1, seed=seed).choices[0]
    assert [name for name, _ in calls_of(found.message)] == ["time"]
    assert json.loads(found.message.tool_calls[0].function.arguments)["zone"] in ("a", "b")


def test_the_model_is_told_of_all_tools_when_one_is_named(drafting):
    usage = [ask(drafting, tool_choice=choice, temperature=0).usage.prompt_tokens for choice in (FORCED, "auto")]
    assert usage[0] == usage[1]


def test_parameters_that_cannot_be_followed(drafting):
    bad = tool("f", x={"type": "string", "pattern": "("})
    with pytest.raises(openai.BadRequestError, match="tools: their parameters cannot be followed"):
        ask(drafting, tools=[bad])
