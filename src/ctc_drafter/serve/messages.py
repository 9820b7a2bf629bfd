"""Messages and tools of chat requests, as clients send them and as the chat template gets them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextvars import ContextVar
from difflib import get_close_matches
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, model_validator
from pydantic_core import PydanticCustomError

# Parts of requests, and what they say by habit.

ANYTHING: Any = object()
# What answers have, ours and others', and clients send back with the conversation.
MESSAGES_ASK_NOTHING: dict[str, Any] = {
    "id": ANYTHING,
    "type": ("message",),
    "status": ANYTHING,
    "refusal": ("",),
    "annotations": ANYTHING,
    "provider_specific_fields": ANYTHING,
    "function_call": (),
    "tool_calls": ([],),
    "audio": (),
    "images": ([],),
}


Item = TypeVar("Item")
# A megabyte of bad items would have as many errors, of which only one is reported.
Several = Annotated[list[Item], Field(fail_fast=True)]


def whole(value: Any) -> Any:
    """4 for 4.0, which languages with one kind of number may send."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Whole = Annotated[int, BeforeValidator(whole)]


def text_or_list(value: Any) -> str | None:
    """The member of a union that a value is meant for, so that an error is that member's."""
    return "str" if isinstance(value, str) else "list[]" if isinstance(value, list) else None


def which(function: Any, expected: str) -> Discriminator:
    return Discriminator(function, custom_error_type="kind", custom_error_message=expected)


# Where it is set, the unknown fields of the request that is being read go there, by name, and are left out.
IGNORED: ContextVar[list[str] | None] = ContextVar("ignored fields", default=None)


UNKNOWN = "extra_forbidden"  # type of the error for an unknown field; its context has `field`, and `near` ones
LONGEST_NAME = 64  # characters of an unknown field that are compared with known ones


class Strict(BaseModel):
    """A part of a request. Of what is null or among `asks_nothing`, nothing is said any more; what else is known there
    and no field is not served. Other fields are refused, or left out where `IGNORED` is set."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    asks_nothing: ClassVar[Mapping[str, Any]] = {}

    @model_validator(mode="before")
    @classmethod
    def leave_out(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        kept = {name: value for name, value in data.items() if value is not None}
        for name in kept.keys() & cls.asks_nothing.keys():
            nothing = cls.asks_nothing[name]
            if nothing is ANYTHING or any(kept[name] == each for each in nothing):
                del kept[name]
            elif name not in cls.model_fields:
                raise ValueError(f"{name} is not supported; leave it out")
        known = [field.alias or name for name, field in cls.model_fields.items()]
        unknown = [name for name in kept if name not in known]
        ignored = IGNORED.get()
        if unknown and ignored is None:
            # By the name that pydantic has for it, which knows no fields that may have been meant.
            near = get_close_matches(str(unknown[0])[:LONGEST_NAME], known, 1)
            raise PydanticCustomError(UNKNOWN, "unknown field", {"field": unknown[0], "near": near})
        if ignored is not None:
            ignored += unknown
        return {name: value for name, value in kept.items() if name in known}


class TextPart(Strict):
    type: str
    text: Annotated[str | None, Field(validate_default=False)] = None

    @model_validator(mode="before")
    @classmethod
    def check_type(cls, data: Any) -> Any:
        """Before its fields, which are those of another kind of part."""
        if isinstance(data, dict) and isinstance(kind := data.get("type"), str) and kind != "text":
            raise ValueError(f"the model reads text alone; leave out the part of type {kind[:64]}")
        return data

    @model_validator(mode="after")
    def check_text(self) -> TextPart:
        if self.text is None:
            raise ValueError("text is missing")
        return self


Content = Annotated[
    Annotated[str, Tag("str")] | Annotated[Several[TextPart], Tag("list[]")],
    which(text_or_list, "give a text, or a list of parts"),
]


def text_of(content: str | list[TextPart] | None) -> str:
    return content or "" if not isinstance(content, list) else "".join(part.text or "" for part in content)


class FunctionCall(Strict):
    """arguments: JSON, as OpenAI writes them, or the object itself."""

    name: Annotated[str, Field(min_length=1, max_length=256)]
    arguments: str | dict[str, Any] = ""

    @property
    def parsed(self) -> dict[str, Any]:
        """What templates expect."""
        return json.loads(self.arguments or "{}") if isinstance(self.arguments, str) else self.arguments

    @model_validator(mode="after")
    def check_arguments(self) -> FunctionCall:
        try:
            known = isinstance(self.parsed, dict)
        except (ValueError, RecursionError):
            known = False
        if not known:
            raise ValueError("arguments are no JSON object")
        return self


class ToolCall(Strict):
    id: str | None = None
    type: Literal["function"] = "function"
    function: FunctionCall
    asks_nothing: ClassVar[Mapping[str, Any]] = {"index": ANYTHING}

    def turn(self) -> dict[str, Any]:
        known = {"id": self.id} if self.id is not None else {}
        return known | {
            "type": "function",
            "function": {"name": self.function.name, "arguments": self.function.parsed},
        }


class Function(Strict):
    name: Annotated[str, Field(min_length=1, max_length=256)]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    asks_nothing: ClassVar[Mapping[str, Any]] = {"strict": (False,)}


class Tool(Strict):
    type: Literal["function"]
    function: Function


class Message(Strict):
    """reasoning_content: what an assistant thought; the chat template shows it or leaves it out."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content | None = None
    name: str | None = None
    reasoning_content: str | None = None
    tool_calls: Annotated[Several[ToolCall], Field(max_length=128)] | None = None
    tool_call_id: str | None = None
    asks_nothing: ClassVar[Mapping[str, Any]] = MESSAGES_ASK_NOTHING

    @model_validator(mode="after")
    def check_role(self) -> Message:
        if self.content is None and not self.tool_calls:
            raise ValueError("content is missing; give a text")
        for name, role in (("reasoning_content", "assistant"), ("tool_calls", "assistant"), ("tool_call_id", "tool")):
            if getattr(self, name) is not None and self.role != role:
                raise ValueError(f"{name} is for {role} messages; leave it out")
        return self

    def turn(self) -> dict[str, Any]:
        """What the chat template gets. A name says something of tools alone; templates leave out other ones."""
        turn: dict[str, Any] = {"role": "system" if self.role == "developer" else self.role}
        turn["content"] = text_of(self.content)
        if self.reasoning_content is not None:
            turn["reasoning_content"] = self.reasoning_content
        if self.tool_calls:
            turn["tool_calls"] = [call.turn() for call in self.tool_calls]
        if self.role == "tool":
            turn |= {key: value for key in ("name", "tool_call_id") if (value := getattr(self, key)) is not None}
        return turn
