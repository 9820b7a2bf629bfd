"""OpenAI endpoints: chat completions, completions, models; whole or streamed."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import BaseModel
from starlette.concurrency import run_in_threadpool
from transformers import PreTrainedTokenizerBase

from ctc_drafter.chat import REPLACEMENT
from ctc_drafter.serve.async_stream import Answer, EventStream, RequestStream, unless_gone
from ctc_drafter.serve.middleware import APIError
from ctc_drafter.serve.protocol import (
    Alternative,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatLogprobs,
    ChatMessage,
    ChatReply,
    ChatRequest,
    CompletionChoice,
    CompletionLogprobs,
    CompletionReply,
    CompletionRequest,
    Delta,
    ErrorReply,
    FinishReason,
    Model,
    ModelList,
    Streamed,
    TokenLogprob,
    Usage,
)
from ctc_drafter.serve.requests import Completion, Finish, TokenOutput
from ctc_drafter.serve.service import Service

# OpenAI's API: chat completions, completions, models.

SHORT = 16  # tokens of a completion that does not say, as OpenAI has it
DONE = "data: [DONE]\n\n"
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorReply} for status in (400, 401, 404, 408, 413, 429, 503, 504)
}


def openai_router(service: Service) -> APIRouter:
    router = APIRouter(prefix="/v1", responses=ERRORS)

    @router.get("/models")
    async def models() -> ModelList:
        """The one model that is served."""
        return ModelList(data=[Model(id=service.name, created=service.created)])

    @router.get("/models/{model:path}")
    async def model(model: str) -> Model:
        """The model as an entry of `/v1/models`."""
        service.check_model(model)
        return Model(id=service.name, created=service.created)

    @router.post("/chat/completions", response_model=ChatReply)
    async def chat(body: ChatRequest, request: Request) -> Response:
        """The answer to a conversation; with `stream`, as server-sent events."""
        service.check_model(body.model)
        prompt = await run_in_threadpool(service.encode_chat, body.messages)
        jobs = service.jobs([prompt], body, body.limit, n=body.n, stop=body.stops, top=body.likeliest)
        form = ChatForm(service.name, TokenText(service.tokenizer, body.logprobs))
        return await answer(service, body, request, jobs, form)

    @router.post("/completions", response_model=CompletionReply)
    async def completion(body: CompletionRequest, request: Request) -> Response:
        """The continuation of a text, or of several; without max_tokens 16 tokens of it."""
        service.check_model(body.model)
        service.check_choices(len(body.prompts) * body.n)
        prompts = await run_in_threadpool(encode_all, service, body.prompts)
        limit = body.max_tokens or SHORT
        jobs = service.jobs(prompts, body, limit, n=body.n, stop=body.stops, top=body.logprobs)
        form = CompletionForm(
            service.name, TokenText(service.tokenizer, body.logprobs is not None), body.return_token_ids
        )
        return await answer(service, body, request, jobs, form)

    return router


def encode_all(service: Service, prompts: Sequence[str | list[int]]) -> list[list[int]]:
    return [
        service.encode_text(prompt, place) if isinstance(prompt, str) else service.check_prompt(prompt, place)
        for place, prompt in enumerate(prompts)
    ]


async def answer(
    service: Service, body: Streamed, request: Request, jobs: list[Completion], form: ResponseBuilder
) -> Response:
    exchange = RequestStream(service.engine, jobs)
    if body.stream:
        return EventStream(exchange, stream(exchange, form, body))
    try:
        answers = await unless_gone(request, exchange.collect())
    finally:
        exchange.cancel()

    def written() -> str:
        return form.whole(answers, usage_of(jobs, body.n)).model_dump_json()

    return Response(await run_in_threadpool(written), media_type="application/json")  # thousands of likelihoods


async def stream(exchange: RequestStream, form: ResponseBuilder, body: Streamed) -> AsyncIterator[str]:
    """Lines of server-sent events. An error ends the stream as OpenAI's client expects it."""
    for chunk in form.opening(len(exchange.jobs)):
        yield data(chunk)
    try:
        async for place, event in exchange.events():
            reason = event.reason if isinstance(event, Finish) else None
            if event.text or event.tokens or reason:
                yield data(form.piece(place, event.text, event.tokens, reason))
        if body.wants_usage:
            yield data(form.closing(usage_of(exchange.jobs, body.n)))
    except APIError as error:
        yield data(error.body)
    yield DONE


def data(value: BaseModel) -> str:
    return f"data: {value.model_dump_json()}\n\n"


# Responses as chat messages and as completions, whole or streamed.


class ResponseBuilder(Protocol):
    """Builds the responses of one request, whole or streamed."""

    def whole(self, answers: Sequence[Answer], usage: Usage) -> BaseModel: ...
    def opening(self, count: int) -> list[BaseModel]: ...
    def piece(self, place: int, text: str, tokens: Sequence[TokenOutput], reason: FinishReason | None) -> BaseModel: ...
    def closing(self, usage: Usage) -> BaseModel: ...


@dataclass(frozen=True)
class TokenText:
    """Tokens as texts for log-probabilities; `asked` says whether there are any."""

    tokenizer: PreTrainedTokenizerBase
    asked: bool

    def text(self, token: int) -> str:
        return str(self.tokenizer.decode([token], clean_up_tokenization_spaces=False))

    def alternative(self, token: int, logprob: float) -> Alternative:
        text = self.text(token)
        return Alternative(token=text, logprob=logprob, bytes=None if REPLACEMENT in text else list(text.encode()))

    def by_text(self, top: Sequence[tuple[int, float]]) -> dict[str, float]:
        """Drops duplicates: of tokens with the same text, such as parts of characters, the most probable stays."""
        return {self.text(token): value for token, value in reversed(top)}

    def chat(self, tokens: Sequence[TokenOutput]) -> ChatLogprobs | None:
        if not self.asked:
            return None
        content = []
        for written in tokens:
            assert written.likelihood is not None
            own = self.alternative(written.token, written.likelihood.written)
            top = [self.alternative(*pair) for pair in written.likelihood.top]
            content.append(TokenLogprob(**own.model_dump(), top_logprobs=top))
        return ChatLogprobs(content=content)

    def completion(self, tokens: Sequence[TokenOutput]) -> CompletionLogprobs | None:
        if not self.asked:
            return None
        known = [(written, written.likelihood) for written in tokens if written.likelihood is not None]
        return CompletionLogprobs(
            tokens=[self.text(written.token) for written, _ in known],
            token_logprobs=[likelihood.written for _, likelihood in known],
            top_logprobs=[self.by_text(likelihood.top) for _, likelihood in known],
            text_offset=[written.offset for written, _ in known],
        )


@dataclass(frozen=True)
class ChatForm:
    model: str
    wording: TokenText
    id: str = field(default_factory=lambda: f"chatcmpl-{secrets.token_hex(12)}")
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, answers: Sequence[Answer], usage: Usage) -> ChatReply:
        choices = [
            ChatChoice(
                index=place,
                message=ChatMessage(content=answer.text),
                logprobs=self.wording.chat(answer.tokens),
                finish_reason=answer.finish.reason,
            )
            for place, answer in enumerate(answers)
        ]
        return ChatReply(id=self.id, created=self.created, model=self.model, choices=choices, usage=usage)

    def opening(self, count: int) -> list[BaseModel]:
        start = Delta(role="assistant", content="")
        return [self._chunk([ChatChunkChoice(index=place, delta=start)]) for place in range(count)]

    def piece(self, place: int, text: str, tokens: Sequence[TokenOutput], reason: FinishReason | None) -> BaseModel:
        delta = Delta(content=text) if text or reason is None else Delta()
        logprobs = self.wording.chat(tokens)
        return self._chunk([ChatChunkChoice(index=place, delta=delta, logprobs=logprobs, finish_reason=reason)])

    def closing(self, usage: Usage) -> BaseModel:
        return self._chunk([], usage)

    def _chunk(self, choices: list[ChatChunkChoice], usage: Usage | None = None) -> ChatChunk:
        return ChatChunk(id=self.id, created=self.created, model=self.model, choices=choices, usage=usage)


@dataclass(frozen=True)
class CompletionForm:
    """ids: whether token ids are given as well."""

    model: str
    wording: TokenText
    ids: bool = False
    id: str = field(default_factory=lambda: f"cmpl-{secrets.token_hex(12)}")
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, answers: Sequence[Answer], usage: Usage) -> CompletionReply:
        choices = [
            self._choice(place, answer.text, answer.tokens, answer.finish.reason, answer.finish.ids)
            for place, answer in enumerate(answers)
        ]
        return self._reply(choices, usage)

    def opening(self, count: int) -> list[BaseModel]:
        return []

    def piece(self, place: int, text: str, tokens: Sequence[TokenOutput], reason: FinishReason | None) -> BaseModel:
        return self._reply([self._choice(place, text, tokens, reason)])

    def closing(self, usage: Usage) -> BaseModel:
        return self._reply([], usage)

    def _choice(
        self,
        place: int,
        text: str,
        tokens: Sequence[TokenOutput],
        reason: FinishReason | None,
        ids: Sequence[int] = (),
    ) -> CompletionChoice:
        logprobs, given = self.wording.completion(tokens), list(ids) if self.ids else None
        return CompletionChoice(index=place, text=text, token_ids=given, logprobs=logprobs, finish_reason=reason)

    def _reply(self, choices: list[CompletionChoice], usage: Usage | None = None) -> CompletionReply:
        return CompletionReply(id=self.id, created=self.created, model=self.model, choices=choices, usage=usage)


def usage_of(jobs: Sequence[Completion], choices: int) -> Usage:
    """Tokens of all jobs; `choices` of them share a prompt, which is counted once."""
    prompt = sum(len(job.prompt) for job in jobs[::choices])
    written = sum(len(job.tokens) for job in jobs)
    return Usage(prompt_tokens=prompt, completion_tokens=written, total_tokens=prompt + written)
