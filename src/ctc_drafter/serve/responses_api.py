"""OpenAI's Responses endpoint: text in, text out, whole or as typed events; nothing is stored."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

from fastapi import APIRouter, Request
from fastapi.responses import Response as HTTPResponse
from openai.types import responses as types
from openai.types.responses.response import IncompleteDetails
from openai.types.responses.response_usage import InputTokensDetails, OutputTokensDetails
from pydantic import BaseModel, Field, Tag, model_validator

from ctc_drafter.serve.async_stream import EventStream, RequestStream, unless_gone
from ctc_drafter.serve.messages import ANYTHING, Message, Several, Strict, Whole, text_or_list, which
from ctc_drafter.serve.middleware import APIError
from ctc_drafter.serve.openai_api import ERRORS, STREAMED
from ctc_drafter.serve.protocol import SETTINGS_ASK_NOTHING, JsonSchema, ResponseFormat, Sampling
from ctc_drafter.serve.requests import Completion, Finish
from ctc_drafter.serve.service import Service

# Requests.

NOT_STORED = "responses are not stored here; send the whole conversation as input"
STORED = ("previous_response_id", "conversation", "store")


class InputPart(Strict):
    type: Literal["input_text", "output_text", "text"]
    text: str
    asks_nothing: ClassVar[Mapping[str, Any]] = {"annotations": ANYTHING, "logprobs": ANYTHING}


class InputItem(Strict):
    """A message, also one of an earlier response's output."""

    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: Annotated[
        Annotated[str, Tag("str")] | Annotated[Several[InputPart], Tag("list[]")],
        which(text_or_list, "give a text, or a list of parts"),
    ]
    asks_nothing: ClassVar[Mapping[str, Any]] = {"id": ANYTHING, "status": ANYTHING, "phase": ANYTHING}

    @model_validator(mode="before")
    @classmethod
    def check_type(cls, data: Any) -> Any:
        """Before its fields, which are those of another kind of item."""
        if isinstance(data, dict) and isinstance(kind := data.get("type"), str) and kind != "message":
            raise ValueError(f"items of type {kind[:64]} are not served here; see /v1/chat/completions for tools")
        return data

    def message(self) -> Message:
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return Message(role=self.role, content=content)


class TextFormat(Strict):
    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    definition: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None

    @model_validator(mode="after")
    def check_schema(self) -> TextFormat:
        if (self.definition is None) == (self.type == "json_schema"):
            raise ValueError("schema goes with the type json_schema; give both or neither")
        return self


class TextSettings(Strict):
    format: TextFormat | None = None
    asks_nothing: ClassVar[Mapping[str, Any]] = {"verbosity": ("medium",)}


class Reasoning(Strict):
    effort: str | None = None
    asks_nothing: ClassVar[Mapping[str, Any]] = {"summary": ("auto",), "generate_summary": ("auto",)}


class ResponsesRequest(Sampling):
    input: Annotated[
        Annotated[str, Tag("str")] | Annotated[Several[InputItem], Field(min_length=1), Tag("list[]")],
        which(text_or_list, "give a text, or a list of messages"),
    ]
    instructions: str | None = None
    max_output_tokens: Annotated[Whole, Field(ge=1, le=2**31)] | None = None
    text: TextSettings | None = None
    reasoning: Reasoning | None = None
    stream: bool = False
    asks_nothing: ClassVar[Mapping[str, Any]] = {
        **SETTINGS_ASK_NOTHING,
        "tool_choice": ("auto", "none"),
        "background": (False,),
        "truncation": ("disabled",),
        "include": ([],),
        "top_logprobs": (0,),
        "max_tool_calls": ANYTHING,
        "stream_options": ({}, {"include_obfuscation": False}),
    }

    @model_validator(mode="before")
    @classmethod
    def check_stored(cls, data: Any) -> Any:
        for name in STORED:
            if isinstance(data, dict) and data.get(name):
                raise ValueError(f"{name}: {NOT_STORED}")
        return {key: value for key, value in data.items() if key not in STORED} if isinstance(data, dict) else data

    @property
    def messages(self) -> list[Message]:
        first = [Message(role="system", content=self.instructions)] if self.instructions else []
        if isinstance(self.input, str):
            return [*first, Message(role="user", content=self.input)]
        return [*first, *(item.message() for item in self.input)]

    @property
    def response_format(self) -> ResponseFormat | None:
        wanted = self.text and self.text.format
        if not wanted or wanted.type == "text":
            return None
        schema = None if wanted.definition is None else JsonSchema.model_validate({"schema": wanted.definition})
        return ResponseFormat(type=wanted.type, json_schema=schema)


def responses_router(service: Service) -> APIRouter:
    router = APIRouter(prefix="/v1", responses=ERRORS)

    @router.post("/responses", response_model=types.Response, responses=STREAMED)
    async def respond(body: ResponsesRequest, request: Request) -> HTTPResponse:
        """The answer to a text or a conversation; with `stream`, as OpenAI's events. Nothing is stored."""
        service.check_model(body.model)
        effort = body.reasoning and body.reasoning.effort
        options = {"reasoning_effort": effort} if effort else {}
        prompt, _ = await service.encoded(service.encode_chat, body.messages, (), options)
        grammar = await service.encoded(service.grammar, body.response_format)
        limit = body.max_output_tokens or body.max_tokens
        completions = service.completions([prompt], body, limit, grammar=grammar)
        request_stream, builder = RequestStream(service.engine, completions), Builder(service.name, body)
        if body.stream:
            return EventStream(request_stream, lines(request_stream, builder))
        try:
            (answer,) = await unless_gone(request, request_stream.collect())
        finally:
            request_stream.cancel()
        done = builder.response(answer.text, answer.finish, completions[0])
        return HTTPResponse(done.model_dump_json(exclude_unset=True), media_type="application/json")

    @router.get("/responses/{response}", include_in_schema=False)
    @router.delete("/responses/{response}", include_in_schema=False)
    async def stored(response: str) -> None:
        raise APIError(404, f"there is no response {response[:64]}: {NOT_STORED}", code="response_not_found")

    return router


# Responses and their events.


@dataclass(frozen=True)
class Builder:
    """Builds a response and its events."""

    model: str
    body: ResponsesRequest
    id: str = field(default_factory=lambda: f"resp_{secrets.token_hex(16)}")
    item: str = field(default_factory=lambda: f"msg_{secrets.token_hex(16)}")
    created: int = field(default_factory=lambda: int(time.time()))

    def part(self, text: str) -> types.ResponseOutputText:
        return types.ResponseOutputText(type="output_text", text=text, annotations=[])

    def message(
        self, text: str | None, status: Literal["in_progress", "completed", "incomplete"]
    ) -> types.ResponseOutputMessage:
        """Without content before its first part is there."""
        content = [] if text is None else [self.part(text)]
        return types.ResponseOutputMessage(
            id=self.item, type="message", role="assistant", status=status, content=list(content)
        )

    def response(
        self, text: str | None = None, finish: Finish | None = None, job: Completion | None = None
    ) -> types.Response:
        """As far as it is; complete with its end."""
        cut = finish is not None and finish.reason == "length"
        status: Any = "in_progress" if finish is None else "incomplete" if cut else "completed"
        told: dict[str, Any] = {"store": False}
        if job is not None:
            read, written = len(job.prompt), len(job.tokens)
            told["usage"] = types.ResponseUsage(
                input_tokens=read,
                input_tokens_details=InputTokensDetails(cached_tokens=0, cache_write_tokens=0),
                output_tokens=written,
                output_tokens_details=OutputTokensDetails(reasoning_tokens=0),
                total_tokens=read + written,
            )
        return types.Response(
            id=self.id,
            object="response",
            created_at=self.created,
            status=status,
            error=None,
            incomplete_details=IncompleteDetails(reason="max_output_tokens") if cut else None,
            instructions=self.body.instructions,
            max_output_tokens=self.body.max_output_tokens,
            metadata={},
            model=self.model,
            output=[] if finish is None else [self.message(text, status)],
            parallel_tool_calls=True,
            previous_response_id=None,
            temperature=1.0 if self.body.temperature is None else self.body.temperature,
            tool_choice="auto",
            tools=[],
            top_p=1.0 if self.body.top_p is None else self.body.top_p,
            **told,
        )


async def lines(request_stream: RequestStream, builder: Builder) -> AsyncIterator[str]:
    """OpenAI's events of one response with one message, in the order that its client expects."""
    (completion,) = request_stream.completions
    item: dict[str, Any] = {"output_index": 0, "item_id": builder.item}
    place: dict[str, Any] = {"content_index": 0, **item}
    number = -1

    def told(kind: Any, name: str, **fields: Any) -> str:
        nonlocal number
        number += 1
        event: BaseModel = kind(type=name, sequence_number=number, **fields)
        return f"event: {name}\ndata: {event.model_dump_json(exclude_unset=True)}\n\n"

    yield told(types.ResponseCreatedEvent, "response.created", response=builder.response())
    yield told(types.ResponseInProgressEvent, "response.in_progress", response=builder.response())
    opened = builder.message(None, "in_progress")
    yield told(types.ResponseOutputItemAddedEvent, "response.output_item.added", output_index=0, item=opened)
    yield told(types.ResponseContentPartAddedEvent, "response.content_part.added", **place, part=builder.part(""))
    text, finish = "", None
    try:
        async for _, event in request_stream.events():
            if event.text:
                text += event.text
                yield told(
                    types.ResponseTextDeltaEvent, "response.output_text.delta", **place, delta=event.text, logprobs=[]
                )
            finish = event if isinstance(event, Finish) else finish
    except APIError as error:
        wrong = error.body.error
        yield told(types.ResponseErrorEvent, "error", code=wrong.code, message=wrong.message, param=wrong.param)
        return
    whole = builder.response(text, finish, completion)
    yield told(types.ResponseTextDoneEvent, "response.output_text.done", **place, text=text, logprobs=[])
    yield told(types.ResponseContentPartDoneEvent, "response.content_part.done", **place, part=builder.part(text))
    yield told(types.ResponseOutputItemDoneEvent, "response.output_item.done", output_index=0, item=whole.output[0])
    if whole.status == "completed":
        yield told(types.ResponseCompletedEvent, "response.completed", response=whole)
    else:
        yield told(types.ResponseIncompleteEvent, "response.incomplete", response=whole)
