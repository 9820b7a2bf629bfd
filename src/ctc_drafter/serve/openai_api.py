"""OpenAI endpoints: chat completions, completions, models; whole or streamed."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from fastapi import APIRouter, Request
from fastapi.responses import Response
from openai.types import CompletionUsage, Model, completion_choice
from openai.types.chat import (
    ChatCompletion,
    ChatCompletionChunk,
    ChatCompletionMessage,
    ChatCompletionMessageFunctionToolCall,
    ChatCompletionTokenLogprob,
    chat_completion,
    chat_completion_chunk,
)
from openai.types.chat.chat_completion_chunk import ChoiceDelta, ChoiceDeltaToolCall, ChoiceDeltaToolCallFunction
from openai.types.chat.chat_completion_message_function_tool_call import Function
from openai.types.chat.chat_completion_token_logprob import TopLogprob
from pydantic import BaseModel
from starlette.concurrency import run_in_threadpool
from transformers import PreTrainedTokenizerBase

from ctc_drafter.chat import REPLACEMENT
from ctc_drafter.serve.async_stream import Answer, EventStream, RequestStream, unless_gone
from ctc_drafter.serve.middleware import APIError
from ctc_drafter.serve.protocol import (
    ChatRequest,
    ChoiceWithTokens,
    CompletionReply,
    CompletionRequest,
    ErrorReply,
    FinishReason,
    ModelList,
    Streamed,
)
from ctc_drafter.serve.requests import Completion, Finish, TokenOutput
from ctc_drafter.serve.service import Service
from ctc_drafter.serve.structured import Grammar
from ctc_drafter.serve.tools import Parsed, ToolFormat, ToolParser

Reason = Literal["stop", "length"]
SHORT = 16  # tokens of a completion that does not say, as OpenAI has it
DONE = "data: [DONE]\n\n"
# For the schema. Any other refusal of a request has the same shape.
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorReply} for status in (400, 401, 403, 404, 408, 413, 429, 503, 504, "4XX")
}
EVENT = {
    "type": "object",
    "properties": {"event": {"type": "string"}, "data": {"type": "string"}},
    "required": ["data"],
}
STREAMED: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {"schema": EVENT}}}}


def openai_router(service: Service) -> APIRouter:
    router = APIRouter(prefix="/v1", responses=ERRORS)

    @router.get("/models", response_model_exclude_unset=True)
    async def models() -> ModelList:
        """The one model that is served."""
        return ModelList(object="list", data=[about_model(service)])

    @router.get("/models/{model:path}", response_model_exclude_unset=True)
    async def model(model: str) -> Model:
        """The model as an entry of `/v1/models`."""
        service.check_model(model)
        return about_model(service)

    @router.post("/chat/completions", response_model=ChatCompletion, responses=STREAMED)
    async def chat(body: ChatRequest, request: Request) -> Response:
        """The answer to a conversation; with `stream`, as server-sent events."""
        service.check_model(body.model)
        tools, options = body.usable_tools, body.template_options
        prompt, form = await service.encoded(service.encode_chat, body.messages, tools, options)
        grammar: Grammar | None
        if body.must_call:
            grammar = await service.encoded(service.call_grammar, body.callable_tools, body.several_calls)
        else:
            grammar = await service.encoded(service.grammar, body.response_format)
        settings: dict[str, Any] = {"n": body.n, "stop": body.stops, "top": body.likeliest}
        completions = service.completions([prompt], body, body.limit, **settings, form=form, grammar=grammar)
        builder = ChatBuilder(service.name, TokenText(service.tokenizer, body.logprobs), body.wants_usage, form)
        return await answer(service, body, request, completions, builder)

    @router.post("/completions", response_model=CompletionReply, responses=STREAMED)
    async def completion(body: CompletionRequest, request: Request) -> Response:
        """The continuation of a text, or of several; without max_tokens 16 tokens of it."""
        service.check_model(body.model)
        service.check_choices(len(body.prompts) * body.n)
        prompts = await service.encoded(encode_all, service, body.prompts)
        limit = body.max_tokens or SHORT
        grammar = await service.encoded(service.grammar, body.response_format)
        settings: dict[str, Any] = {"n": body.n, "stop": body.stops, "top": body.logprobs}
        completions = service.completions(prompts, body, limit, **settings, grammar=grammar)
        token_text = TokenText(service.tokenizer, body.logprobs is not None)
        builder = CompletionBuilder(service.name, token_text, body.wants_usage, body.return_token_ids)
        return await answer(service, body, request, completions, builder)

    return router


def about_model(service: Service) -> Model:
    return Model(id=service.name, object="model", created=service.created, owned_by="ctc-drafter")


def encode_all(service: Service, prompts: Sequence[str | list[int]]) -> list[list[int]]:
    return [
        service.encode_text(prompt, place) if isinstance(prompt, str) else service.check_prompt(prompt, place)
        for place, prompt in enumerate(prompts)
    ]


async def answer(
    service: Service, body: Streamed, request: Request, completions: list[Completion], builder: ResponseBuilder
) -> Response:
    request_stream = RequestStream(service.engine, completions)
    if body.stream:
        return EventStream(request_stream, stream(request_stream, builder, body))
    try:
        answers = await unless_gone(request, request_stream.collect())
    finally:
        request_stream.cancel()

    def written() -> str:
        return builder.whole(answers, usage_of(completions, body.n)).model_dump_json(exclude_unset=True)

    return Response(await run_in_threadpool(written), media_type="application/json")  # thousands of log-probabilities


async def stream(request_stream: RequestStream, builder: ResponseBuilder, body: Streamed) -> AsyncIterator[str]:
    """Lines of server-sent events. An error ends the stream as OpenAI's client expects it."""
    for chunk in builder.opening(len(request_stream.completions)):
        yield data(chunk)
    try:
        async for place, event in request_stream.events():
            reason = event.reason if isinstance(event, Finish) else None
            if event.text or event.tokens or reason:
                for chunk in builder.piece(place, event.text, event.tokens, reason):
                    yield data(chunk)
        if body.wants_usage:
            yield data(builder.closing(usage_of(request_stream.completions, body.n)))
    except APIError as error:
        yield data(error.body)
    yield DONE


def data(value: BaseModel) -> str:
    return f"data: {value.model_dump_json(exclude_unset=True)}\n\n"


# Responses as chat messages and as completions, whole or streamed.


class ResponseBuilder(Protocol):
    """Builds the responses of one request, whole or streamed."""

    def whole(self, answers: Sequence[Answer], usage: CompletionUsage) -> BaseModel: ...
    def opening(self, count: int) -> list[BaseModel]: ...
    def piece(self, place: int, text: str, tokens: Sequence[TokenOutput], reason: Reason | None) -> list[BaseModel]: ...
    def closing(self, usage: CompletionUsage) -> BaseModel: ...


@dataclass(frozen=True)
class TokenText:
    """Tokens as texts for log-probabilities; `asked` says whether there are any."""

    tokenizer: PreTrainedTokenizerBase
    asked: bool

    def text(self, token: int) -> str:
        return str(self.tokenizer.decode([token], clean_up_tokenization_spaces=False))

    def top(self, token: int, logprob: float) -> TopLogprob:
        text = self.text(token)
        return TopLogprob(token=text, logprob=logprob, bytes=None if REPLACEMENT in text else list(text.encode()))

    def by_text(self, top: Sequence[tuple[int, float]]) -> dict[str, float]:
        """Drops duplicates: of tokens with the same text, such as parts of characters, the most probable stays."""
        return {self.text(token): value for token, value in reversed(top)}

    def chat(self, tokens: Sequence[TokenOutput]) -> chat_completion.ChoiceLogprobs | None:
        if not self.asked:
            return None
        content = []
        for output in tokens:
            assert output.logprobs is not None
            own = self.top(output.token, output.logprobs.written)
            top = [self.top(*pair) for pair in output.logprobs.top]
            content.append(ChatCompletionTokenLogprob(**own.model_dump(), top_logprobs=top))
        return chat_completion.ChoiceLogprobs(content=content, refusal=None)

    def completion(self, tokens: Sequence[TokenOutput]) -> completion_choice.Logprobs | None:
        if not self.asked:
            return None
        known = [(output, output.logprobs) for output in tokens if output.logprobs is not None]
        return completion_choice.Logprobs(
            tokens=[self.text(output.token) for output, _ in known],
            token_logprobs=[logprobs.written for _, logprobs in known],
            top_logprobs=[self.by_text(logprobs.top) for _, logprobs in known],
            text_offset=[output.offset for output, _ in known],
        )


@dataclass(frozen=True)
class ChatBuilder:
    """usage: whether a stream tells it at its end; the chunks before then have null, as OpenAI has it."""

    model: str
    token_text: TokenText
    usage: bool
    form: ToolFormat | None = None
    id: str = field(default_factory=lambda: f"chatcmpl-{secrets.token_hex(12)}")
    created: int = field(default_factory=lambda: int(time.time()))
    parsers: dict[int, ToolParser] = field(default_factory=dict)

    def whole(self, answers: Sequence[Answer], usage: CompletionUsage) -> ChatCompletion:
        choices = [
            chat_completion.Choice(
                index=place,
                message=message_of(parsed := self._parsed(place, answer.text, True)),
                logprobs=self.token_text.chat(answer.tokens),
                finish_reason=ended(answer.finish.reason, len(parsed.calls)) or "stop",
            )
            for place, answer in enumerate(answers)
        ]
        kind: Literal["chat.completion"] = "chat.completion"
        return ChatCompletion(
            id=self.id, object=kind, created=self.created, model=self.model, choices=choices, usage=usage
        )

    def opening(self, count: int) -> list[BaseModel]:
        start = ChoiceDelta(role="assistant", content="")
        return [self._chunk([chunk_choice(place, start, None, None)]) for place in range(count)]

    def piece(self, place: int, text: str, tokens: Sequence[TokenOutput], reason: Reason | None) -> list[BaseModel]:
        before = self.parsers[place].called if place in self.parsers else 0
        parsed = self._parsed(place, text, reason is not None)
        told = ended(reason, before + len(parsed.calls))
        delta = delta_of(parsed, before)
        if not (tokens or told or delta.model_fields_set):
            return []
        if not (delta.model_fields_set or told):
            delta = ChoiceDelta(content="")
        return [self._chunk([chunk_choice(place, delta, self.token_text.chat(tokens), told)])]

    def closing(self, usage: CompletionUsage) -> BaseModel:
        return self._chunk([], usage)

    def _parsed(self, place: int, text: str, last: bool) -> Parsed:
        if self.form is None:
            return Parsed(text)
        parser = self.parsers.setdefault(place, ToolParser(self.form))
        news, rest = parser.push(text), parser.close() if last else Parsed()
        return Parsed(news.content + rest.content, news.reasoning + rest.reasoning, news.calls + rest.calls)

    def _chunk(self, choices: list[chat_completion_chunk.Choice], usage: CompletionUsage | None = None) -> BaseModel:
        told: dict[str, Any] = {"usage": usage} if self.usage else {}
        kind: Literal["chat.completion.chunk"] = "chat.completion.chunk"
        return ChatCompletionChunk(
            id=self.id, object=kind, created=self.created, model=self.model, choices=choices, **told
        )


def ended(reason: Reason | None, calls: int) -> FinishReason | None:
    return "tool_calls" if calls and reason == "stop" else reason


def message_of(parsed: Parsed) -> ChatCompletionMessage:
    calls = [
        ChatCompletionMessageFunctionToolCall(
            id=call.id, type="function", function=Function(name=call.name, arguments=call.arguments)
        )
        for call in parsed.calls
    ]
    told: dict[str, Any] = {"tool_calls": calls} if calls else {}
    if parsed.reasoning:
        told["reasoning_content"] = parsed.reasoning
    content = None if calls and not parsed.content else parsed.content
    return ChatCompletionMessage(role="assistant", content=content, refusal=None, **told)


def delta_of(parsed: Parsed, before: int) -> ChoiceDelta:
    """before: calls that were told already."""
    told: dict[str, Any] = {"content": parsed.content} if parsed.content else {}
    if parsed.reasoning:
        told["reasoning_content"] = parsed.reasoning
    if parsed.calls:
        told["tool_calls"] = [
            ChoiceDeltaToolCall(
                index=before + number,
                id=call.id,
                type="function",
                function=ChoiceDeltaToolCallFunction(name=call.name, arguments=call.arguments),
            )
            for number, call in enumerate(parsed.calls)
        ]
    return ChoiceDelta(**told)


def chunk_choice(
    place: int, delta: ChoiceDelta, logprobs: chat_completion.ChoiceLogprobs | None, reason: FinishReason | None
) -> chat_completion_chunk.Choice:
    told = chat_completion_chunk.ChoiceLogprobs(**dict(logprobs)) if logprobs else None
    return chat_completion_chunk.Choice(index=place, delta=delta, logprobs=told, finish_reason=reason)


@dataclass(frozen=True)
class CompletionBuilder:
    """usage: whether a stream tells it at its end. ids: whether token ids are given as well."""

    model: str
    token_text: TokenText
    usage: bool
    ids: bool = False
    id: str = field(default_factory=lambda: f"cmpl-{secrets.token_hex(12)}")
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, answers: Sequence[Answer], usage: CompletionUsage) -> CompletionReply:
        choices = [
            self._choice(place, answer.text, answer.tokens, answer.finish.reason, answer.finish.ids)
            for place, answer in enumerate(answers)
        ]
        return self._reply(choices, usage=usage)

    def opening(self, count: int) -> list[BaseModel]:
        return []

    def piece(self, place: int, text: str, tokens: Sequence[TokenOutput], reason: Reason | None) -> list[BaseModel]:
        return [self._reply([self._choice(place, text, tokens, reason)], **self._usage(None))]

    def closing(self, usage: CompletionUsage) -> BaseModel:
        return self._reply([], **self._usage(usage))

    def _usage(self, usage: CompletionUsage | None) -> dict[str, Any]:
        return {"usage": usage} if self.usage else {}

    def _choice(
        self,
        place: int,
        text: str,
        tokens: Sequence[TokenOutput],
        reason: Reason | None,
        ids: Sequence[int] = (),
    ) -> ChoiceWithTokens:
        given: dict[str, Any] = {"token_ids": list(ids)} if self.ids else {}
        logprobs = self.token_text.completion(tokens)
        return ChoiceWithTokens(index=place, text=text, logprobs=logprobs, finish_reason=reason, **given)

    def _reply(self, choices: list[ChoiceWithTokens], **usage: Any) -> CompletionReply:
        return CompletionReply(
            id=self.id, object="text_completion", created=self.created, model=self.model, choices=choices, **usage
        )


def usage_of(completions: Sequence[Completion], choices: int) -> CompletionUsage:
    """Tokens of all completions; `choices` of them share a prompt, which is counted once."""
    prompt = sum(len(completion.prompt) for completion in completions[::choices])
    written = sum(len(completion.tokens) for completion in completions)
    return CompletionUsage(prompt_tokens=prompt, completion_tokens=written, total_tokens=prompt + written)
