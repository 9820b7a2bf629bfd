"""`tool_choice` that asks for a call: the grammar of tool calls in the format that the chat template declares."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from ctc_drafter.serve.messages import Tool
from ctc_drafter.serve.structured import OBJECT, SPACES
from ctc_drafter.types import UserError

REQUIRED = "required"
GAP = r"/\n?/"  # between calls


def named_tool(choice: object) -> str | None:
    """The tool of `{"type": "function", "function": {"name": ...}}`; None for other choices."""
    function = choice.get("function") if isinstance(choice, Mapping) and choice.get("type") == "function" else None
    name = function.get("name") if isinstance(function, Mapping) and len(function) == 1 else None
    return name if isinstance(name, str) else None


def call_grammar(source: str, tools: Sequence[Tool], several: bool, special: Sequence[str]) -> str:
    """llguidance's Lark grammar of an answer that is a call of one of the tools, or of `several`.

    source: the chat template. special: texts of special tokens, which stand for themselves.
    Raises `UserError` where the template declares no format that a grammar is known for.
    """

    def mark(text: str) -> str:
        return text if text in special and text.startswith("<") else json.dumps(text)

    def calls(arguments: str) -> dict[str, Any]:
        return {"anyOf": [schema_of(tool, arguments) for tool in tools]}

    if "<tool_call>" in source and "<function=" not in source:  # Hermes, Qwen
        one = f'{mark("<tool_call>")} "\\n" json "\\n" {mark("</tool_call>")}'
        start = f"call ({GAP} call)*" if several else "call"
        return f"start: {start}\ncall: {one}\njson: %json {written(calls('arguments'))}\n"
    if "[TOOL_CALLS]" in source:  # Mistral
        listed = {"type": "array", "items": calls("arguments"), "minItems": 1}
        listed |= {} if several else {"maxItems": 1}
        opening = "<[TOOL_CALLS]>" if "[TOOL_CALLS]" in special else '"[TOOL_CALLS]"'
        return f"start: {opening} json\njson: %json {written(listed)}\n"
    if '"parameters": dictionary of argument name and its value' in source:  # Llama, which calls one at a time
        return f"start: json\njson: %json {written(calls('parameters'))}\n"
    raise UserError(
        "the model's chat template declares no format of tool calls that can be required; "
        "give tool_choice auto, or leave it out"
    )


def schema_of(tool: Tool, arguments: str) -> dict[str, Any]:
    """The JSON of a call; arguments: what its arguments are called."""
    function = tool.model_dump(exclude_unset=True)["function"]
    return {
        "type": "object",
        "properties": {"name": {"const": function["name"]}, arguments: function.get("parameters") or OBJECT},
        "required": ["name", arguments],
        "additionalProperties": False,
    }


def written(schema: Mapping[str, Any]) -> str:
    return json.dumps({**schema, "x-guidance": {"whitespace_pattern": SPACES}})
