"""Tools: whether the chat template takes them, and the tool calls in an answer by transformers' parser."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from ctc_drafter.serve.messages import Message, Tool
from ctc_drafter.types import UserError

# What the chat template knows of tools.


def source_of(tokenizer: PreTrainedTokenizerBase, tools: Sequence[Tool] | None) -> str:
    """The chat template that these tools choose; empty without one."""
    if not tokenizer.chat_template:
        return ""
    given = [tool.model_dump(exclude_unset=True) for tool in tools or ()]
    return str(tokenizer.get_chat_template(tools=given or None))


def mentions(source: str, name: str) -> bool:
    return re.search(rf"\b{re.escape(name)}\b", source) is not None


def check_tools(source: str, messages: Sequence[Message], tools: Sequence[Tool] | None) -> None:
    """Raises `UserError` where the template would leave out tools, calls of tools or their results."""
    wanted = {
        "tools": ("takes no tools", bool(tools)),
        "tool_calls": ("shows no tool calls of earlier messages", any(each.tool_calls for each in messages)),
        "tool": ("shows no messages of tools", any(each.role == "tool" for each in messages)),
    }
    for name, (lack, asked) in wanted.items():
        shown = re.search(r"""["'](tool|ipython)["']""", source) if name == "tool" else mentions(source, name)
        if asked and not shown:
            raise UserError(f"the model's chat template {lack}; leave them out")


# Tool calls in an answer, by transformers' parser.

CALL = {"type": "function", "function": "{content}"}
NAMED = {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}}
# Formats that chat templates declare by these words, where the tokenizer has no `response_template` that says more: as
# transformers' own server has them for Qwen 2, 2.5 and 3 (and all that write as Hermes does), Qwen 3 Coder and 3.5,
# and those of Mistral and of Llama 3.1 and later.
FORMATS: tuple[tuple[tuple[str, ...], dict[str, Any]], ...] = (
    (
        ("<tool_call>", "<function=", "<parameter="),
        {
            "open_pattern": r"\s*<tool_call>\s*<function=(?P<name>[^>\n]+)>",
            "close_pattern": r"</function>\s*</tool_call>",
            "repeats": True,
            "content": "xml-inline",
            "content_args": {"tag_pattern": r"<parameter=(?P<key>[^>\n]+)>\s*(?P<value>.*?)\s*</parameter>"},
            "transform": NAMED,
        },
    ),
    (
        ("<tool_call>",),
        {
            "open_pattern": r"\s*<tool_call>",
            "close": "</tool_call>",
            "repeats": True,
            "content": "json",
            "transform": CALL,
        },
    ),
    (
        ("[TOOL_CALLS]",),
        {
            "open_pattern": r"\s*\[TOOL_CALLS\]",
            "content": "json",
            "transform": {"type": "function", "function": {"name": "{name}", "arguments": "{arguments}"}},
            "transform_each": True,
        },
    ),
    (
        ('"parameters": dictionary of argument name and its value',),
        {
            "open_pattern": r"\A\s*(?:<\|python_tag\|>)?\s*(?=\{\s*\"name\")",
            "content": "json",
            "transform": {
                "type": "function",
                "function": {"name": "{content.name}", "arguments": "{content.parameters}"},
            },
        },
    ),
)


@dataclass(frozen=True)
class ToolFormat:
    """How a model writes tool calls: a `response_template` of transformers. prefix: the prompt's text, which the
    tokenizer's own template wants to see."""

    template: Mapping[str, Any]
    tools: tuple[dict[str, Any], ...]
    prefix: str = ""

    def shown(self, special: Mapping[int, str]) -> frozenset[int]:
        """Special tokens that the format names, which therefore stay in the text."""
        told = str(self.template)
        return frozenset(i for i, text in special.items() if text in told or repr(re.escape(text))[1:-1] in told)


def format_of(
    tokenizer: PreTrainedTokenizerBase, source: str, tools: Sequence[Tool], prompt: Sequence[int]
) -> ToolFormat:
    """Raises `UserError` where neither tokenizer nor chat template say how the model calls tools."""
    given = tuple(tool.model_dump(exclude_unset=True) for tool in tools)
    own = getattr(tokenizer, "response_template", None)
    if own:
        return ToolFormat(own, given, str(tokenizer.decode(list(prompt))))
    for words, calls in FORMATS:
        if all(word in source for word in words):
            fields = {"tool_calls": calls, "content": {"content": "text"}}
            return ToolFormat({"start_anchor_pattern": r"\A", "fields": fields}, given)
    raise UserError(
        "the model's chat template takes tools but declares no known format of tool calls; "
        "leave tools out, or give the tokenizer a response_template"
    )


@dataclass(frozen=True)
class CalledTool:
    """arguments: JSON."""

    name: str
    arguments: str
    id: str = field(default_factory=lambda: secrets.token_hex(5)[:9])  # Mistral's templates want nine characters


@dataclass(frozen=True)
class Parsed:
    """News of an answer."""

    content: str = ""
    reasoning: str = ""
    calls: tuple[CalledTool, ...] = ()


class ToolParser:
    """Takes an answer's text piece by piece, and tells content from tool calls. What is no proper call after all,
    such as one that a limit cut, is content."""

    def __init__(self, form: ToolFormat):
        from transformers.utils.chat_parsing import ResponseParser  # not in the oldest transformers that we take

        self._parser: Any = ResponseParser(dict(form.template), prefix=form.prefix, tools=list(form.tools))
        self._pending = ""  # since the parser last told all that it had
        self._broken = False
        self.called = 0

    def push(self, text: str) -> Parsed:
        if self._broken:
            return Parsed(content=text)
        self._pending += text
        return self._take(lambda: self._parser.feed(text))

    def close(self) -> Parsed:
        return Parsed() if self._broken else self._take(lambda: self._parser.finalize()[1])

    def _take(self, work: Callable[[], Sequence[Mapping[str, Any]]]) -> Parsed:
        try:
            return self._told(work())
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            self._broken = True
            return Parsed(content=self._pending)

    def _told(self, events: Sequence[Mapping[str, Any]]) -> Parsed:
        texts = {"content": "", "reasoning": ""}
        calls: list[CalledTool] = []
        for event in events:
            if event["type"] == "region_chunk" and not event["dirty"]:
                texts["content" if event["field"] == "content" else "reasoning"] += event["text"]
            elif event["type"] == "region_close" and event["field"] == "tool_calls":
                values = event["value"] if isinstance(event["value"], list) else [event["value"]]
                calls += map(called, values)
        if calls or any(texts.values()):
            self._pending = ""
        self.called += len(calls)
        return Parsed(texts["content"], texts["reasoning"], tuple(calls))


def called(value: Any) -> CalledTool:
    function = value["function"]
    arguments = function.get("arguments") or {}
    if not isinstance(function["name"], str) or not isinstance(arguments, dict | str):
        raise TypeError("a call has a name and arguments")
    return CalledTool(
        function["name"], arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    )
